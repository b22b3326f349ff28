"""Commands of the paper's public implementation: its script, its Makefile targets, and what docs/migrating.md says."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

import loki
from loki.analysis import plan
from loki.analysis.run import Analysis
from loki.cli.main import app
from loki.log import AttributionLog
from loki.prompts.mmlu import SUBJECTS

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "analyse_mmlu.py"
GUIDE = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
LAUNCHERS = ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION")
REQUIRED = ("--model_path", "owner/model", "--output_dir", "out", "--result_file", "kva.h5")
MANY = "anatomy"
"""The subject with more questions than the 50 that are taken when nothing is said."""

QWEN3, QWEN, LLAMA = "Qwen/Qwen3-0.6B", "Qwen/Qwen2.5-0.5B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"
# Model, log, batch size and what else the public Makefile has; the forms of qwen2 and two model-parallel ones are ours.
TARGETS = {
    "analysing_mmlu_qwen": (QWEN3, "kva_mmlu", "8"),
    "analysing_mmlu_qwen_batch": (QWEN, "kva_mmlu_batch", "16"),
    "analysing_mmlu_qwen_data_parallel": (QWEN, "kva_mmlu_data_parallel", "8", "--parallel_mode", "data"),
    "analysing_mmlu_qwen_model_parallel": (QWEN, "kva_mmlu_model_parallel", "8", "--parallel_mode", "model"),
    "analysing_mmlu_qwen2": (QWEN, "kva_mmlu", "8"),
    "analysing_mmlu_qwen2_batch": (QWEN, "kva_mmlu_batch", "16"),
    "analysing_mmlu_qwen2_data_parallel": (QWEN, "kva_mmlu_data_parallel", "8", "--parallel_mode", "data"),
    "analysing_mmlu_qwen2_model_parallel": (QWEN, "kva_mmlu_model_parallel", "8", "--parallel_mode", "model"),
    "analysing_mmlu_llama": (LLAMA, "kva_mmlu", "4"),
    "analysing_mmlu_llama_batch": (LLAMA, "kva_mmlu_batch", "4"),
    "analysing_mmlu_llama_data_parallel": (LLAMA, "kva_mmlu_data_parallel", "2", "--parallel_mode", "data"),
    "analysing_mmlu_llama_model_parallel": (LLAMA, "kva_mmlu_model_parallel", "4", "--parallel_mode", "model"),
    "test_analyse_qwen": (QWEN, "test_qwen", "8", "--max_samples_per_subset", "10"),
    "test_analyse_llama": (LLAMA, "test_llama", "4", "--max_samples_per_subset", "10"),
}


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def mmlu(tmp_path_factory) -> Path:
    """An invented MMLU of all 57 subjects."""
    directory = tmp_path_factory.mktemp("mmlu")
    rows = [
        {"subject": subject, "question": f"{subject} {n}?", "choices": ["yes", "no", f"{n}", "all"], "answer": n % 4}
        for subject in SUBJECTS
        for n in range(52 if subject == MANY else 2)
    ]
    (directory / "mmlu_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture
def script(monkeypatch, capsys) -> Callable[..., Done]:
    """`script("--steps", 3)` runs the script in this process."""

    def call(*flags) -> Done:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, flags)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        captured = capsys.readouterr()
        return Done(int(stop.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def analyse(script, model_dir, mmlu, tmp_path) -> Callable[..., Done]:
    """The script on the tiny model and a few questions of three subjects."""
    few = ("--subjects", "astronomy,marketing,virology", "--batch_size", 2)
    place = ("--model_path", model_dir, "--output_dir", tmp_path, "--result_file", "kva.h5", "--data_dir", mmlu)
    return lambda *flags: script(*place, *few, *flags)


@pytest.fixture
def arguments_of(monkeypatch) -> Callable[..., list[str]]:
    """What the script would run `loki` with."""

    def call(*flags) -> list[str]:
        ran = []
        monkeypatch.setattr("loki.cli.main.run", lambda: ran.append(sys.argv[1:]))
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, flags)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        assert len(ran) == 1
        return ran[0]

    return call


@dataclass
class Launcher:
    """Stands in for torch's launcher: notes what it is asked to start."""

    config: object = None
    command: tuple[str, ...] = ()
    error: BaseException | None = None

    def __call__(self, config, program):
        assert program == sys.executable
        self.config = config

        def start(*command):
            self.command = command
            if self.error is not None:
                raise self.error

        return start


@pytest.fixture
def launcher(monkeypatch) -> Launcher:
    fake = Launcher()
    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", fake)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # so that what the script sets is undone
    return fake


def read(path: Path) -> SimpleNamespace:
    with AttributionLog(path) as log:
        assert log.header is not None
        return SimpleNamespace(header=log.header, ids=log.prompts()[1], scores=np.concatenate(list(log.chunks())))


def names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()}


def value_of(arguments: list[str], option: str) -> str:
    assert arguments.count(option) == 1
    return arguments[arguments.index(option) + 1]


def interrupt_after(monkeypatch, number: int) -> list[int]:
    """Ctrl-C after so many batches; the list grows by one with each batch that is computed."""
    computed, attribute = [], Analysis.attribute

    def counted(analysis, places):
        if len(computed) == number:
            raise KeyboardInterrupt
        computed.append(len(places))
        return attribute(analysis, places)

    monkeypatch.setattr(Analysis, "attribute", counted)
    return computed


# What the flags mean


def test_defaults_are_those_of_the_public_implementation(arguments_of):
    assert shlex.join(arguments_of(*REQUIRED)) == (
        "analyse owner/model --dataset mmlu --output out/kva.h5 --split test --subjects 56 --samples-per-subject 50 "
        "--seed 42 --rule riemann_trapezoid --steps 7 --batch-size 4"
    )


@pytest.mark.parametrize(
    ("flags", "option", "value"),
    [
        (("--max_samples_per_subset", 3), "--samples-per-subject", "3"),
        (("--batch_size", 9), "--batch-size", "9"),
        (("--steps", 11), "--steps", "11"),
        (("--seed", 0), "--seed", "0"),
        (("--ig_method", "trapezoid"), "--rule", "riemann_trapezoid"),
        *(
            (("--ig_method", rule), "--rule", rule)
            for rule in ("riemann_left", "riemann_right", "riemann_middle", "riemann_trapezoid", "gausslegendre")
        ),
        (("--parallel_mode", "model"), "--device-map", "auto"),
        (("--data_dir", "a folder"), "--data-dir", "a folder"),
        (("--split", "dev"), "--split", "dev"),
        (("--subjects", "all"), "--subjects", "all"),
        (("--dataset", "own.jsonl"), "--dataset", "own.jsonl"),
        (("--log_dtype", "float16"), "--log_dtype", "float16"),  # not known here: `loki` reads it
    ],
)
def test_each_flag_with_a_value(arguments_of, flags, option, value):
    assert value_of(arguments_of(*REQUIRED, *flags), option) == value


def test_flags_without_a_value(arguments_of):
    plain = arguments_of(*REQUIRED)
    assert arguments_of(*REQUIRED, "--use_flash_attention") == [*plain, "--use-flash-attention"]
    assert arguments_of(*REQUIRED, "--dry_run") == [*plain, "--dry_run"]


def test_all_samples(arguments_of):
    assert "--samples-per-subject" not in arguments_of(*REQUIRED, "--max_samples_per_subset", "all")


def test_several_datasets(arguments_of):
    arguments = arguments_of(*REQUIRED, "--dataset", "probe", "--dataset", "mmlu")
    assert arguments[2:6] == ["--dataset", "probe", "--dataset", "mmlu"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--num_workers", 4),
        ("--log_interval", 5),
        ("--model_type", "llama"),
        ("--write_mode", "a"),
        ("--parallel_mode", "none"),
        ("--force",),  # nothing is there that could be replaced
    ],
)
def test_flags_that_change_no_argument(arguments_of, flags):
    assert arguments_of(*REQUIRED, *flags) == arguments_of(*REQUIRED)


def test_help_says_what_has_no_effect(script):
    done = script("--help")
    assert done.code == 0
    text = " ".join(done.out.split())
    for flag in ("--model_type MODEL_TYPE", "--num_workers NUM_WORKERS", "--log_interval LOG_INTERVAL"):
        assert f"{flag} accepted, has no effect:" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "the following arguments are required: --model_path, --output_dir, --result_file"),
        ((*REQUIRED, "--write_mode", "x"), "--write_mode: invalid choice: 'x'"),
        ((*REQUIRED, "--parallel_mode", "pipeline"), "--parallel_mode: invalid choice: 'pipeline'"),
        ((*REQUIRED, "--ig_method", "simpson"), "--ig_method: invalid choice: 'simpson'"),
        ((*REQUIRED, "--split", "train"), "--split: invalid choice: 'train'"),
        ((*REQUIRED, "--steps", "0"), "--steps: '0' is not possible: give a whole number from 1\n"),
        ((*REQUIRED, "--batch_size", "2.5"), "--batch_size: '2.5' is not possible: give a whole number from 1\n"),
        ((*REQUIRED, "--num_processes", "-1"), "--num_processes: '-1' is not possible: give a whole number from 1\n"),
        (
            (*REQUIRED, "--max_samples_per_subset", "none"),
            "--max_samples_per_subset: 'none' is not possible: give a whole number from 1, or all\n",
        ),
        ((*REQUIRED, "--seed", "x"), "--seed: invalid int value: 'x'"),
        ((*REQUIRED, "--no-such-flag"), "No such option: --no-such-flag"),
        ((*REQUIRED, "--force", "--write_mode", "a"), "--force makes a log anew, --write_mode a goes on with it"),
    ],
)
def test_bad_values_are_one_line(script, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    done = script(*flags)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not names(tmp_path)


# What the script does


def test_the_log_is_that_of_loki_analyse(script, model_dir, mmlu, tmp_path, monkeypatch):
    done = script(
        *("--model_path", model_dir, "--output_dir", tmp_path / "new" / "hdf5", "--result_file", "kva_mmlu.h5"),
        *("--data_dir", mmlu, "--max_samples_per_subset", 1),
    )
    assert done.code == 0, done.err
    log = read(tmp_path / "new" / "hdf5" / "kva_mmlu.h5")
    assert [name.split("_", 2)[2].rsplit("_", 1)[0] for name in log.ids] == [
        subject for subject in sorted(SUBJECTS) if subject != "high_school_mathematics"
    ]
    assert len(log.ids) == 56
    expected = tmp_path / "expected.h5"
    command = f"analyse {model_dir} --dataset mmlu --data-dir {mmlu} --subjects 56 --samples-per-subject 1 --seed 42"
    monkeypatch.setattr(
        sys, "argv", ["loki", *command.split(), "--rule=riemann_trapezoid", "--batch-size=4", f"--output={expected}"]
    )
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("loki", run_name="__main__")
    assert not stop.value.code
    assert read(expected).header == log.header
    np.testing.assert_array_equal(log.scores, read(expected).scores)
    with h5py.File(tmp_path / "new" / "hdf5" / "kva_mmlu.h5") as file:
        assert file["dataset"].dtype == np.float32


def test_fifty_questions_of_a_subject(analyse, tmp_path):
    assert analyse("--subjects", f"{MANY},virology", "--steps", 2, "--batch_size", 26).code == 0
    log = read(tmp_path / "kva.h5")
    assert sum(MANY in name for name in log.ids) == 50
    assert len(log.ids) == 52
    assert log.header.settings["steps"] == 2


def test_a_finished_log_is_replaced_with_force_only(analyse, tmp_path):
    assert analyse().code == 0
    first = (tmp_path / "kva.h5").read_bytes()

    done = analyse("--steps", 3)
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        f"analyse_mmlu.py: {tmp_path / 'kva.h5'} is there already: give --force to make it anew, "
        "--write_mode a to keep it, or another --result_file\n"
    )
    assert analyse("--write_mode", "a").code == 0
    done = analyse("--write_mode", "a", "--steps", 3)
    assert done.code == 2
    assert "exists already" in done.err
    assert (tmp_path / "kva.h5").read_bytes() == first

    assert analyse("--steps", 3, "--force").code == 0
    assert read(tmp_path / "kva.h5").header.settings["steps"] == 3
    assert names(tmp_path) == {"kva.h5"}


@pytest.mark.parametrize("flags", [("--write_mode", "w"), ("--write_mode", "a"), ("--force",)])
def test_an_unfinished_log_goes_on(analyse, tmp_path, monkeypatch, flags):
    monkeypatch.setattr(plan, "PROMPTS_PER_PART", 2)
    if flags == ("--force",):  # a replacement that is interrupted
        assert analyse("--steps", 3).code == 0
    with monkeypatch.context() as patch:
        assert len(interrupt_after(patch, 1)) == 0
        done = analyse(*flags)
    assert done.code == 130
    assert names(tmp_path) == {"kva.h5.parts"}

    done = analyse(*flags, "--steps", 5)
    assert done.code == 2
    assert "holds an unfinished log of other settings (steps: 7, here 5)" in done.err

    with monkeypatch.context() as patch:
        computed = interrupt_after(patch, 99)
        assert analyse(*flags).code == 0
    assert computed == [2, 2]  # of three batches
    resumed = read(tmp_path / "kva.h5")
    assert analyse("--result_file", "whole.h5").code == 0
    np.testing.assert_array_equal(resumed.scores, read(tmp_path / "whole.h5").scores)
    assert names(tmp_path) == {"kva.h5", "whole.h5"}


def test_model_parallel(analyse, tmp_path):
    assert analyse().code == 0
    assert analyse("--result_file", "spread.h5", "--parallel_mode", "model").code == 0
    np.testing.assert_array_equal(read(tmp_path / "spread.h5").scores, read(tmp_path / "kva.h5").scores)


def test_model_parallel_in_several_processes_is_refused(analyse, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = analyse("--parallel_mode", "model")
    assert done.code == 2
    assert done.err == (
        "analyse_mmlu.py: --parallel_mode model spreads the model over the devices of one process: "
        "leave the launcher out, or give --parallel_mode data\n"
    )
    assert not names(tmp_path)


# Data parallelism


def test_two_processes_give_the_log_of_one(analyse, model_dir, mmlu, tmp_path):
    assert analyse().code == 0
    command = [
        *(sys.executable, SCRIPT, "--model_path", model_dir, "--output_dir", tmp_path, "--result_file", "two.h5"),
        *("--data_dir", mmlu, "--subjects", "astronomy,marketing,virology", "--batch_size", "2"),
        *("--parallel_mode", "data", "--num_processes", "2"),
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "(process 1 of 2)" in done.stderr
    assert read(tmp_path / "two.h5").header == read(tmp_path / "kva.h5").header
    assert read(tmp_path / "two.h5").ids == read(tmp_path / "kva.h5").ids
    np.testing.assert_array_equal(read(tmp_path / "two.h5").scores, read(tmp_path / "kva.h5").scores)


def test_a_mistake_in_several_processes_is_a_line_of_each(tmp_path):
    command = [sys.executable, SCRIPT, *REQUIRED, "--parallel_mode", "data", "--num_processes", "2", "--no-such-flag"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert 1 <= len(lines) <= 2  # the launcher may stop the second before it speaks
    assert all(line.startswith("loki: No such option: --no-such-flag") for line in lines)
    assert not names(tmp_path)


@pytest.mark.parametrize(
    ("num_gpus", "flags", "expected"),
    [(0, (), 2), (3, (), 3), (3, ("--num_processes", 2), 2), (0, ("--num_processes", 4), 4)],
)
def test_processes_are_as_many_as_gpus(launcher, monkeypatch, num_gpus, flags, expected):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    os.environ.pop("OMP_NUM_THREADS")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *REQUIRED, "--parallel_mode", "data", *map(str, flags)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert launcher.config.nproc_per_node == expected
    assert (launcher.config.min_nodes, launcher.config.max_nodes, launcher.config.max_restarts) == (1, 1, 0)
    assert launcher.command[:4] == ("-m", "loki", "analyse", "owner/model")
    assert launcher.command[-2:] == ("--batch-size", "4")
    assert os.environ["OMP_NUM_THREADS"] == str(6 // expected)


def test_threads_of_the_users_choice_stay(launcher, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *REQUIRED, "--parallel_mode", "data", "--num_processes", "2"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert os.environ["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize("variable", LAUNCHERS)
def test_a_launchers_processes_start_none(arguments_of, launcher, monkeypatch, variable):
    monkeypatch.setenv(variable, "2")
    assert arguments_of(*REQUIRED, "--parallel_mode", "data", "--num_processes", 4) == arguments_of(*REQUIRED)
    assert launcher.config is None


def test_one_gpu_needs_no_launcher(arguments_of, launcher, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert arguments_of(*REQUIRED, "--parallel_mode", "data") == arguments_of(*REQUIRED)
    assert launcher.config is None


@pytest.mark.parametrize(
    ("codes", "code", "message"),
    [
        ((-15, 2), 2, ""),
        ((130, -15), 130, ""),
        (
            (-15, -9),
            1,
            "analyse_mmlu.py: a process was killed by signal 9 (9: often for want of memory); "
            "the same command goes on where it stopped\n",
        ),
    ],
)
def test_exit_codes_of_processes(script, launcher, codes, code, message):
    failures = {rank: SimpleNamespace(exitcode=value, timestamp=rank) for rank, value in enumerate(codes)}
    launcher.error = ChildFailedError.__new__(ChildFailedError)
    launcher.error.failures = failures
    done = script(*REQUIRED, "--parallel_mode", "data", "--num_processes", 2)
    assert (done.code, done.err) == (code, message)


def test_interrupted_processes(script, launcher):
    launcher.error = SignalException("stopped", 2)
    assert script(*REQUIRED, "--parallel_mode", "data", "--num_processes", 2).code == 130


# Makefile targets


def recipe(target: str, **variables: str) -> list[str]:
    """The command that `make` would run, as arguments."""
    given = ("MODEL", "DATA_DIR", "OUTPUT_DIR", "ARGS", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in given}
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "--old-file", ".venv/.installed", target]
        + [f"{name}={value}" for name, value in variables.items()],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return shlex.split(done.stdout)


@pytest.mark.parametrize("target", TARGETS)
def test_target(target, arguments_of):
    model, log, batch_size, *flags = TARGETS[target]
    folder = "test" if target.startswith("test") else model.split("/")[1]
    command = recipe(target)
    assert command == [
        *(".venv/bin/python", "scripts/analyse_mmlu.py", "--model_path", model),
        *("--output_dir", f"kva_result/hdf5/{folder}", "--result_file", f"{log}.h5", "--batch_size", batch_size),
        *flags,
    ]
    if "data" not in flags:
        assert arguments_of(*command[2:])[1] == model  # the script takes them


@pytest.mark.parametrize("target", TARGETS)
def test_target_with_everything_chosen(target):
    own = recipe(target, MODEL="/a folder/Tiny/", DATA_DIR="/my data", OUTPUT_DIR="/my logs", ARGS="--steps 3 --force")
    assert own[2:6] == ["--model_path", "/a folder/Tiny/", "--output_dir", "/my logs"]
    assert own[-5:] == ["--data_dir", "/my data", "--steps", "3", "--force"]
    assert own[6:-5] == recipe(target)[6:]


def test_the_folder_has_the_models_name():
    for model in ("models/Tiny", "models/Tiny/", "Tiny", "owner/Tiny"):
        assert value_of(recipe("analysing_mmlu_llama", MODEL=model), "--output_dir") == "kva_result/hdf5/Tiny"


# The guide


def table_rows() -> list[list[str]]:
    lines = [line for line in GUIDE.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def says_not_yet(row: list[str]) -> bool:
    return row[1] == "not yet"


def row_of(name: str) -> list[str]:
    rows = [row for row in table_rows() if re.search(rf"`{re.escape(name)}(?: \w+)?`", row[0])]
    assert len(rows) == 1, f"{name} has {len(rows)} rows"
    return rows[0]


def commands() -> Mapping[str, object]:
    return {info.name or info.callback.__name__.replace("_", "-"): info for info in app.registered_commands}


@pytest.mark.parametrize("target", TARGETS)
def test_the_guide_names_every_target(target):
    assert f"`{target}`" in GUIDE


def test_the_guide_has_every_flag_of_the_script(script):
    flags = set(re.findall(r"^  (--\w+)", script("--help").out, re.MULTILINE))
    assert {"--model_path", "--ig_method", "--force"} <= flags
    for flag in flags:
        assert re.search(rf"`{flag}[ `]", GUIDE), flag


@pytest.mark.parametrize("name", ["select-nodes", "create-model", "restore-model"])
def test_the_guide_knows_which_commands_are_there(name):
    assert says_not_yet(row_of(f"loki {name}")) == (name not in commands())


@pytest.mark.parametrize("name", ["create_loki_model", "restore_loki_model", "LoKILinear"])
def test_the_guide_knows_which_names_are_there(name):
    rows = [row for row in table_rows() if f"`{name}`" in row[0] and "Makefile" not in row[0]]
    assert rows
    for row in rows:
        assert says_not_yet(row) != hasattr(loki, name)


def test_commands_that_the_guide_offers_are_there():
    offered = {name for row in table_rows() for cell in row[1:] for name in re.findall(r"`loki ([a-z-]+)", cell)}
    offered |= set(re.findall(r"^loki ([a-z-]+)", GUIDE, re.MULTILINE))
    assert {"select-nodes", "merge", "train", "analyse", "merge-logs"} <= offered
    assert offered <= set(commands())


def test_python_names_that_the_guide_offers_are_there():
    import importlib

    offered = {name for row in table_rows() for cell in row[1:] for name in re.findall(r"`loki((?:\.\w+)+)", cell)}
    assert {".attribute", ".log.merge_logs", ".selection.run.select_to_file"} <= offered
    for name in offered:
        *module, attribute = name.split(".")
        # `loki.RowSelection.from_lists` is an attribute of an attribute.
        if module[1:] and module[1][0].isupper():
            assert hasattr(getattr(loki, module[1]), attribute), name
        elif not hasattr(importlib.import_module(".".join(["loki", *module[1:]])), attribute):
            importlib.import_module(f"loki{name}")
