"""Runs of a study on a tiny model, with invented data."""

import gzip
import json
import math
import shutil

import pytest
import torch
from families import FAMILY_MODELS
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import NUM_COLUMNS, NUM_LAYERS, NUM_ROWS, make_tokenizer

from loki.architecture import shape_of
from loki.errors import ArtefactError, InputError
from loki.evaluation.completions import completion_losses
from loki.log.reader import AttributionLog
from loki.models import load_model, load_tokenizer
from loki.study import conduct, tasks, training
from loki.study.analyses import load_selections
from loki.study.collect import collect
from loki.study.conduct import Study
from loki.study.costs import StepClock
from loki.study.finished import held_out_loss, scaled_scores_of, scores_of
from loki.study.forecast import forecast
from loki.study.plan import BASE, Run
from loki.study.run import carry_out
from loki.study.settings import AnalysisSection, DamageSection, DialSection, PreserveSection, load_study, smoke
from loki.study.training import Workplace
from loki.training.callbacks import SaveInTime
from loki.training.trainer import CompletionTrainer

LORA_TARGETS = 7


def request(number, *, call=True):
    name = f"find_{number}"
    return {
        "id": f"simple_{number}",
        "category": "simple" if call else "irrelevance",
        "functions": [{"name": name, "description": "Find.", "parameters": {"type": "dict", "properties": {}}}],
        "messages": [{"role": "user", "content": f"find {number}"}],
        "answer": f"[{name}()]" if call else None,
        "ground_truth": [{name: {}}] if call else None,
    }


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


@pytest.fixture
def study(write_study, model_dir, tmp_path):
    """Settings of a study that the tiny model can go through."""
    write_rows(tmp_path / "toolcall/bfcl_train.jsonl.gz", [request(number) for number in range(12)])
    write_rows(
        tmp_path / "toolcall/bfcl_test.jsonl.gz", [request(number, call=number != 31) for number in range(30, 34)]
    )
    texts = [{"id": f"t{number}", "text": f"text number {number} has words" + " and more" * 10} for number in range(20)]
    write_rows(tmp_path / "text/c4_demo.jsonl", texts)
    rows = {"strategy": "random", "quota": 10}
    corda = {"kind": "lora", "label": "CorDA", "rank": 2, "variant": "corda", "calibration": "mine"}
    methods = {
        "full": {"kind": "full", "label": "full", "learning_rates": [1e-3]},
        "lora": {"kind": "lora", "label": "LoRA", "rank": 2, "learning_rates": [1e-2]},
        "pissa": {"kind": "lora", "label": "PiSSA", "rank": 2, "variant": "pissa", "learning_rates": [1e-2]},
        "rows": {"kind": "loki", "label": "rows", "rows": rows, "learning_rates": [1e-2]},
        "dora": {"kind": "lora", "label": "DoRA", "rank": 2, "variant": "dora", "learning_rates": [1e-2]},
        "rslora": {"kind": "lora", "label": "rsLoRA", "rank": 2, "variant": "rslora", "learning_rates": [1e-2]},
        "corda": {**corda, "learning_rates": [1e-2]},
        "shira": {"kind": "shira", "label": "SHiRA", "rank": 2, "learning_rates": [1e-2]},
        "miss": {"kind": "miss", "label": "MiSS", "rank": 2, "targets": "ffn", "learning_rates": [1e-2]},
        "osf": {"kind": "osf", "label": "OSF", "learning_rates": [1e-2]},
        "star": {"kind": "loki", "label": "rows", "rank": 1, "rows": rows, "learning_rates": [1e-2]},
        "zeroed": {"kind": "suppress", "label": "zeroed", "rows": rows},
        "elected": {"kind": "loki", "label": "elected", "rows": {"quota": 10, "log": "mine"}, "learning_rates": [1e-2]},
    }

    def make(**changes):
        return load_study(
            write_study(
                model=str(model_dir),
                dtype="float32",
                task={"examples": 8, "held_out": 3, "requests": 4, "max_tokens": 600, "max_new_tokens": 4},
                train={"steps": 3, "screen_steps": 1, "batch_size": 2},
                evaluate={"texts": {"c4": 60}},
                analyses={"mine": {"corpora": ["c4"], "num_prompts": 2, "steps": 2}},
                methods=methods,
                **changes,
            )
        )

    return make()


@pytest.fixture
def base_loss(study, tmp_path):
    return held_out_loss(done(study, tmp_path, "base", "base"))


def done(study, tmp_path, method, phase="whole"):
    rates = study.methods[method].learning_rates if method != "base" else ()
    return carry_out(Workplace(study, tmp_path), Run(method, phase, *rates))


def test_the_base_is_only_scored(study, tmp_path):
    scores = scores_of(done(study, tmp_path, "base", "base"))
    assert list(scores) == [
        "held_out",
        "c4_loss",
        "bfcl_calls",
        "bfcl",
        "bfcl_single",
        "bfcl_irrelevance",
    ]
    assert len(scores["held_out"].ids) == 3
    assert len(scores["bfcl_calls"].ids) == 3
    # A random model is far from these texts, byte by byte.
    assert scores["c4_loss"].mean.value > math.log(20)


@pytest.mark.parametrize(
    ("method", "num_trainable"),
    [
        ("full", None),
        ("rows", NUM_LAYERS * 2 * NUM_COLUMNS),
        ("star", NUM_LAYERS * (2 + NUM_COLUMNS)),
    ],
)
def test_a_trained_model_has_learned_and_moved(study, tmp_path, model_dir, method, num_trainable):
    before, after = done(study, tmp_path, "base", "base"), done(study, tmp_path, method)
    if num_trainable is None:
        num_trainable = sum(p.numel() for p in load_model(str(model_dir), dtype="float32").parameters())
    figures = after.figures
    assert figures["num_trainable"] == num_trainable
    assert figures["saved_bytes"] >= 4 * num_trainable
    assert figures["seconds_per_step"] > 0
    assert figures["train_seconds"] >= 0
    assert figures["peak_memory_mib"] > 50
    assert held_out_loss(after) < held_out_loss(before)
    kl = scores_of(after)["c4_kl"].mean.value
    assert kl > 0


def test_what_changes_the_base_itself_is_compared_with_the_first_base(study, tmp_path):
    """PiSSA takes its adapter's beginning out of the base: without the adapter that is another model."""
    found = scores_of(done(study, tmp_path, "pissa"))
    plain = scores_of(done(study, tmp_path, "lora"))
    assert 0 < found["c4_kl"].mean.value < 3
    assert 0 < plain["c4_kl"].mean.value < 3


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # SHiRA's
@pytest.mark.parametrize("method", ["dora", "rslora", "corda", "shira", "miss", "osf"])
def test_rivals_learn_and_move_too(study, tmp_path, base_loss, method):
    result = done(study, tmp_path, method)
    assert held_out_loss(result) < base_loss
    assert scores_of(result)["c4_kl"].mean.value > 0
    full = sum(p.numel() for p in load_model(study.model, dtype="float32").parameters())
    assert 0 < result.figures["num_trainable"] < full


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # SHiRA's
@pytest.mark.parametrize("family", ["gpt_neox", "phi3-longrope", "gpt2"])
def test_rivals_find_their_layers_in_any_family(study, tmp_path, family):
    """Whatever these are called: fused or not, `nn.Linear` or `Conv1D`."""
    model = FAMILY_MODELS[family].build(vocab_size=260, max_position_embeddings=700)
    model.save_pretrained(tmp_path / family)
    make_tokenizer().save_pretrained(tmp_path / family)
    # LoRA alone knows `Conv1D`.
    names = ("lora",) if family == "gpt2" else ("lora", "shira", "miss", "osf")
    methods = {name: study.methods[name] for name in names}
    work = Study(study.model_copy(update={"model": str(tmp_path / family), "methods": methods}), tmp_path / "out")
    work.conduct()
    assert not work.failed
    found = {run.method: result for run, result in work.results.items()}
    assert set(found) == {"base", *methods}
    for name in methods:
        assert scores_of(found[name])["c4_kl"].mean.value > 0
        assert held_out_loss(found[name]) < held_out_loss(found["base"])


def test_a_whole_run_is_a_front(study, tmp_path, base_loss):
    """Half the change lies between the base and the whole, and no benchmark is asked again."""
    evaluate = study.evaluate.model_copy(update={"scales": (0.5,), "answers_dtype": "bfloat16"})
    scaled = study.model_copy(update={"evaluate": evaluate})
    result = done(scaled, tmp_path, "full")
    (half,) = scaled_scores_of(result).values()
    assert list(half) == ["held_out", "c4_loss", "c4_kl", "bfcl_calls"]
    assert held_out_loss(result) < half["held_out"].mean.value < base_loss
    whole, plain = scores_of(result), scores_of(done(study, tmp_path, "full"))
    assert 0 < half["c4_kl"].mean.value < whole["c4_kl"].mean.value
    # Texts are read in the dtype that was trained, whatever the one for answers.
    assert whole["c4_kl"] == plain["c4_kl"]
    assert "scaled" not in done(scaled, tmp_path, "full", "screen").figures
    assert "scaled" not in done(scaled, tmp_path, "zeroed", "suppress").figures


def test_parts_of_a_change_may_be_dialled(study, tmp_path):
    """The whole run is the same; the part that is scored is another."""
    evaluate = study.evaluate.model_copy(update={"scales": (0.5,)})
    plain = study.model_copy(update={"evaluate": evaluate})
    section = DialSection(by="rows", examples=2, text_tokens=60)
    rows = study.methods["rows"].model_copy(update={"dial": section})
    dialled = plain.model_copy(update={"methods": {"rows": rows}})
    one, other = done(plain, tmp_path, "rows"), done(dialled, tmp_path, "rows")
    assert scores_of(one) == scores_of(other)
    (scaled,), half = scaled_scores_of(one).values(), scaled_scores_of(other)[0.5]
    assert list(scaled) == list(half)
    assert half["c4_kl"] != scaled["c4_kl"]
    assert 0 < half["c4_kl"].mean.value < scores_of(one)["c4_kl"].mean.value


@pytest.mark.parametrize(
    ("method", "phase", "is_kept"), [("rows", "whole", True), ("rows", "screen", False), ("full", "whole", False)]
)
def test_adapters_of_whole_runs_are_kept(study, tmp_path, method, phase, is_kept):
    kept = tmp_path / "adapters"
    run = Run(method, phase, *study.methods[method].learning_rates)
    (kept / run.id).mkdir(parents=True)  # as an interrupted run leaves it
    (kept / run.id / "torn").touch()
    found = scores_of(carry_out(Workplace(study, tmp_path, adapters=kept), run))
    if not is_kept:
        assert [path.name for path in (kept / run.id).iterdir()] == ["torn"]
        return
    assert not (kept / run.id / "torn").exists()
    model = PeftModel.from_pretrained(load_model(study.model, dtype="float32"), kept / run.id).merge_and_unload()
    task = tasks.load_task(study.task, study.data_dir, load_tokenizer(study.model))
    losses = completion_losses(model, load_tokenizer(study.model), task.held_out)
    assert tuple(losses) == found["held_out"].scores


def with_scales(study, *scales, **methods):
    changes = {"evaluate": study.evaluate.model_copy(update={"scales": scales})}
    return study.model_copy(update=changes | ({"methods": methods} if methods else {}))


@pytest.mark.parametrize("method", ["lora", "rows", "dialled"])
def test_further_parts_come_from_the_adapter_that_was_kept(study, tmp_path, method, monkeypatch):
    """What is added is what one run with all parts has; nothing is trained, and the base stays."""
    dial = DialSection(by="rows", examples=2, text_tokens=60)
    dialled = study.methods["rows"].model_copy(update={"dial": dial})
    methods = {"dialled": dialled} if method == "dialled" else {method: study.methods[method]}
    some, more = with_scales(study, 0.5, **methods), with_scales(study, 0.25, 0.5, 0.75, **methods)
    Study(some, tmp_path / "out", keep_adapters=True).conduct()
    later = Study(more, tmp_path / "out")
    (run,) = later.next_runs()
    # Two of four points are left, of a run whose training is done.
    left = forecast(later)
    assert left.hours_left == pytest.approx(left.evaluation_seconds * 2 / 4 / 3600)
    monkeypatch.setattr(conduct, "carry_out", None)
    later.conduct()
    assert later.failed == {}
    at_once = carry_out(Workplace(more, tmp_path / "out/analyses"), run)
    found = later.results[run]
    assert found.settings == at_once.settings
    assert scaled_scores_of(found) == scaled_scores_of(at_once)
    assert found.figures["scores"] == at_once.figures["scores"]
    assert Study(more, tmp_path / "out").next_runs() == []
    # Fewer parts than there are is another study.
    with pytest.raises(ArtefactError, match="was made under other settings"):
        Study(some, tmp_path / "out")


def test_an_adapter_of_another_training_adds_nothing(study, tmp_path):
    some, more = (with_scales(study, *scales, rows=study.methods["rows"]) for scales in ((0.5,), (0.25, 0.5)))
    first = Study(some, tmp_path / "out", keep_adapters=True)
    first.conduct()
    (run,) = (run for run in first.results if run.phase == "whole")
    weights = tmp_path / "out/adapters" / run.id / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    before = first.path_of(run).read_text()
    later = Study(more, tmp_path / "out")
    later.conduct()
    assert later.failed[run].startswith(f"the adapter that {run.id} left has a held-out loss of ")
    assert first.path_of(run).read_text() == before
    shutil.rmtree(weights.parent)
    with pytest.raises(ArtefactError, match="was made under other settings"):
        Study(more, tmp_path / "out")


def test_mixed_precision_is_in_effect(study, tmp_path):
    train = study.train.model_copy(update={"mixed_precision": True})
    mixed = scores_of(done(study.model_copy(update={"train": train}), tmp_path, "rows"))["held_out"]
    plain = scores_of(done(study, tmp_path, "rows"))["held_out"]
    assert mixed != plain
    assert mixed.scores == pytest.approx(plain.scores, rel=0.05)


@pytest.mark.parametrize("method", ["full", "lora", "rows"])
def test_the_trainer_leaves_nothing_on_the_model_that_is_scored(study, tmp_path, method, monkeypatch):
    """Autocast, for one, would round what is measured: trained at a rate of nearly nothing, nothing has moved."""
    train = study.train.model_copy(update={"mixed_precision": True})
    one = study.methods[method].model_copy(update={"learning_rates": (1e-12,)})
    still = study.model_copy(update={"train": train, "methods": {method: one}})
    scores = scores_of(done(still, tmp_path, method))
    assert scores["c4_kl"].mean.value < 1e-9
    assert scores["held_out"] == scores_of(done(study, tmp_path, "base", "base"))["held_out"]


def test_answers_may_be_given_in_another_dtype(study, tmp_path, monkeypatch):
    seen = []
    answer = tasks.answer_bfcl

    def watch(model, *args, **kwargs):
        seen.append((model.dtype, kwargs["batch_size"]))
        return answer(model, *args, **kwargs)

    monkeypatch.setattr(tasks, "answer_bfcl", watch)
    evaluate = study.evaluate.model_copy(update={"answers_dtype": "bfloat16", "reply_batch_size": 3})
    done(study.model_copy(update={"evaluate": evaluate}), tmp_path, "base", "base")
    done(study, tmp_path, "base", "base")
    assert seen == [(torch.bfloat16, 3), (torch.float32, 16)]


def test_rows_of_least_damage_are_trained(study, tmp_path):
    """The log holds damage, and the rows are those with the least of it in most texts."""
    analyses = {"harm": AnalysisSection(corpora=("c4",), num_prompts=4, score="damage", batch_size=1)}
    rows = study.methods["elected"].rows.model_copy(update={"log": "harm"})
    method = study.methods["elected"].model_copy(update={"rows": rows})
    harm = study.model_copy(update={"analyses": analyses, "methods": {"harm": method}})
    work = Study(harm, tmp_path / "out")
    work.conduct()
    assert not work.failed
    with AttributionLog(tmp_path / "out/analyses/harm.h5") as log:
        assert log.header.settings["score"] == "damage"
        assert min(float(scores_NLD.min()) for scores_NLD in log.chunks()) >= 0


@pytest.mark.parametrize("log", [None, "mine"])
def test_rows_of_attention_are_trained(study, tmp_path, log):
    """Drawn, or elected by an attribution of the same module."""
    analyses = {"mine": study.analyses["mine"].model_copy(update={"site_module": "o_proj"})}
    chosen = {"strategy": "random" if log is None else "layer_balanced", "log": log, "site_module": "o_proj"}
    method = study.methods["rows"].model_copy(update={"rows": study.methods["rows"].rows.model_copy(update=chosen)})
    work = Study(study.model_copy(update={"analyses": analyses, "methods": {"rows": method}}), tmp_path / "out")
    work.keep_adapters = True
    work.conduct()
    assert not work.failed
    (run,) = (run for run in work.results if run.phase == "whole")
    figures = work.results[run].figures
    # Two rows of each layer, as wide as the heads together.
    assert figures["num_trainable"] == NUM_LAYERS * 2 * NUM_ROWS
    saved = load_file(tmp_path / "out/adapters" / run.id / "adapter_model.safetensors")
    assert len(saved) >= NUM_LAYERS
    assert all(".self_attn.o_proj." in name for name in saved)
    assert work.results[run].settings["method"]["rows"]["site_module"] == "o_proj"
    if log is not None:
        with AttributionLog(tmp_path / "out/analyses/mine.h5") as found:
            assert found.header.settings["site_module"] == "o_proj"


def test_rows_of_attention_at_zero(study, tmp_path):
    """With all of them at zero, nothing comes from attention."""
    rows = study.methods["zeroed"].rows.model_copy(update={"quota": 100, "site_module": "o_proj"})
    method = study.methods["zeroed"].model_copy(update={"rows": rows})
    result = done(study.model_copy(update={"methods": {"zeroed": method}}), tmp_path, "zeroed", "suppress")
    assert result.figures["num_suppressed_rows"] == NUM_LAYERS * NUM_ROWS
    model, tokenizer = load_model(study.model, dtype="float32"), load_tokenizer(study.model)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    losses = completion_losses(model, tokenizer, tasks.load_task(study.task, study.data_dir, tokenizer).held_out)
    assert tuple(losses) == scores_of(result)["held_out"].scores


def both_blocks(study, name, **changes):
    """The study with one method alone, whose rows are those of both blocks: some by attribution, others at random."""
    elected = study.methods["elected"].rows.model_copy(update={"quota": 20})
    drawn = study.methods["rows"].rows.model_copy(update={"site_module": "o_proj"})
    method = study.methods[name].model_copy(update={"rows": elected, "more_rows": drawn, **changes})
    return study.model_copy(update={"methods": {name: method}})


@pytest.mark.parametrize(("rank", "by"), [(0, "rows"), (1, "layers")])
def test_rows_of_both_blocks_are_trained(study, tmp_path, rank, by):
    """And parts of their change are dialled, and the whole is what is scored."""
    evaluate = study.evaluate.model_copy(update={"scales": (0.5,)})
    both = both_blocks(study, "rows", rank=rank, dial=DialSection(by=by, examples=2, text_tokens=60))
    work = Study(both.model_copy(update={"evaluate": evaluate}), tmp_path / "out", keep_adapters=True)
    work.conduct()
    assert not work.failed
    (run,) = (run for run in work.results if run.phase == "whole")
    figures = work.results[run].figures
    # Four and two rows of each layer.
    by_layer = 4 * NUM_COLUMNS + 2 * NUM_ROWS if rank == 0 else (4 + NUM_COLUMNS) + (2 + NUM_ROWS)
    assert figures["num_trainable"] == NUM_LAYERS * by_layer
    adapter = tmp_path / "out/adapters" / run.id
    saved = load_file(adapter / "adapter_model.safetensors")
    assert {name.split(".layers.")[1][2:].rsplit(".", 1)[0] for name in saved} == {"mlp.down_proj", "self_attn.o_proj"}
    model = PeftModel.from_pretrained(load_model(study.model, dtype="float32"), str(adapter)).merge_and_unload()
    tokenizer = load_tokenizer(study.model)
    losses = completion_losses(model, tokenizer, tasks.load_task(study.task, study.data_dir, tokenizer).held_out)
    assert scores_of(work.results[run])["held_out"].scores == pytest.approx(losses, rel=1e-5)
    assert list(scaled_scores_of(work.results[run])) == [0.5]
    assert work.results[run].settings["method"]["more_rows"]["site_module"] == "o_proj"
    chosen = load_selections(both.methods["rows"], both, tmp_path / "out/analyses", shape_of(model), 0)
    blocks = {"down_proj": "mlp", "o_proj": "self_attn"}
    expected = {
        f"model.layers.{layer}.{blocks[module]}.{module}": rows
        for module, selection in chosen.items()
        for layer, rows in enumerate(selection.as_lists())
    }
    assert json.loads((adapter / "adapter_config.json").read_text())["positions"] == expected


def test_rows_of_both_blocks_at_zero(study, tmp_path):
    """All of both, so that every block's output is nothing."""
    everything = {
        key: study.methods["rows"].rows.model_copy(update=change)
        for key, change in {"rows": {"quota": 100}, "more_rows": {"quota": 100, "site_module": "o_proj"}}.items()
    }
    zeroed = study.methods["zeroed"].model_copy(update=everything)
    result = done(study.model_copy(update={"methods": {"zeroed": zeroed}}), tmp_path, "zeroed", "suppress")
    assert result.figures["num_suppressed_rows"] == 2 * NUM_LAYERS * NUM_ROWS
    model, tokenizer = load_model(study.model, dtype="float32"), load_tokenizer(study.model)
    model.model.layers = torch.nn.ModuleList()
    model.config.num_hidden_layers = 0
    losses = completion_losses(model, tokenizer, tasks.load_task(study.task, study.data_dir, tokenizer).held_out)
    assert scores_of(result)["held_out"].scores == pytest.approx(losses, rel=1e-6)


def test_random_rows_of_both_blocks_are_others(study, tmp_path):
    quota = {"strategy": "random", "quota": 50}
    rows = study.methods["rows"].rows.model_copy(update=quota)
    more = rows.model_copy(update={"site_module": "o_proj"})
    method = study.methods["rows"].model_copy(update={"rows": rows, "more_rows": more})
    shape = shape_of(load_model(study.model, dtype="float32"))
    chosen = [load_selections(method, study, tmp_path, shape, seed) for seed in (0, 1)]
    alone = load_selections(study.methods["rows"].model_copy(update={"rows": rows}), study, tmp_path, shape, 0)
    assert alone == {"down_proj": chosen[0]["down_proj"]}
    assert len({selection.rows for by_module in chosen for selection in by_module.values()}) == 4


def test_the_forecast_of_rows_of_both_blocks_needs_no_log(study, tmp_path):
    assert forecast(Study(both_blocks(study, "elected"), tmp_path / "out")).seconds_per_step > 0


@pytest.mark.parametrize("targets", ["all", "ffn", "attention", "outputs"])
def test_an_adapter_on_some_of_the_layers(study, tmp_path, targets):
    blocks = {"ffn": ("mlp.",), "attention": ("self_attn.",), "outputs": ("down_proj", "o_proj")}
    method = study.methods["lora"].model_copy(update={"targets": targets})
    result = done(study.model_copy(update={"methods": {"lora": method}}), tmp_path, "lora", "screen")
    model = load_model(study.model, dtype="float32")
    linear = [(name, module) for name, module in model.model.layers.named_modules() if hasattr(module, "in_features")]
    sizes = [
        method.rank * (module.in_features + module.out_features)
        for name, module in linear
        if any(part in name for part in blocks.get(targets, ("",)))
    ]
    assert len(sizes) == NUM_LAYERS * {"all": 7, "ffn": 3, "attention": 4, "outputs": 2}[targets]
    assert result.figures["num_trainable"] == sum(sizes)


@pytest.mark.parametrize("damage", [{"anchor": 1e6}, {"rates": True}])
def test_rows_can_be_trained_in_view_of_their_damage(study, tmp_path, damage):
    """A heavy anchor keeps the rows where they are; rates of their own change what is learned."""
    analyses = {"harm": AnalysisSection(corpora=("c4",), num_prompts=4, score="damage", batch_size=1)}
    minded = study.methods["rows"].model_copy(update={"damage": DamageSection(log="harm", **damage)})
    both = study.model_copy(update={"analyses": analyses, "methods": {"plain": study.methods["rows"], "rows": minded}})
    work = Study(both, tmp_path / "out")
    work.conduct()
    assert not work.failed
    found = {run.method: scores_of(result) for run, result in work.results.items()}
    if "anchor" in damage:
        assert found["rows"]["c4_kl"].mean.value < 0.5 * found["plain"]["c4_kl"].mean.value
    assert found["rows"]["held_out"] != found["plain"]["held_out"]
    (identity,) = (result.settings for run, result in work.results.items() if run.method == "rows")
    assert list(identity["analyses"]) == ["harm"]


def test_texts_can_be_preserved(study, tmp_path):
    """With the anchor the model moves less, on texts that were not read for it."""
    anchor = PreserveSection(texts="c4", weight=50.0)
    method = study.methods["rows"].model_copy(update={"preserve": anchor})
    kept = study.model_copy(update={"methods": {"rows": method}})
    with_anchor, without = done(kept, tmp_path, "rows"), done(study, tmp_path, "rows")
    assert 0 < scores_of(with_anchor)["c4_kl"].mean.value < 0.8 * scores_of(without)["c4_kl"].mean.value
    assert with_anchor.settings["method"]["preserve"] == {"weight": 50.0}
    assert "preserve" not in without.settings["method"]


def test_a_short_run_is_scored_on_held_out_examples_only(study, tmp_path):
    result = done(study, tmp_path, "rows", "screen")
    assert list(scores_of(result)) == ["held_out"]


def test_the_same_run_gives_the_same_figures(study, tmp_path):
    first, second = (scores_of(done(study, tmp_path, "rows")) for _ in range(2))
    assert first == second
    rate = study.methods["rows"].learning_rates[0]
    other = carry_out(Workplace(study, tmp_path), Run("rows", "whole", rate, seed=1))
    assert scores_of(other)["held_out"] != first["held_out"]


class Pulled(SaveInTime):
    """The plug is pulled as soon as a checkpoint is written."""

    def on_save(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def interrupted(settings, folder, monkeypatch):
    """A study whose last run was cut off at step 10; returns that run."""
    with monkeypatch.context() as pulled:
        pulled.setattr(training, "SaveInTime", Pulled)
        with pytest.raises(KeyboardInterrupt):
            Study(settings, folder, save_minutes=1e-9).conduct()
    (run,) = Study(settings, folder).next_runs()
    assert [path.name for path in checkpoints(folder, run)] == ["checkpoint-10"]
    return run


def checkpoints(folder, run):
    return list((folder / "unfinished" / run.id).glob("checkpoint-*"))


def with_steps(study, method, *, steps=14, **changes):
    """One method alone; a loss is logged at step 10."""
    train = study.train.model_copy(update={"steps": steps, "mixed_precision": True})
    return study.model_copy(update={"train": train, "methods": {"one": method}, **changes})


GUARDED = {
    "kept": {"preserve": PreserveSection(texts="c4", every=3)},
    "rates": {"damage": DamageSection(log="harm", rates=True)},
    "anchor": {"damage": DamageSection(log="harm", anchor=0.1)},
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # SHiRA's
@pytest.mark.parametrize(
    "method",
    ["full", "lora", "pissa", "rows", "dora", "rslora", "corda", "shira", "miss", "osf", "star", *GUARDED],
)
def test_an_interrupted_training_goes_on_to_the_same_end(study, tmp_path, method, monkeypatch):
    guarded = {name: study.methods["rows"].model_copy(update=guard) for name, guard in GUARDED.items()}
    harm = AnalysisSection(corpora=("c4",), num_prompts=4, score="damage", batch_size=1)
    long = with_steps(study, (study.methods | guarded)[method], analyses={**study.analyses, "harm": harm})
    straight, folder = Study(long, tmp_path / "straight"), tmp_path / "out"
    straight.conduct()
    assert not straight.failed
    run = interrupted(long, folder, monkeypatch)
    timed = []
    step_end = StepClock.on_step_end

    def count(clock, *args, **kwargs):
        step_end(clock, *args, **kwargs)
        timed.append(len(clock.seconds))

    monkeypatch.setattr(StepClock, "on_step_end", count)
    resumed = Study(long, folder)
    resumed.conduct()
    assert not resumed.failed
    assert timed == [11, 12, 13, 14]
    one, other = straight.results[run].figures, resumed.results[run].figures
    assert other["scores"] == one["scores"]
    assert other["log"] == one["log"]
    assert not (folder / "unfinished").exists()


def test_no_checkpoint_is_left_after_the_last_step(study, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SaveInTime", Pulled)
    work = Study(with_steps(study, study.methods["rows"], steps=10), tmp_path / "out", save_minutes=1e-9)
    work.conduct()
    assert len(work.results) == 2


def test_checkpoints_of_another_training_are_not_taken(study, tmp_path, monkeypatch):
    folder, long = tmp_path / "out", with_steps(study, study.methods["full"])
    run = interrupted(long, folder, monkeypatch)
    (folder / "runs/base.json").unlink()
    other = Study(long.model_copy(update={"task": long.task.model_copy(update={"examples": 6})}), folder)
    other.conduct()
    told = f"{folder / 'unfinished' / run.id} holds an unfinished training of other task: "
    assert other.failed[run].startswith(told)
    assert checkpoints(folder, run)
    # One that leaves none reads none.
    Study(other.settings, folder, save_minutes=0).conduct()
    assert other.path_of(run).is_file()
    assert checkpoints(folder, run) == []


def test_a_full_disk_fails_a_run_that_can_go_on(study, tmp_path, monkeypatch):
    folder, long = tmp_path / "out", with_steps(study, study.methods["rows"])

    def fill_disk(*_arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(CompletionTrainer, "_save_checkpoint", fill_disk)
        work = Study(long, folder, save_minutes=1e-9)
        work.conduct()
    ((run, told),) = work.failed.items()
    assert told.startswith(f"cannot write a checkpoint below {folder / 'unfinished' / run.id}: ")
    assert told.endswith("make room and train on")
    again = Study(long, folder)
    again.conduct()
    assert run in again.results


def test_rows_at_zero(study, tmp_path):
    result = done(study, tmp_path, "zeroed", "suppress")
    assert result.figures["num_suppressed_rows"] == NUM_LAYERS * 2
    scores = scores_of(result)
    assert scores["c4_kl"].mean.value > 0
    assert "bfcl" not in scores


def test_rows_from_an_analysis_that_is_not_there(study, tmp_path):
    with pytest.raises(ArtefactError, match=r"mine.h5 does not exist: run the study's analyses first"):
        done(study, tmp_path, "elected")


def test_a_training_that_comes_apart_has_no_loss(study, tmp_path):
    methods = {**study.methods, "full": study.methods["full"].model_copy(update={"learning_rates": (1e12,)})}
    wild = study.model_copy(update={"methods": methods})
    result = carry_out(Workplace(wild, tmp_path), Run("full", "whole", 1e12))
    # Nothing more is asked of it, and JSON can hold what there is.
    assert held_out_loss(result) == math.inf or held_out_loss(result) > 20
    json.dumps(result.figures, allow_nan=False)


def test_too_few_examples(study, tmp_path):
    short = study.model_copy(update={"task": study.task.model_copy(update={"examples": 90})})
    with pytest.raises(InputError, match="93 requests are more than the 12 of at most 600 tokens"):
        done(short, tmp_path, "base", "base")


def test_a_whole_study_in_processes_of_their_own(study, tmp_path):
    """One run killed by another error than ours would not stop the rest; here all go through."""
    work = Study(study, tmp_path / "out", ["rows", "elected", "zeroed"])
    work.conduct(workers=2)
    assert not work.failed
    names = {run.method for run in work.results}
    assert names == {"base", "rows", "elected", "zeroed"}
    found = collect(study, work.results)
    assert sorted(method["name"] for method in found.figures["methods"]) == ["elected", "rows", "zeroed"]
    assert found.figures["task"] == "bfcl_calls"
    here = carry_out(Workplace(study, tmp_path), BASE)
    assert scores_of(here) == scores_of(work.results[BASE])


def test_finished_runs_need_no_analysis_any_more(study, tmp_path):
    elected = ["elected"]
    Study(study, tmp_path / "out", elected).conduct()
    shutil.rmtree(tmp_path / "out/analyses")
    told = []
    Study(study, tmp_path / "out", [*elected, "zeroed"]).conduct(tell=told.append)
    assert [done.run.method for done in told] == ["zeroed"]
    assert not (tmp_path / "out/analyses").exists()


def test_a_plan_needs_no_attribution_log(study, tmp_path):
    """A method of elected rows is timed with as many random ones."""
    methods = {"elected": study.methods["elected"]}
    found = forecast(Study(study.model_copy(update={"methods": methods}), tmp_path / "out"))
    assert found.seconds_per_step > 0
    assert (found.num_runs, found.num_done) == (2, 1)
    assert found.hours_left == pytest.approx((3 * found.seconds_per_step + found.evaluation_seconds) / 3600)


def test_a_plan_counts_the_parts_of_a_change_until_a_run_has_told(study, tmp_path):
    evaluate = study.evaluate.model_copy(update={"scales": (0.25, 0.5)})
    work = Study(study.model_copy(update={"evaluate": evaluate}), tmp_path / "out", ["rows", "zeroed"])
    first = forecast(work)
    once = work.results[BASE].figures["evaluation_seconds"]
    assert first.evaluation_seconds == pytest.approx(3 * once)
    assert first.hours_left == pytest.approx((3 * first.seconds_per_step + 3 * once + once) / 3600)
    work.conduct()
    (whole,) = (result for run, result in work.results.items() if run.phase == "whole")
    assert forecast(work).evaluation_seconds == whole.figures["evaluation_seconds"]


def test_a_smoke_test_has_every_method_and_next_to_no_work(study, tmp_path):
    small = smoke(study)
    assert small.methods.keys() == study.methods.keys()
    assert (small.train.steps, small.train.screen_steps) == (2, 1)
    work = Study(small, tmp_path / "out", ["lora", "zeroed"])
    work.conduct(workers=None)
    assert len(work.results) == 3
    assert torch.get_num_threads() == 1
