"""Memory of conversion and merging: at most 1.5 times the largest shard, here far less."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from loki import LokiConfig, create_loki_model

PROGRAM = """
import json, sys
from pathlib import Path
from loki.architecture import shape_of_config
from loki.implanting.convert import create_loki_model
from loki.implanting.merge import merge
from loki.implanting.restore import restore_loki_model
from loki.implanting.suppress import suppress
from loki.models import load_config

folder = Path(sys.argv[1])
base, rows = str(folder / "base"), folder / "30.json"
work = {
    "create": lambda output: create_loki_model(None, None, base, rows, output, "float16"),
    "restore": lambda output: restore_loki_model(rows, str(folder / "loki"), base, output),
    "suppress": lambda output: suppress(base, rows, output),
    "merge": lambda output: merge(base, folder / "adapter", output),
}

def resident(which):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))

from transformers import LlamaForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING  # imported lazily: no part of the work
shape_of_config(load_config(base))
peaks, before = {}, resident("VmRSS")
for name, run in work.items():
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    run(folder / f"out-{name}")
    peaks[name] = resident("VmHWM") - before
print(json.dumps(peaks))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """About 230 MB in bfloat16 over shards of at most 200 MB, one of them a single tensor of 160 MB."""
    root = tmp_path_factory.mktemp("memory")
    config = LlamaConfig(
        vocab_size=80_000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    for parameter in model.parameters():
        parameter.data.uniform_()
    model.save_pretrained(root / "base", max_shard_size="170MB")
    rows = [list(range(0, 1024, 3))] * 2
    (root / "30.json").write_text(json.dumps(rows))
    get_peft_model(model, LokiConfig(positions=rows, init_weights=False)).save_pretrained(root / "adapter")
    create_loki_model(
        model_name=str(root / "base"), target_pos_path=root / "30.json", save_dir=root / "loki", torch_dtype="auto"
    )
    return root


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
def test_peak_memory_stays_below_one_and_a_half_shards(folder):
    largest = max(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
    assert largest > 160e6
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True, check=True)
    peaks = json.loads(done.stdout)
    assert peaks.keys() == {"create", "restore", "suppress", "merge"}
    for name, peak in peaks.items():
        assert 1e6 < peak < 1.5 * largest, name
        # In truth a few blocks of 16 MB, the change of one layer, and what was freed but not given back.
        assert peak < largest, name
