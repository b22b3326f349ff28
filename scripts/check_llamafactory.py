"""LlamaFactory trains LoKI on the CPU, by both routes, with the settings of `lf_config`; only selected rows change.

    python scripts/check_llamafactory.py --factory .venv-llamafactory [--work-dir DIR] [--runs toolace-model,…]

Route 1 is a LoKI model (`loki create-model`, `finetuning_type: full`, `loki restore-model`), route 2 an untrained LoKI
adapter (`finetuning_type: lora`, `loki merge`). The models are tiny, their weights random and the data invented, but
each run is `train.sh` with the YAML file as it is published, a few values overridden. LlamaFactory has an environment
of its own: it takes other versions of transformers and PEFT than this package is developed with.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from loki import LokiConfig, create_loki_model, restore_loki_model
from loki.implanting.merge import merge
from loki.provenance import write_json

RECIPES = Path(__file__).parents[1] / "lf_config"
SPECIAL_TOKENS = (
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
)
"""Of the templates llama3 and qwen."""
POSITIONS = [[7, 1, 15], [], [0, 14, 3, 2]]
"""Unsorted, and a layer without rows."""
NUM_STEPS = 4
NUM_EXAMPLES = 24
OVERRIDES = {
    "deepspeed": "null",
    "max_steps": str(NUM_STEPS),
    "learning_rate": "0.02",
    "cutoff_len": "192",
    "preprocessing_num_workers": "1",
    "plot_loss": "false",
    "report_to": "none",
    "use_cpu": "true",
}
"""What a machine without GPUs and an invented dataset need; everything else is as published."""
DOWN_PROJ = "model.layers.{layer}.mlp.down_proj.weight"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and the templates' own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|endoftext|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    return fast


def make_base(config_class: type[PretrainedConfig], folder: Path) -> Path:
    """A tiny model in bfloat16, as published models are, with its tokenizer."""
    torch.manual_seed(0)
    config = config_class(
        vocab_size=len(SPECIAL_TOKENS) + 256,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=len(POSITIONS),
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=3,
        pad_token_id=7,
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_data(recipe: Path, folder: Path) -> Path:
    """The recipe's dataset_info.json with invented rows in place of the Hub's, told by the same tags."""
    info = json.loads((recipe / "dataset_info.json").read_text())
    folder.mkdir()
    for name, entry in info.items():
        tags = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}
        tags |= entry.get("tags", {})
        role, content = tags["role_tag"], tags["content_tag"]
        rows = []
        for n in range(NUM_EXAMPLES):
            turns = [(tags["user_tag"], f"What is {n} + 1?"), (tags["assistant_tag"], f"add(a={n}, b=1)")]
            if "observation_tag" in tags:
                turns += [(tags["observation_tag"], f"{n + 1}"), (tags["assistant_tag"], f"It is {n + 1}.")]
            rows.append({"system": "Add.", "conversations": [{role: who, content: what} for who, what in turns]})
        write_json(folder / f"{name}.json", rows)
        del entry["hf_hub_url"]
        entry["file_name"] = f"{name}.json"
    write_json(folder / "dataset_info.json", info)
    return folder


def require_only_rows_changed(base: Path, result: Path) -> int:
    """How many rows changed: all selected ones, and nothing else by a single bit.

    Raises:
        SystemExit: anything else.
    """
    before, after = load_file(base / "model.safetensors"), load_file(result / "model.safetensors")
    if before.keys() != after.keys():
        sys.exit(f"{result} has other tensors than {base}: {sorted(before.keys() ^ after.keys())}")
    rows_of = {DOWN_PROJ.format(layer=layer): rows for layer, rows in enumerate(POSITIONS) if rows}
    num_changed = 0
    for name, tensor in before.items():
        new, selected = after[name], sorted(rows_of.get(name, []))
        if new.dtype != tensor.dtype or new.shape != tensor.shape:
            sys.exit(f"{name} is {new.dtype} {tuple(new.shape)}, it was {tensor.dtype} {tuple(tensor.shape)}")
        # As integers: bits, not values.
        differs = new.view(torch.int16).ne(tensor.view(torch.int16)).reshape(len(tensor), -1).any(dim=1)
        changed = differs.nonzero().flatten().tolist()
        if changed != selected:
            sys.exit(f"rows {changed} of {name} changed, {selected} were selected")
        num_changed += len(changed)
    return num_changed


def require_trained(folder: Path) -> list[float]:
    """Losses of all steps, from the trainer's record.

    Raises:
        SystemExit: not as many steps as wanted.
    """
    state = json.loads((folder / "trainer_state.json").read_text())
    losses = [row["loss"] for row in state["log_history"] if "loss" in row]
    if len(losses) != NUM_STEPS:
        sys.exit(f"{folder} logged {len(losses)} steps, {NUM_STEPS} were asked for")
    return losses


def environment(factory: Path, work: Path) -> dict[str, str]:
    """Variables that LlamaFactory runs with.

    It imports torchaudio even for text, and PyPI's torchaudio does not load beside a CPU build of torch; an empty
    module takes its place.
    """
    stand_in = work / "stand_in"
    stand_in.mkdir()
    can_load = subprocess.run([factory / "bin" / "python", "-c", "import torchaudio"], check=False, capture_output=True)
    if can_load.returncode:
        (stand_in / "torchaudio.py").touch()
    return {
        **os.environ,
        "PATH": f"{(factory / 'bin').absolute()}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(stand_in),
        "LLAMA_FACTORY_PATH": str(work),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def run(script: Path, values: Mapping[str, str], variables: Mapping[str, str]) -> None:
    """Train with `train.sh`.

    Raises:
        SystemExit: it failed.
    """
    command = [str(script), *(f"{name}={value}" for name, value in values.items())]
    done = subprocess.run(
        command, env=dict(variables), check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\n{' '.join(command)} ended with exit code {done.returncode}")


def train_model(script: Path, base: Path, data: Path, work: Path, variables: Mapping[str, str]) -> Path:
    """Route 1: the LoKI model, its rows put back."""
    positions, created, trained = work / "positions.json", work / "created", work / "trained"
    write_json(positions, POSITIONS)
    create_loki_model(model_name=str(base), target_pos_path=positions, save_dir=created, torch_dtype="auto")
    values = {**OVERRIDES, "model_name_or_path": str(created), "output_dir": str(trained), "dataset_dir": str(data)}
    run(script, values, variables)
    restore_loki_model(positions, trained, str(base), work / "result")
    return trained


def train_adapter(script: Path, base: Path, data: Path, work: Path, variables: Mapping[str, str]) -> Path:
    """Route 2: an untrained adapter, merged."""
    untrained, trained = work / "untrained", work / "trained"
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LokiConfig(positions=POSITIONS, task_type="CAUSAL_LM")).save_pretrained(untrained)
    values = {**OVERRIDES, "model_name_or_path": str(base), "adapter_name_or_path": str(untrained)}
    run(script, {**values, "output_dir": str(trained), "dataset_dir": str(data)}, variables)
    merge(str(base), trained, work / "result")
    return trained


RUNS = {
    "toolace-model": (train_model, "ToolACE", LlamaConfig),
    "toolace-adapter": (train_adapter, "ToolACE", LlamaConfig),
    "reranker-model": (train_model, "Reranker", Qwen2Config),
    "reranker-adapter": (train_adapter, "Reranker", Qwen2Config),
}


def main() -> None:
    """Run, compare, and say so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factory", type=Path, required=True, help="virtual environment with LlamaFactory and loki")
    parser.add_argument("--work-dir", type=Path, help="folder to keep what is written; it must not exist yet")
    parser.add_argument("--runs", default=",".join(RUNS))
    options = parser.parse_args()
    chosen = options.runs.split(",")
    if unknown := set(chosen) - set(RUNS):
        parser.error(f"unknown runs {', '.join(sorted(unknown))}: choose from {', '.join(RUNS)}")
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work_dir or Path(temporary) / "work").absolute()
        work.mkdir()
        variables = environment(options.factory, work)
        for name in chosen:
            route, recipe, config_class = RUNS[name]
            folder = work / name
            folder.mkdir()
            base, data = make_base(config_class, folder / "base"), write_data(RECIPES / recipe, folder / "data")
            trained = route(RECIPES / recipe / "train.sh", base, data, folder, variables)
            losses = require_trained(trained)
            num_changed = require_only_rows_changed(base, folder / "result")
            shown = ", ".join(f"{loss:.3f}" for loss in losses)
            print(f"{name}: losses {shown}; {num_changed} selected rows changed, nothing else by a bit", flush=True)


if __name__ == "__main__":
    main()
