"""The same promises on the real model: SmolLM2-135M-Instruct out of its package (`make test-real`)."""

import json
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from peft import get_peft_model
from safetensors.torch import load_file
from warm import WarmProcess

from loki import LokiConfig, attribute
from loki.embedded import EMBEDDED_NAME, embedded_model_directory
from loki.evaluation.knowledge import score_questions
from loki.evaluation.statistics import mean, share
from loki.implanting.merge import merge
from loki.models import load_model, load_tokenizer
from loki.prompts.function_calls import make_examples
from loki.prompts.questions import load_probe
from loki.prompts.render import encode_chat, render_chat, single_choice_prompt
from loki.rows import RowSelection
from loki.training.checkpoints import last_whole_checkpoint
from loki.training.examples import load_examples
from loki.training.settings import TrainSettings
from loki.training.sft import load_record, train

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(EMBEDDED_NAME)


def fresh_model():
    return load_model(EMBEDDED_NAME, dtype="float32", device="cpu")


def some_rows() -> RowSelection:
    return RowSelection.from_lists([[layer, 300 + layer, 575] for layer in range(30)])


def test_the_embedded_model_speaks(tokenizer):
    ids = encode_chat(tokenizer, [{"role": "user", "content": "What is the capital of France?"}])[None]
    reply = fresh_model().generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert "Paris" in tokenizer.decode(reply[0, ids.shape[1] :])


def test_branch_equals_recompute(tokenizer):
    """Within 1e-4 per prompt and layer, ‖a−b‖/‖b‖, in float32: the bound that the design sets."""
    model = fresh_model()
    # A short prompt: recomputing the whole model for every layer and step is what takes so long.
    ids = encode_chat(tokenizer, [{"role": "user", "content": "What is the capital of France?"}])[None]
    fast, plain = (attribute(model, ids, steps=2, engine=engine) for engine in ("branch", "recompute"))
    assert torch.equal(fast.target_ids, plain.target_ids)
    difference = (fast.scores - plain.scores).norm(dim=-1) / plain.scores.norm(dim=-1)
    assert difference.shape == (1, 30)
    assert difference.max() < 1e-4


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-5), (torch.float64, 1e-7)])
def test_a_batch_in_groups_changes_scores_by_rounding_only(tokenizer, dtype, bound):
    """In float64 not at all; in float32 by what the model's own rounding does to the target's logit (docs/kva.md)."""
    prompts = [
        encode_chat(tokenizer, [{"role": "user", "content": single_choice_prompt(question)}])
        for question in load_probe("analysis")[:2]
    ]
    longest = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(ids_T, (0, longest - len(ids_T)), value=7) for ids_T in prompts])
    mask = torch.stack([torch.arange(longest) < len(ids_T) for ids_T in prompts])
    model = fresh_model().to(dtype)
    alone = torch.cat([attribute(model, ids_T[None], steps=3).scores for ids_T in prompts])
    together = attribute(model, ids, mask, steps=3, batch_size=2, max_branches=50).scores
    assert ((together - alone).norm(dim=-1) / alone.norm(dim=-1)).max() < bound


def test_completeness_gap_shrinks_as_steps_grow(tokenizer):
    model = fresh_model()
    question = load_probe("analysis")[1]
    ids = encode_chat(tokenizer, [{"role": "user", "content": single_choice_prompt(question)}])[None]
    gaps = [
        float(
            attribute(model, ids, rule="riemann_middle", steps=steps, completeness=True).completeness_gap.abs().mean()
        )
        for steps in (1, 4, 16)
    ]
    assert all(later < earlier for earlier, later in pairwise(gaps))


def test_base_answers_the_evaluation_half_well_above_chance(tokenizer):
    questions = load_probe("evaluation")[::2]
    scores, _ = score_questions(fresh_model(), tokenizer, questions)
    accuracy, log_probability = share([s.right for s in scores]), mean([s.log_probability for s in scores])
    assert accuracy.value >= 40
    assert accuracy.count == log_probability.count == len(questions) == 57


def test_a_trained_and_merged_model_differs_in_the_selected_rows_only(tmp_path, tokenizer):
    """Train, save, merge on disk; load it where this package cannot be imported, and compare with the adapter."""
    settings = TrainSettings(learning_rate=5e-3, steps=3, batch_size=2, log_every=1)
    examples = load_examples("function-calls", count=6, seed=0)
    trained = fresh_model()
    record = train(trained, tokenizer, some_rows(), examples, settings, tmp_path / "adapter")
    assert record["log"][-1]["loss"] < record["log"][0]["loss"]
    report = merge(EMBEDDED_NAME, tmp_path / "adapter", tmp_path / "merged")
    assert report.num_changed == record["num_trainable"] == 90 * 1536

    before = load_file(embedded_model_directory() / "model.safetensors")
    after = load_file(tmp_path / "merged/model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        differs = (tensor != after[name]).reshape(len(tensor), -1).any(dim=1).nonzero().flatten().tolist()
        rows = some_rows().rows[int(name.split(".")[2])] if "down_proj" in name else ()
        assert differs == list(rows), name

    prompt = render_chat(tokenizer, make_examples("test", 1, 0)[0].messages)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = get_peft_model(fresh_model(), LokiConfig(positions=some_rows()))
        expected.load_adapter(tmp_path / "adapter", "trained")
        expected.set_adapter("trained")
        logits = expected(input_ids=ids).logits[0, -1]
    code = (
        "import sys, json, torch; sys.modules['loki'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'merged')!r})\n"
        f"ids = torch.tensor({ids.tolist()})\n"
        "print(json.dumps(model(input_ids=ids).logits[0, -1].tolist()))"
    )
    plain = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = torch.tensor(json.loads(plain.stdout.splitlines()[-1]))
    # float32 rounding through 30 layers: logits are around 10.
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-3)


def test_a_training_with_everything_on_is_killed_and_goes_on(tmp_path):
    """Packs, a budget and TensorBoard; the adapter, the history and the curves of one that was not killed."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    budget = {"text": "probe", "max_loss_rise": 1e-4, "every": 2, "action": "lower", "probe_accuracy": False}
    values = {
        "model": EMBEDDED_NAME,
        "positions": str(Path(__file__).parents[1] / "kva_result/pos_json/SmolLM2-135M-Instruct/10.json"),
        **{"examples": 12, "learning_rate": 5e-3, "steps": 5, "batch_size": 1, "packing": True, "max_length": 128},
        **{"save_every": 2, "log_every": 1, "report_to": "tensorboard", "dtype": "float32", "device": "cpu"},
        "budget": {**budget, "max_tokens": 60},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values))

    def start(name):
        return WarmProcess("-m", "loki", "train", "--output-dir", tmp_path / name, tmp_path / "train.yaml")

    with start("parts") as killed, start("whole") as uninterrupted:
        while killed.poll() is None and not last_whole_checkpoint(tmp_path / "parts.unfinished", remove_torn=False):
            time.sleep(0.05)
        killed.kill()
        assert killed.wait() == -signal.SIGKILL
        assert not (tmp_path / "parts").exists()
        with start("parts") as continued:
            assert continued.wait() == 0, continued.communicate()
        assert uninterrupted.wait() == 0, uninterrupted.communicate()

    parts, whole = (load_record(tmp_path / name) for name in ("parts", "whole"))
    assert {**parts, "train_loss": pytest.approx(parts["train_loss"], rel=1e-6)} == whole
    assert [row["step"] for row in whole["budget"]["history"]] == [0, 2, 4, 5]
    assert whole["budget"]["spent"]
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("parts", "whole"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    events = EventAccumulator(str(tmp_path / "parts/tensorboard")).Reload()
    for name, rows in (("loss", whole["log"]), ("forgetting/kl", whole["budget"]["history"])):
        shown = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert shown == [(row["step"], pytest.approx(row[name.split("/")[-1]], rel=1e-6)) for row in rows], name


def test_in_bfloat16_no_unselected_row_differs(tokenizer):
    before = load_model(EMBEDDED_NAME, dtype="bfloat16", device="cpu")
    wrapped = get_peft_model(
        load_model(EMBEDDED_NAME, dtype="bfloat16", device="cpu"), LokiConfig(positions=some_rows(), init_weights=False)
    )
    after = dict(wrapped.merge_and_unload().named_parameters())
    for name, parameter in before.named_parameters():
        differs = (parameter != after[name]).reshape(len(parameter), -1).any(dim=1).nonzero().flatten().tolist()
        rows = some_rows().rows[int(name.split(".")[2])] if "down_proj" in name else ()
        assert set(differs) <= set(rows), name
        assert bool(differs) == bool(rows), name
