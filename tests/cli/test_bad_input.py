"""Bad input: one line that names the thing, the value and the remedy; exit code 2; nothing half-written."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from tiny import NUM_LAYERS, NUM_ROWS, make_model, make_tokenizer

from loki.architecture import shape_of
from loki.log.assembly import write_header
from loki.log.schema import SCORES, LogHeader


def write_log(path: Path, scores: np.ndarray, architecture: str) -> Path:
    header = LogHeader({"architecture": architecture}, "tiny", "probe", {}, *scores.shape[1:])
    with h5py.File(path, "w") as file:
        file.create_dataset(SCORES, data=scores.astype("float32"))
        write_header(file, header)
    return path


@pytest.fixture
def scores() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(4, NUM_LAYERS, NUM_ROWS))


@pytest.fixture
def log(tmp_path, scores) -> Path:
    return write_log(tmp_path / "kva.h5", scores, str(shape_of(make_model())))


@pytest.fixture
def refused(loki, tmp_path):
    """Run a command that must be refused, and compare the whole folder before and after."""

    def call(*arguments) -> str:
        before = snapshot(tmp_path)
        done = loki(*arguments)
        assert done.code == 2, done
        assert done.out == ""
        assert done.err.startswith("loki: ")
        assert done.err.count("\n") == 1, done.err
        assert snapshot(tmp_path) == before
        return done.err

    return call


def snapshot(directory: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")
    }


def write_positions(path: Path, positions: object) -> Path:
    path.write_text(json.dumps(positions))
    return path


def train_options(model_dir, positions, output):
    return (
        *("train", "--model", model_dir, "--positions", positions, "--output-dir", output),
        *("--learning-rate", 0.01, "--steps", 1, "--examples", 2),
    )


def write_config(path: Path, model_dir, **changes) -> Path:
    values = {
        "model": str(model_dir),
        "output_dir": str(path.parent / "run"),
        "train": {"learning_rate": 1, "steps": 1, "examples": 2},
    }
    path.write_text(json.dumps({**values, **changes}))  # JSON is YAML
    return path


def test_unknown_model_folder(refused, tmp_path):
    error = refused("analyse", tmp_path / "no-model", "--output", tmp_path / "out.h5")
    assert "no-model' does not exist: name a Hugging Face model folder" in error


def test_folder_that_is_no_model(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused("analyse", tmp_path / "empty", "--output", tmp_path / "out.h5")


def test_unknown_hub_id(refused, tmp_path):
    error = refused("analyse", "nobody/no-such-model", "--output", tmp_path / "out.h5")
    assert "model 'nobody/no-such-model' cannot be loaded" in error


def test_unknown_architecture(refused, tmp_path):
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=260)).save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    error = refused("analyse", tmp_path / "m", "--output", tmp_path / "out.h5")
    assert "unknown architecture 'bloom': known are llama, mistral" in error
    assert "loki/architecture.py" in error


@pytest.mark.parametrize("quota", ["0", "-5", "100.1", "ten", "nan", "inf"])
def test_quota_outside_its_range(refused, log, tmp_path, quota):
    error = refused("select-nodes", "--hdf5-path", log, f"--quota={quota}", "--output-dir", tmp_path)
    assert f"quota {quota}" in error.replace("'", "")
    assert "above 0 and up to 100" in error


def test_quota_that_gives_no_row(refused, log, tmp_path):
    error = refused("select-nodes", "--hdf5-path", log, "--quota", "4.99", "--output-dir", tmp_path)
    assert "quota 4.99 gives no row out of 20: give at least 5" in error


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([[1], [2]], "have 2 layers, the model has 3"),
        ([[1], [2], [3, 3]], "layer 2 names row 3 twice"),
        ([[1], [2], [20]], "layer 2 names row 20, but the model's rows are 0 to 19"),
        ([[1], [2], [-1]], "layer 2 has -1, which is not a row index"),
        ([[1], [2], ["3"]], "layer 2 has '3', which is not a row index"),
        ([[], [], []], "name no row at all"),
        ({"a": 1}, "must be a list with one list of row indices for each layer"),
    ],
)
def test_positions_that_do_not_fit(refused, model_dir, tmp_path, positions, message):
    path = write_positions(tmp_path / "p.json", positions)
    assert message in refused(*train_options(model_dir, path, tmp_path / "adapter"))


def test_positions_that_are_no_json(refused, model_dir, tmp_path):
    (tmp_path / "p.json").write_text("[[1], [2")
    assert "p.json is not JSON" in refused(*train_options(model_dir, tmp_path / "p.json", tmp_path / "adapter"))


def test_positions_of_another_architecture(refused, model_dir, tmp_path):
    path = write_positions(tmp_path / "p.json", [[1], [2], [3]])
    meta = {"log": {"model": {"architecture": "qwen2-3x20x24", "weights": "0", "dtype": "float32"}}}
    write_positions(tmp_path / "p.meta.json", meta)
    error = refused(*train_options(model_dir, path, tmp_path / "adapter"))
    assert "was made with a qwen2-3x20x24 model, not with this llama-3x20x24 one" in error


def test_positions_of_other_weights_are_an_error_with_strict(refused, loki, model_dir, tmp_path):
    path = write_positions(tmp_path / "p.json", [[1], [2], [3]])
    meta = {"log": {"model": {"architecture": "llama-3x20x24", "weights": "0", "dtype": "bfloat16"}}}
    write_positions(tmp_path / "p.meta.json", meta)
    error = refused(*train_options(model_dir, path, tmp_path / "adapter"), "--strict")
    assert "other weights of the same architecture" in error
    assert "dtype bfloat16 there, float32 here" in error
    done = loki(*train_options(model_dir, path, tmp_path / "adapter"))
    assert done.code == 0
    assert "warning: positions file" in done.err


def test_log_of_another_model(refused, model_dir, scores, tmp_path):
    other = write_log(tmp_path / "other.h5", scores, "qwen2-3x20x24")
    error = refused("select-nodes", "--hdf5-path", other, "--model", model_dir, "--output-dir", tmp_path)
    assert "is of a qwen2-3x20x24 with 3 layers of 20 rows, not of this llama-3x20x24 model" in error


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_log_with_values_that_are_not_finite(refused, scores, tmp_path, value):
    scores[2, 1, 7] = value
    bad = write_log(tmp_path / "bad.h5", scores, "llama-3x20x24")
    error = refused("select-nodes", "--hdf5-path", bad, "--output-dir", tmp_path)
    assert f"has {value} at prompt 2, layer 1, row 7: analyse again" in error


def test_log_that_is_cut_off(refused, log, tmp_path):
    log.write_bytes(log.read_bytes()[:-2000])
    assert "damaged or not HDF5" in refused("select-nodes", "--hdf5-path", log, "--output-dir", tmp_path)


def test_run_directory_of_other_settings(refused, model_dir, tmp_path):
    config = write_config(tmp_path / "c.json", model_dir, seed=1)
    (tmp_path / "run").mkdir()
    from loki.pipeline import run_record
    from loki.run_settings import load_settings

    record = run_record(load_settings(write_config(tmp_path / "d.json", model_dir)))
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    error = refused("run", config)
    assert "was made with other settings (seed 0 there, 1 here)" in error
    assert "--force" in error


def test_run_directory_that_is_none_is_refused_even_with_force(refused, model_dir, tmp_path):
    config = write_config(tmp_path / "c.json", model_dir)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/precious.txt").write_text("mine")
    assert "is not empty and not a run directory" in refused("run", config, "--force")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"steps": 1}}, "train.learning_rate: field required"),
        ({"colour": "red"}, "colour: extra inputs are not permitted, got 'red'"),
        ({"analyse": {"rule": "simpson"}}, "analyse.rule: input should be 'riemann_left'"),
        ({"select": {"quota": 200}}, "quota 200 is outside (0, 100]"),
        ({"analyse": {"steps": 0}}, "steps 0 is too few"),
        ({"train": {"learning_rate": 1, "steps": 1, "data": "no.jsonl"}}, "'no.jsonl' cannot be read"),
        ({"evaluate": {"completions": "no.jsonl"}}, "'no.jsonl' cannot be read"),
        ({"train": {"learning_rate": -1, "steps": 1}}, "learning rate -1.0 is not possible"),
    ],
)
def test_settings_that_are_wrong(refused, model_dir, tmp_path, changes, message):
    assert message in refused("run", write_config(tmp_path / "c.json", model_dir, **changes))


def test_settings_file_that_is_missing_or_no_yaml(refused, tmp_path):
    assert "cannot be read: No such file" in refused("run", tmp_path / "no.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    assert "is not YAML" in refused("run", tmp_path / "bad.yaml")


def unwritable_commands(place: Path, model_dir: Path, tmp_path: Path, log: Path):
    positions = write_positions(tmp_path / "p.json", [[1], [2], [3]])
    return [
        ("analyse", model_dir, "--output", place / "kva.h5"),
        ("select-nodes", "--hdf5-path", log, "--output-dir", place),
        train_options(model_dir, positions, place / "adapter"),
        ("merge", "--model", model_dir, "--adapter", tmp_path, "--output-dir", place / "merged"),
        ("evaluate", model_dir, "--base", model_dir, "--output", place / "result.json"),
        ("run", write_config(tmp_path / "c.json", model_dir), "--output-dir", place / "run"),
    ]


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("kind", ["below a file", "read-only file system"])
def test_output_folder_that_cannot_be_written(refused, model_dir, tmp_path, log, index, kind):
    (tmp_path / "file").touch()
    place = tmp_path / "file" if kind == "below a file" else Path("/proc/loki")
    error = refused(*unwritable_commands(place, model_dir, tmp_path, log)[index])
    assert f"cannot write {place}" in error or f"output folder {place}" in error
    assert "choose another" in error


def test_evaluating_needs_something_to_compare_with(refused, model_dir):
    assert "either --base MODEL (before training) or --adapter DIR" in refused("evaluate", model_dir)


def test_report_of_no_run(refused, tmp_path):
    assert "has no summary.json: name the directory of a finished `loki run`" in refused("report", tmp_path)


def test_impossible_numbers(refused, model_dir, tmp_path):
    positions = write_positions(tmp_path / "p.json", [[1], [2], [3]])
    options = train_options(model_dir, positions, tmp_path / "adapter")
    assert "batch size 0 is not possible" in refused(*options, "--batch-size", 0)
    assert "steps 0 is too few for the rule riemann_left" in refused("analyse", model_dir, "--steps", 0)
    assert "device 'quantum' is unknown" in refused("analyse", model_dir, "--device", "quantum")


PROMPT_ROWS = (
    {"id": "one", "prompt": "say one", "answer": "one", "subject": "s"},
    {"id": "two", "prompt": "say two", "subject": "s"},
    {"id": "three", "text": "one two three"},
)
NOT_HERE = "which cannot be used here"


def analysing(model_dir: Path, tmp_path: Path, *options: object) -> tuple[object, ...]:
    """`loki analyse` of three prompts, in a folder with some files that may be wrong."""
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPT_ROWS))
    (tmp_path / "folder").mkdir(exist_ok=True)
    (tmp_path / "precious.txt").write_text("mine")
    chosen = [str(option).replace("{}", str(tmp_path)) for option in options]
    given = {option for option in chosen if option.startswith("--")}
    if "--dataset" not in given:
        chosen += ["--dataset", str(tmp_path / "own.jsonl")]
    if "--output" not in given:
        chosen += ["--output", str(tmp_path / "out.h5")]
    return "analyse", model_dir, *chosen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "{}/no.jsonl"], "no.jsonl' is unknown: choose probe, mmlu or a JSON Lines file that exists"),
        (["--dataset", "{}/own.jsonl", "--dataset", "probe=0.5"], "has no share while another has: give every dataset"),
        (["--dataset", "probe=0"], "'0' is no share: write a number above 0"),
        (["--dataset", "probe", "--dataset", "probe"], "dataset 'probe' is given twice"),
        (["--dataset", "{}/precious.txt"], "precious.txt, line 1 is not JSON"),
        (["--dataset", "mmlu", "--data-dir", "{}/nowhere"], "nowhere does not exist: name the folder that holds MMLU"),
        (["--dataset", "mmlu", "--data-dir", "{}/folder"], "folder holds no MMLU test questions"),
        (["--dataset", "mmlu", "--data-dir", "{}/folder", "--split", "dev"], "holds no MMLU dev questions"),
        (["--dataset", "mmlu", "--split", "train"], "'train' is not one of 'dev', 'validation', 'test'"),
        (["--dataset", "mmlu", "--subjects", "anatomi"], "MMLU has no subject 'anatomi': do you mean 'anatomy'?"),
        (["--dataset", "mmlu", "--subjects="], "MMLU has no subject ''"),
        (["--dataset", "mmlu"], "MMLU cannot be had from the Hub"),
        (["--data-dir", "{}/folder"], "folder is for MMLU: give --dataset mmlu, or leave it out"),
        (["--split", "dev"], "--split dev is for MMLU"),
        (["--subjects", "anatomy"], "--subjects anatomy is for MMLU"),
        (["--samples-per-subject", 0], "0 samples per subject are not possible: ask for 1 or more"),
        (["--num-prompts", 0], "0 prompts are not possible: ask for 1 or more"),
        (["--num-prompts", 4], "4 prompts are more than the 3 there are: ask for fewer"),
        (["--target", "answer"], "prompt 'two' has no answer: give it one, or use --target predicted"),
        (["--target", "truth"], "'truth' is not one of 'predicted', 'answer'"),
        (["--rule", "riemann_trapezoid", "--steps", 1], "steps 1 is too few for the rule riemann_trapezoid: give 2"),
        (["--steps", -7], "steps -7 is too few"),
        (["--objective", "loss"], "'loss' is not one of"),
        (["--site", "before_norm"], "'before_norm' is not one of"),
        (["--site-module", "up_proj"], "'up_proj' is not one of 'down_proj', 'o_proj'"),
        (["--engine", "steam"], "'steam' is not one of"),
        (["--batch-size", 0], "batch size 0 is not possible: give 1 or more"),
        (["--batch-size", -1], "batch size -1 is not possible"),
        (["--dtype", "int8"], "'int8' is not one of"),
        (["--log-dtype", "bfloat16"], "'bfloat16' is not one of 'float32', 'float16'"),
        (["--shard", "0/2"], "shard '0/2' is not possible: give i/n with i from 1 to n, such as 2/4"),
        (["--shard", "3/2"], "shard '3/2' is not possible"),
        (["--shard", "half"], "shard 'half' is not possible"),
        (["--shard", "1/2"], "2 shards are more than the 1 parts of 16 prompts that there are: use at most 1"),
        (["--device", "meta"], "device 'meta' cannot be used here: leave --device out, or give cpu"),
        (["--device", "cpu", "--device-map", "auto"], "--device cpu and --device-map exclude each other"),
        (["--device-map", "everywhere"], "device map 'everywhere' is unknown: choose auto, balanced"),
        (["--device-map", "{}/no.json"], "no.json' cannot be read"),
        (["--offload-dir", "{}/offload"], "offload takes what a device map puts on disk: give --device-map too"),
        (["--output", "{}/folder"], "folder is a folder: name a file in it, such as"),
        (["--output", "{}/folder", "--force"], "folder is a folder: name a file in it"),
        (["--output", "."], "output . is a folder: name a file in it, such as kva.h5"),
        (["--output", "{}/precious.txt"], "precious.txt exists already: remove it or choose another output file"),
        (["--output", "{}/precious.txt", "--force"], "precious.txt is no attribution log, so --force leaves it alone"),
        (["--output", "{}/own.jsonl", "--force"], "own.jsonl is no attribution log, so --force leaves it alone"),
    ],
    ids=lambda value: " ".join(map(str, value)).replace("{}/", "") if isinstance(value, list) else "",
)
def test_options_of_analyse_that_cannot_be(refused, model_dir, tmp_path, options, message):
    arguments = analysing(model_dir, tmp_path, *options)
    assert message in refused(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-branches", 0], "max_branches 0 is not possible: give 1 or more"),
        (["--site", "after_norm"], "site 'after_norm' does not exist in 'llama' models"),
    ],
    ids=["max-branches", "site"],
)
def test_options_of_analyse_that_the_model_cannot_take(refused, model_dir, tmp_path, options, message):
    arguments = analysing(model_dir, tmp_path, *options)
    assert message in refused(*arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read (Expecting property name"),
        ('["cpu"]', 'is not a JSON object such as {"model.layers.0": "cpu", …}'),
        ("{}", "is not a JSON object such as"),
        ('{"": null}', "is not a JSON object such as"),
        ('{"": true}', "is not a JSON object such as"),
        ('{"": 1.5}', "is not a JSON object such as"),
        ('{"": "quantum"}', f"names 'quantum', {NOT_HERE}"),
        ('{"": "meta"}', f"names 'meta', {NOT_HERE}"),
        ('{"": -1}', f"names -1, {NOT_HERE}"),
        ('{"": "cuda:77"}', f"names 'cuda:77', {NOT_HERE}"),
        (
            '{"": "cpu", "model.layer.0": "cpu"}',
            "names 'model.layer.0', which the model does not have: its modules are",
        ),
        ('{"": "cpu", "model.layers.3": "disk"}', "names 'model.layers.3', which the model does not have"),
    ],
)
def test_device_maps_that_cannot_be(refused, model_dir, tmp_path, content, message):
    (tmp_path / "map.json").write_text(content)
    arguments = analysing(model_dir, tmp_path, "--device-map", "{}/map.json")
    assert message in refused(*arguments)


def test_offload_folder_that_is_a_file(refused, model_dir, tmp_path):
    (tmp_path / "map.json").write_text('{"": "disk"}')
    options = ("--device-map", "{}/map.json", "--offload-dir", "{}/precious.txt")
    assert "File exists" in refused(*analysing(model_dir, tmp_path, *options))


def test_flash_attention_without_its_package(refused, model_dir, tmp_path):
    from transformers.utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        error = refused(*analysing(model_dir, tmp_path, "--use-flash-attention"))
        assert "flash attention is not available here: install flash-attn on a machine with a CUDA GPU, or" in error


def test_chat_template_that_is_not_there(refused, model_dir, tmp_path):
    folder = spoiled_model(model_dir, tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    for file in (*folder.glob("tokenizer*"), *folder.glob("chat_template*")):
        file.unlink()
    tokenizer.save_pretrained(folder)
    error = refused(*analysing(folder, tmp_path, "--chat-template"))
    assert "the model's tokenizer has no chat template: leave out --chat-template" in error


def test_code_of_a_model_is_not_run_unasked(refused, model_dir, tmp_path):
    folder = spoiled_model(model_dir, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "invented",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'was here')!r}, 'w')\n")
    assert "cannot be loaded" in refused(*analysing(folder, tmp_path))


@pytest.mark.parametrize(
    "spoiled",
    [("--steps", 0), ("--dataset", "{}/no.jsonl"), ("--device", "quantum"), ("--batch-size", 0), ("--shard", "9/9")],
    ids=lambda options: options[0],
)
def test_bad_input_costs_no_log_even_with_force(refused, loki, model_dir, tmp_path, spoiled):
    assert loki(*analysing(model_dir, tmp_path, "--steps", 1)).code == 0
    refused(*analysing(model_dir, tmp_path, "--force", *spoiled))


def test_a_model_that_is_none_costs_no_log_even_with_force(refused, loki, model_dir, tmp_path):
    assert loki(*analysing(model_dir, tmp_path, "--steps", 1)).code == 0
    refused(*analysing(tmp_path / "no-model", tmp_path, "--force"))


def test_device_that_is_not_there(refused, model_dir, tmp_path):
    import torch

    if not torch.cuda.is_available():
        error = refused("analyse", model_dir, "--output", tmp_path / "out.h5", "--device", "cuda")
        assert "device 'cuda' cannot be used here: leave --device out" in error


def spoiled_model(model_dir: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(model_dir, tmp_path / "spoiled"))


def test_model_with_damaged_weights(refused, model_dir, tmp_path):
    folder = spoiled_model(model_dir, tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    assert "with whole safetensors weights" in refused("analyse", folder, "--output", tmp_path / "out.h5")
    (tmp_path / "adapter").mkdir()
    merging = ("merge", "--model", folder, "--adapter", tmp_path / "adapter", "--output-dir", tmp_path / "merged")
    assert "shard 'model.safetensors' of model" in refused(*merging)


def test_pickled_weights_are_never_read(refused, model_dir, tmp_path):
    folder = spoiled_model(model_dir, tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "no file named model.safetensors" in refused("analyse", folder, "--output", tmp_path / "out.h5")


def test_model_without_tokenizer(refused, model_dir, tmp_path):
    folder = spoiled_model(model_dir, tmp_path)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "must hold its tokenizer files" in refused("analyse", folder, "--output", tmp_path / "out.h5")


def test_adapter_folder_that_is_none(refused, model_dir, tmp_path):
    (tmp_path / "adapter").mkdir()
    merging = ("merge", "--model", model_dir, "--adapter", tmp_path / "adapter", "--output-dir", tmp_path / "merged")
    assert "has no adapter_config.json: name the folder that `loki train` wrote" in refused(*merging)
    assert "has no adapter_config.json" in refused("evaluate", model_dir, "--adapter", tmp_path / "adapter")


def test_evaluating_against_a_model_of_another_form(refused, model_dir, tmp_path):
    make_model(hidden_size=24).save_pretrained(tmp_path / "wide")
    error = refused("evaluate", tmp_path / "wide", "--base", model_dir)
    assert "the two models are not of one form" in error
