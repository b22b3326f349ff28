"""`loki analyse`: every option does what it says, and nothing that happens to a run loses or mixes what is done."""

import json
import random
import resource
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from tiny import NUM_LAYERS, NUM_ROWS, make_model, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from warm import WarmProcess

from loki.analysis.attribution import attribute
from loki.analysis.ranks import Ranks
from loki.analysis.run import Analysis
from loki.prompts.mmlu import PUBLIC_SUBJECTS, SUBJECTS

ROWS = (
    {"id": "one", "prompt": "say one", "answer": "B"},
    {"id": "two", "prompt": "say nothing but two", "answer": "two"},
    {"id": "three", "prompt": "three?", "answer": "3"},
)
"""All questions to a chat model, so that a prompt is its message in the template of `tiny`."""


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def own(tmp_path):
    return write_rows(tmp_path / "own.jsonl", ROWS)


@pytest.fixture
def analyse(loki, model_dir, own, tmp_path):
    """Run a command that must succeed, one prompt at a time, and read its log with plain h5py."""

    def call(*options, dataset=("--dataset", own), output="kva.h5"):
        one = () if "--batch-size" in options else ("--batch-size", 1)
        done = loki("analyse", model_dir, *dataset, "--output", tmp_path / output, *one, *options)
        assert done.code == 0, done.err
        return read(tmp_path / output)

    return call


def read(path):
    with h5py.File(path) as file:
        values = {name: dataset[:] for name, dataset in file.items()}
        return {**values, "header": json.loads(file.attrs["header"])}


def ids_of(log):
    return [text.decode() for text in log["prompt_ids"]]


def content(path):
    """Every dataset of a log bit for bit, and its header."""
    with h5py.File(path) as file:
        found = {}
        for name, dataset in file.items():
            values = b"\0".join(dataset[:]) if dataset.dtype == object else dataset[:].tobytes()
            found[name] = (str(dataset.dtype), dataset.shape, dataset.chunks, values)
        return found, file.attrs["header"]


def chat(row):
    """Token ids (1, T) of a row's message in the chat template, written out."""
    text = f"<|user|>{row['prompt']}<|end|><|assistant|>"
    return make_tokenizer()(text, add_special_tokens=False, return_tensors="pt").input_ids


@pytest.fixture
def expected_scores(model_dir):
    """Scores (N, L, D) and targets of each prompt by itself, from `attribute`."""

    def call(rows=ROWS, *, dtype=torch.float32, encode=chat, targets=None, **settings):
        # Loaded as the command loads it: bits depend on how weights lie in memory.
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval()
        found = [
            attribute(model, encode(row), target_ids=None if targets is None else torch.tensor([target]), **settings)
            for row, target in zip(rows, targets or [0] * len(rows), strict=True)
        ]
        return torch.cat([result.scores for result in found]).numpy(), [int(result.target_ids) for result in found]

    return call


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ([], {}),
        (["--rule", "riemann_middle"], {"rule": "riemann_middle"}),
        (["--steps", 3], {"steps": 3}),
        (["--objective", "logit"], {"objective": "logit"}),
        (["--no-multiply"], {"multiply_by_activation": False}),
        (["--site-module", "o_proj"], {"site_module": "o_proj"}),
        (["--site", "down_proj"], {"site": "down_proj"}),
        (["--engine", "recompute", "--steps", 2], {"engine": "recompute", "steps": 2}),
        (["--max_branches", 3], {"max_branches": 3}),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_the_method_is_the_one_asked_for(analyse, options, settings, expected_scores):
    log = analyse(*options)
    scores_NLD, targets = expected_scores(**settings)
    np.testing.assert_array_equal(log["dataset"], scores_NLD)
    assert log["target_ids"].tolist() == targets
    assert ids_of(log) == ["one", "two", "three"]
    assert log["num_tokens"].tolist() == [chat(row).shape[1] for row in ROWS]
    if not {"site", "max_branches"} & set(settings) and settings:
        assert not np.allclose(log["dataset"], expected_scores()[0], rtol=1e-3)
    header = log["header"]["settings"]
    assert {name: header[name] for name in settings if name != "max_branches"} == {
        name: value for name, value in settings.items() if name != "max_branches"
    }


def test_prompts_that_go_through_the_model_together_have_the_scores_of_each_alone(analyse, expected_scores):
    found, expected = analyse("--batch-size", 2)["dataset"], expected_scores()[0]
    # Padding changes the order of summation, in float32.
    assert (np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max() < 1e-5


def test_four_prompts_go_together_on_a_cpu(loki, model_dir, many, tmp_path):
    rows = tmp_path / "some.jsonl"
    rows.write_text("".join(many.read_text().splitlines(keepends=True)[:24]))
    options = ("analyse", model_dir, "--dataset", rows, "--device", "cpu", "--output")
    for name, chosen in {"default": (), "four": ("--batch-size", 4), "one": ("--batch-size", 1)}.items():
        assert loki(*options, tmp_path / name, *chosen).code == 0
    assert content(tmp_path / "default") == content(tmp_path / "four") != content(tmp_path / "one")


def test_the_answer_is_the_target_when_asked_for(analyse, expected_scores):
    first_bytes = [make_tokenizer()(row["answer"][0], add_special_tokens=False).input_ids[0] for row in ROWS]
    predicted, log = analyse(), analyse("--target", "answer", output="answer.h5")
    assert log["target_ids"].tolist() == first_bytes
    assert predicted["target_ids"].tolist() != first_bytes
    np.testing.assert_array_equal(log["dataset"], expected_scores(targets=first_bytes)[0])
    assert log["header"]["settings"]["target"] == "answer"


def test_without_the_chat_template_messages_are_plain_text(analyse, expected_scores):
    def plain(row):
        return make_tokenizer()(row["prompt"], add_special_tokens=False, return_tensors="pt").input_ids

    np.testing.assert_array_equal(analyse("--no-chat-template")["dataset"], expected_scores(encode=plain)[0])
    np.testing.assert_array_equal(analyse("--chat-template", output="c.h5")["dataset"], expected_scores()[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_model_computes_in_the_dtype_asked_for(analyse, dtype, expected_scores):
    log = analyse("--dtype", dtype)
    assert log["header"]["model"]["dtype"] == dtype
    assert log["dataset"].dtype == np.float32
    np.testing.assert_array_equal(log["dataset"], expected_scores(dtype=getattr(torch, dtype))[0])


@pytest.mark.parametrize(
    ("mixed", "options", "dtype"),
    [("bf16", [], "bfloat16"), ("fp16", [], "float16"), ("no", [], "float32"), ("bf16", ["float32"], "float32")],
)
def test_accelerates_mixed_precision_is_the_default_dtype(analyse, monkeypatch, mixed, options, dtype):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", mixed)
    assert analyse(*(["--dtype", *options] if options else []))["header"]["model"]["dtype"] == dtype


def test_a_half_precision_log_holds_rounded_scores(analyse, expected_scores):
    log = analyse("--log-dtype", "float16")
    assert log["dataset"].dtype == np.float16
    np.testing.assert_array_equal(log["dataset"], expected_scores()[0].astype(np.float16))


@pytest.fixture
def olmo_dir(tmp_path):
    """A family that normalises what the feed-forward block puts out."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model("olmo2", vocab_size=260, initializer_range=0.3, pad_token_id=None, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "olmo")
    make_tokenizer().save_pretrained(tmp_path / "olmo")
    return tmp_path / "olmo"


def test_a_site_that_cannot_converge_is_warned_of(loki, olmo_dir, own, tmp_path):
    logs, errors = {}, {}
    for site in ("auto", "after_norm", "down_proj"):
        output = tmp_path / f"{site}.h5"
        done = loki("analyse", olmo_dir, "--dataset", own, "--output", output, "--site", site)
        assert done.code == 0, done.err
        logs[site], errors[site] = read(output)["dataset"], done.err
    np.testing.assert_array_equal(logs["auto"], logs["after_norm"])
    assert not np.allclose(logs["auto"], logs["down_proj"], rtol=1e-2)
    assert "warning: site 'down_proj' in 'olmo2' models: the norm after the down-projection forgets its scale" in (
        " ".join(errors["down_proj"].split())
    )
    assert "warning" not in errors["auto"] + errors["after_norm"]


def question(subject, number):
    choices = [f"{word} {number}" for word in ("up", "down", "left", "right")]
    return {"id": f"{subject}/{number}", "subject": subject, "question": "Where?", "choices": choices, "answer": 2}


@pytest.fixture
def mmlu_dir(tmp_path):
    """Three test and two dev questions of each subject."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, numbers in (("test", range(3)), ("dev", (10, 11))):
        write_rows(folder / f"mmlu_{name}.jsonl", (question(subject, n) for subject in SUBJECTS for n in numbers))
    return folder


def dry_run(loki, model_dir, *options):
    done = loki("analyse", model_dir, "--steps", 1, "--dry-run", "--json", *options)
    assert done.code == 0, done.err
    return json.loads(done.out)["figures"]


def test_which_questions_of_mmlu(loki, analyse, model_dir, mmlu_dir):
    of_mmlu = ("--dataset", "mmlu", "--data-dir", mmlu_dir)
    assert dry_run(loki, model_dir, *of_mmlu)["num_prompts"] == 57 * 3
    assert dry_run(loki, model_dir, *of_mmlu, "--subjects", 56)["num_prompts"] == len(PUBLIC_SUBJECTS) * 3
    log = analyse("--steps", 1, "--subjects", "virology, anatomy", "--split", "dev", dataset=of_mmlu)
    assert ids_of(log) == ["anatomy/10", "anatomy/11", "virology/10", "virology/11"]
    assert log["header"]["prompts"].startswith("mmlu:dev(2 subjects) ")
    some = {seed: [] for seed in range(4)}
    for seed, ids in some.items():
        options = ("--steps", 1, "--subjects", "anatomy,virology", "--samples-per-subject", 2, "--seed", seed)
        ids += ids_of(analyse(*options, dataset=of_mmlu, output=f"{seed}.h5"))
        assert [name.split("/")[0] for name in ids] == ["anatomy"] * 2 + ["virology"] * 2
        assert {name.split("/")[1] for name in ids} <= {"0", "1", "2"}
    assert len({tuple(ids) for ids in some.values()}) > 1


def test_several_datasets_and_their_shares(analyse, own, mmlu_dir):
    both = ("--dataset", own, "--dataset", "mmlu", "--data-dir", mmlu_dir, "--subjects", "anatomy", "--steps", 1)
    assert ids_of(analyse(dataset=both)) == ["one", "two", "three", "anatomy/0", "anatomy/1", "anatomy/2"]
    assert len(ids_of(analyse("--num-prompts", 4, dataset=both, output="4.h5"))) == 4
    shared = ("--dataset", f"{own}=25%", "--dataset", "mmlu=0.75", *both[4:])
    ids = ids_of(analyse(dataset=shared, output="shared.h5"))
    assert len(ids) == 4  # three of mmlu are all there are, and one is a quarter of four
    assert {name for name in ids if "/" in name} == {"anatomy/0", "anatomy/1", "anatomy/2"}
    assert len(ids_of(analyse("--num-prompts", 2, dataset=shared, output="2.h5"))) == 2


def test_without_a_dataset_it_is_the_probe(loki, model_dir):
    found = dry_run(loki, model_dir)
    assert found == dry_run(loki, model_dir, "--dataset", "probe") | {"seconds": found["seconds"]}
    assert found["num_prompts"] == 114


def test_a_device_map_changes_no_score(analyse, tmp_path, expected_scores):
    expected = expected_scores()[0]
    maps = {
        "cpu": {"": "cpu"},
        "disk": {"": "disk"},
        "both": {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "lm_head": "cpu"}
        | {"model.layers.2": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"},
    }
    fingerprints = []
    for name, places in maps.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(places))
        options = ("--device-map", tmp_path / f"{name}.json", "--offload-dir", tmp_path / "offload")
        log = analyse(*options, output=f"{name}.h5")
        np.testing.assert_allclose(log["dataset"], expected, rtol=1e-6, atol=1e-6)
        fingerprints.append(log["header"]["model"])
    log = analyse("--device-map", "auto")
    np.testing.assert_allclose(log["dataset"], expected, rtol=1e-6, atol=1e-6)
    assert fingerprints == [log["header"]["model"]] * 3  # so that a log may be finished on another machine


def test_a_launcher_and_a_device_map_go_together(analyse, monkeypatch, expected_scores):
    """With one process a machine each spreads its own model."""
    monkeypatch.setattr(Ranks, "from_launcher", classmethod(lambda cls: cls(0, 1, "cpu")))
    np.testing.assert_array_equal(analyse("--device-map", "auto")["dataset"], expected_scores()[0])


def test_the_launchers_device_is_taken_unless_one_is_named(loki, model_dir, own, tmp_path, monkeypatch):
    monkeypatch.setattr(Ranks, "from_launcher", classmethod(lambda cls: cls(0, 1, "cuda:77")))
    options = ("analyse", model_dir, "--dataset", own, "--output", tmp_path / "kva.h5")
    assert "device 'cuda:77' cannot be used here" in loki(*options).err
    assert loki(*options, "--device", "cpu").code == 0


def test_a_dry_run_tells_the_cost_and_writes_nothing(loki, model_dir, own, tmp_path, monkeypatch):
    before = sorted(tmp_path.rglob("*"))
    options = ("analyse", model_dir, "--dataset", own, "--output", tmp_path / "new/kva.h5", "--dry-run")
    done = loki(*options, "--json")
    assert (done.code, done.err) == (0, "")
    result = json.loads(done.out)
    figures = result["figures"]
    # <|user|>, <|end|> and <|assistant|> around each byte.
    num_tokens = sum(len(row["prompt"]) + 3 for row in ROWS)
    log_bytes = 3 * NUM_LAYERS * NUM_ROWS * 4
    assert (figures["num_prompts"], figures["num_tokens"], figures["log_bytes"]) == (3, num_tokens, log_bytes)
    assert (result["kind"], result["seed"], result["model"]) == ("estimate", 0, str(model_dir))
    assert result["settings"]["steps"] == 7
    done = loki(*options, "--log-dtype", "float16", "--force")
    assert (done.code, done.out) == (0, "")
    assert done.err.startswith(
        f"3 prompts, {num_tokens} tokens, a log of {log_bytes // 2} bytes, about 0 h 00 min 00 s"
    )
    assert done.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before

    monkeypatch.setattr(Ranks, "from_launcher", classmethod(lambda cls: cls(0, 2, "cpu")))
    done = loki(*options)
    assert (done.code, done.err) == (2, "loki: --dry-run times one process: leave the launcher out\n")


def test_the_time_of_a_dry_run_is_about_that_of_the_run(loki, model_dir, tmp_path):
    """Within a factor of three, once in three trials: other processes share the machine."""
    rng = random.Random(0)
    rows = [{"prompt": "x" * rng.randint(1, 300)} for _ in range(40)]
    prompts = write_rows(tmp_path / "many.jsonl", rows)
    model, all_ids = make_model(), [chat(row) for row in rows]
    ratios = []
    for _ in range(3):
        told = dry_run(loki, model_dir, "--dataset", prompts, "--batch-size", 1)["seconds"]
        start = time.perf_counter()
        for ids_1T in all_ids:
            attribute(model, ids_1T, steps=1)
        ratios.append(told / (time.perf_counter() - start))
        if 1 / 3 < ratios[-1] < 3:
            return
    pytest.fail(f"told and taken time differ by the factors {ratios}")


def test_json_tells_what_was_done(loki, model_dir, own, tmp_path):
    output = tmp_path / "kva.h5"
    done = loki("analyse", model_dir, "--dataset", own, "--output", output, "--seed", 3, "--json")
    result = json.loads(done.out)
    assert result["figures"] == {
        "log": str(output),
        "num_prompts": 3,
        "num_layers": NUM_LAYERS,
        "num_rows": NUM_ROWS,
    }
    assert (result["kind"], result["seed"], result["settings"]["rule"]) == ("analyse", 3, "riemann_left")


def test_the_same_command_leaves_a_finished_log_alone(loki, model_dir, own, tmp_path):
    output = tmp_path / "kva.h5"
    options = ("analyse", model_dir, "--dataset", own, "--output", output)
    assert loki(*options).code == 0
    before = (output.stat().st_ino, output.stat().st_mtime_ns, output.read_bytes())
    assert loki(*options).code == 0
    assert (output.stat().st_ino, output.stat().st_mtime_ns, output.read_bytes()) == before


def test_a_finished_log_of_other_settings_is_replaced_with_force_only(loki, model_dir, many, whole, tmp_path):
    output = tmp_path / "kva.h5"
    options = ("analyse", model_dir, "--dataset", many, "--output", output)
    assert loki(*options, "--steps", 1).code == 0
    before = output.read_bytes()
    done = loki(*options)
    assert (done.code, output.read_bytes()) == (2, before)
    assert "kva.h5 exists already: remove it or choose another output file" in done.err
    assert loki(*options, "--force").code == 0
    assert content(output) == whole


def test_an_unfinished_log_of_other_settings_is_replaced_with_force_only(loki, model_dir, many, whole, tmp_path):
    output = tmp_path / "kva.h5"
    options = ("analyse", model_dir, "--dataset", many, "--output", output)
    with file_size_limit(3000):  # parts do not fit
        assert loki(*options, "--steps", 1).code == 2
    parts = sorted((tmp_path / "kva.h5.parts").iterdir())
    assert [part.name for part in parts] == ["manifest.json"]
    done = loki(*options)
    assert done.code == 2
    assert "unfinished log of other settings (steps: 1, here 7)" in done.err
    assert sorted((tmp_path / "kva.h5.parts").iterdir()) == parts
    assert loki(*options, "--force").code == 0
    assert content(output) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["kva.h5"]


@contextmanager
def file_size_limit(num_bytes):
    """No file may grow larger: as on a full disk, writing fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """320 prompts of 1 to 60 bytes: 20 parts."""
    rng = random.Random(0)
    rows = [{"prompt": "".join(rng.choices("abcdefgh ", k=rng.randint(1, 60))) + "x"} for _ in range(320)]
    return write_rows(tmp_path_factory.mktemp("prompts") / "many.jsonl", rows)


NUM_PARTS = 20


@pytest.fixture(scope="module")
def whole(many, model_dir, tmp_path_factory):
    """The log of a run that nothing happened to."""
    output = tmp_path_factory.mktemp("whole") / "kva.h5"
    with started(model_dir, many, output) as process:
        assert process.wait() == 0
    return content(output)


def started(model_dir, dataset, output, *options):
    """`python -m loki analyse` in a process of its own."""
    return WarmProcess("-m", "loki", "analyse", model_dir, "--dataset", dataset, "--output", output, *options)


def part_files(output):
    """Part files by inode and time: one that is written again is another."""
    found = output.with_name(output.name + ".parts").glob("batch-*.safetensors")
    return {(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def test_a_full_disk_is_one_line_and_the_command_goes_on(loki, model_dir, many, whole, tmp_path, monkeypatch):
    """First no part fits, then all parts do but not the log."""
    output = tmp_path / "kva.h5"
    options = ("analyse", model_dir, "--dataset", many, "--output", output)
    num_kept = []
    for num_bytes in (500, 3000, 20_000):
        with file_size_limit(num_bytes):
            done = loki(*options)
        assert (done.code, done.out) == (2, "")
        *_, last = done.err.splitlines()
        assert last.startswith(f"loki: cannot write {output}")
        assert last.endswith("File too large")
        assert "Traceback" not in done.err
        assert not output.exists()
        num_kept.append(len(part_files(output)))
    assert num_kept == [0, 0, NUM_PARTS]
    monkeypatch.setattr(Analysis, "attribute", lambda *_: pytest.fail("nothing is to be computed again"))
    assert loki(*options).code == 0
    assert content(output) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["kva.h5"]


needs_sigkill = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")


@needs_sigkill
@pytest.mark.parametrize("num_kills", [3, pytest.param(20, marks=pytest.mark.real)])
def test_kills_at_random_moments_lose_at_most_the_part_in_flight(model_dir, many, whole, tmp_path, num_kills):
    """Real ones: some while the program starts, most after no or one more part, at a random moment."""
    rng = random.Random(num_kills)
    output = tmp_path / "kva.h5"
    kept = set()
    for number in range(num_kills):
        with started(model_dir, many, output) as process:
            if number % 4 == 3:
                time.sleep(rng.uniform(0, 0.2))
            else:
                wanted = len(kept) + rng.randint(0, 1)
                while process.poll() is None and not (
                    output.with_name("kva.h5.parts").exists() and len(part_files(output)) >= wanted
                ):
                    time.sleep(0.002)
                time.sleep(rng.uniform(0, 0.1))
            process.kill()
            assert process.wait() == -signal.SIGKILL, process.communicate()
        before, kept = kept, part_files(output)
        assert before <= kept  # no part is done again, however often the run begins
        assert not output.exists()
    assert 0 < len(kept) < NUM_PARTS
    left = 16 * (NUM_PARTS - len(kept))
    with started(model_dir, many, output) as process:
        _, error = process.communicate()
    assert process.returncode == 0, error
    assert f" {left}/{left} " in error  # the last run computed what was missing, and no more
    assert content(output) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["kva.h5"]


@pytest.fixture
def interrupted(loki, model_dir, many, tmp_path, monkeypatch):
    """A run that Ctrl-C ends while the sixth batch of four is computed: one part of four is whole."""
    places = []

    def count_and_interrupt(analysis, chosen):
        places.append(chosen)
        if len(places) == 6:
            raise KeyboardInterrupt
        return compute(analysis, chosen)

    compute = Analysis.attribute
    with monkeypatch.context() as patch:
        patch.setattr(Analysis, "attribute", count_and_interrupt)
        return loki("analyse", model_dir, "--dataset", many, "--output", tmp_path / "kva.h5")


def test_an_interrupted_command_goes_on(interrupted, loki, model_dir, many, whole, tmp_path):
    output = tmp_path / "kva.h5"
    assert interrupted.code == 130
    assert "Traceback" not in interrupted.err
    assert not output.exists()
    assert len(part_files(output)) == 1
    done = loki("analyse", model_dir, "--dataset", many, "--output", output)
    assert done.code == 0
    assert " 304/304 " in done.err
    assert content(output) == whole


def test_an_interrupt_says_that_the_command_goes_on(interrupted):
    assert interrupted.err.splitlines()[-1] == "loki: interrupted; the same command goes on where it stopped"


def test_shards_merge_into_the_log_of_a_single_run(loki, model_dir, many, whole, tmp_path):
    shards = [tmp_path / f"{number}.h5" for number in (1, 2, 3)]
    for number, shard in enumerate(shards, start=1):
        done = loki("analyse", model_dir, "--dataset", many, "--output", shard, "--shard", f"{number}/3")
        assert done.code == 0
    sizes = [len(read(shard)["prompt_index"]) for shard in shards]
    assert (sum(sizes), max(sizes) - min(sizes)) == (320, 16)
    output = tmp_path / "kva.h5"
    done = loki("merge-logs", *shards[:2], "--output", output)
    assert done.code == 2
    assert "shard 3/3 is missing" in done.err
    assert loki("merge-logs", *shards, "--output", output).code == 0
    assert content(output) == whole


def test_a_shard_is_refused_where_another_one_stands(loki, model_dir, many, tmp_path):
    output = tmp_path / "kva.h5"
    options = ("analyse", model_dir, "--dataset", many, "--output", output, "--steps", 1, "--shard")
    assert loki(*options, "1/20").code == 0
    before = output.read_bytes()
    done = loki(*options, "2/20")
    assert done.code == 2
    assert "kva.h5 exists already" in done.err
    assert output.read_bytes() == before
