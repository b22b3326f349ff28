"""Several processes at one analysis: they find each other, lose nothing, and end together."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from warm import WarmProcess, WarmRanks

from loki.analysis import ranks as ranks_module
from loki.analysis.ranks import Ranks
from loki.errors import InputError

TIMEOUT = 180
"""Seconds; every launch here takes about 10 on a quiet machine, and a hang would take days."""
LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in (*LAUNCHED, "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)


def set_variables(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": ""}, {"RANK": "1"}])
def test_a_process_without_a_launcher_is_alone(monkeypatch, caplog, variables):
    set_variables(monkeypatch, **variables)
    ranks = Ranks.from_launcher()
    assert ranks == Ranks(0, 1, None)
    assert ranks.is_first
    ranks.wait_for_all()
    ranks.leave()
    assert caplog.text == ""


def test_accelerate_that_started_one_process_instead_of_several_is_told(monkeypatch, caplog):
    """On a CPU `accelerate launch --num_processes 2` starts one, and says nothing."""
    set_variables(monkeypatch, MASTER_ADDR="127.0.0.1", ACCELERATE_MIXED_PRECISION="no")
    assert Ranks.from_launcher() == Ranks()
    assert "accelerate launch started a single process" in caplog.text
    assert "--multi_gpu" in caplog.text


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": 2}, "WORLD_SIZE=2 but no RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start several"),
        (
            {"WORLD_SIZE": 4, "RANK": 0, "LOCAL_RANK": 0},
            "WORLD_SIZE=4 but no MASTER_ADDR, MASTER_PORT: start several processes with accelerate launch or torchrun",
        ),
        (
            {"WORLD_SIZE": "two", "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1},
            "WORLD_SIZE=two: start several processes with accelerate launch or torchrun, or unset WORLD_SIZE",
        ),
        (
            {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "door"},
            "the 2 processes cannot meet at 127.0.0.1:door",
        ),
        # The others never come.
        (
            {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0},
            "the 2 processes cannot meet at 127.0.0.1:0",
        ),
    ],
)
def test_an_environment_that_no_launcher_made(monkeypatch, variables, message):
    monkeypatch.setattr(ranks_module, "MEETING", timedelta(seconds=1))
    set_variables(monkeypatch, **variables)
    started = time.monotonic()
    with pytest.raises(InputError, match=message) as raised:
        Ranks.from_launcher()
    assert "\n" not in str(raised.value)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("accelerator", "use_cpu", "local_rank", "device"),
    [
        ("cuda", None, 0, "cuda:0"),
        ("cuda", None, 1, "cuda:1"),
        ("cuda", None, 3, "cuda:1"),  # more processes than devices share them
        ("cuda", "False", 1, "cuda:1"),
        ("cuda", "true", 1, "cpu"),
        ("mps", None, 0, "mps:0"),
        (None, None, 1, "cpu"),
    ],
)
def test_each_process_has_a_device_of_its_own(monkeypatch, accelerator, use_cpu, local_rank, device):
    found = None if accelerator is None else torch.device(accelerator)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    if use_cpu is not None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", use_cpu)
    assert ranks_module._device(local_rank) == device


MEET = """
import os, sys, time
from loki.analysis.ranks import Ranks
from loki.errors import LokiError
ranks = Ranks.from_launcher()
print(ranks.rank, ranks.num_ranks, ranks.device, ranks.is_first, flush=True)
if ranks.rank == 1:
    time.sleep(0.5)
    if sys.argv[1] == "dies":
        os._exit(9)
before = time.monotonic()
try:
    ranks.wait_for_all()
    ranks.leave()
    print(f"waited {time.monotonic() - before:.3f}")
except LokiError as error:
    print(error)
"""


def by_hand(num_processes, *program):
    """Exit code and standard error of several processes."""
    with WarmRanks(num_processes, *program) as started:
        _, error = started.communicate(timeout=TIMEOUT)
        return started.returncode, error


def meet(tmp_path, what):
    script = tmp_path / "meet.py"
    script.write_text(MEET)
    with WarmRanks(2, script, what) as started:
        return [out.splitlines() for out, _ in started.outputs(timeout=TIMEOUT)]


def test_processes_meet_and_wait_for_each_other(tmp_path):
    first, second = meet(tmp_path, "lives")
    device = ranks_module._device(0)
    assert first[0] == f"0 2 {device} True"
    assert second[0] == f"1 2 {ranks_module._device(1)} False"
    assert float(first[1].removeprefix("waited ")) > 0.3
    assert float(second[1].removeprefix("waited ")) < 0.3


def test_a_process_whose_peer_dies_ends_with_one_line(tmp_path):
    first, second = meet(tmp_path, "dies")
    assert len(second) == 1
    assert first[1:] == [
        "another process ended before its work was done: see what it said; the same command goes on where this one "
        "stopped"
    ]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """304 prompts of 1 to 40 bytes: 19 parts of 16."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("prompts") / "many.jsonl"
    texts = ("".join(rng.choices("abcdefgh ", k=rng.randint(1, 40))) + "x" for _ in range(304))
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


NUM_PARTS = 19


@pytest.fixture(scope="module")
def command(prompts, model_dir):
    return ["analyse", str(model_dir), "--dataset", str(prompts)]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The log of one process, in bytes."""
    path = tmp_path_factory.mktemp("whole") / "kva.h5"
    with WarmProcess("-m", "loki", *command, "--output", path) as process:
        assert process.wait(TIMEOUT) == 0, process.communicate()
    return path.read_bytes()


def run(arguments):
    return subprocess.run(arguments, capture_output=True, text=True, timeout=TIMEOUT, check=False, cwd="/")


def torchrun(num_processes, *program):
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc_per_node={num_processes}", *map(str, program)),
    ]


def accelerate(num_processes, *program):
    """Without GPUs too, several processes need `--multi_gpu`; `--cpu` starts one."""
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={num_processes}"),
        *("--main_process_port=0", *map(str, program)),
    ]


@contextmanager
def started(arguments):
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()


def part_files(output):
    """Part files by inode and time: one that is written again is another."""
    found = output.with_name(output.name + ".parts").glob("batch-*.safetensors")
    return {(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def rank_of(pid):
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((int(value[5:]) for value in variables if value.startswith(b"RANK=")), None)


def process_of_rank(launcher, rank):
    """The process id of one rank among the launcher's children."""
    if isinstance(launcher, WarmRanks):
        return launcher.processes[rank].pid
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    while launcher.poll() is None:
        for pid in children.read_text().split():
            if rank_of(pid) == rank:
                return int(pid)
        time.sleep(0.01)
    pytest.fail("the launcher ended before its processes began")


def wait_for_parts(launcher, output, number):
    while launcher.poll() is None and len(part_files(output)) < number:
        time.sleep(0.005)


def test_torchrun_gives_the_log_of_one_process(command, whole, tmp_path):
    output = tmp_path / "kva.h5"
    done = run(torchrun(2, "-m", "loki", *command, "--output", output))
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["kva.h5"]
    assert "analysing (process 1 of 2)" in done.stderr
    assert "160/160" in " ".join(done.stderr.split())  # parts 0, 2, … 18: none is done twice
    assert done.stderr.count("wrote ") == 1


@pytest.mark.real
def test_accelerate_gives_the_log_of_one_process(command, whole, tmp_path):
    output = tmp_path / "kva.h5"
    done = run(accelerate(2, "-m", "loki", *command, "--output", output))
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() == whole
    assert "analysing (process 1 of 2)" in done.stderr


@pytest.mark.real
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the processes of a launcher in /proc")
@pytest.mark.parametrize(
    ("launch", "again", "reason"),
    [
        (lambda *program: started(torchrun(*program)), 2, "SIGKILL"),
        (WarmRanks, 3, "loki: another process ended before its work was done"),
        (WarmRanks, 1, "loki: another process ended before its work was done"),
    ],
    ids=["torchrun-2", "by-hand-3", "by-hand-1"],
)
def test_a_rank_that_is_killed_loses_one_part_and_any_number_of_processes_goes_on(
    command, whole, tmp_path, launch, again, reason
):
    output = tmp_path / "kva.h5"
    program = ["-m", "loki", *command, "--output", str(output)]
    with launch(2, *program) as launcher:
        victim = process_of_rank(launcher, 1)
        wait_for_parts(launcher, output, 4)
        os.kill(victim, signal.SIGKILL)
        _, error = launcher.communicate(timeout=TIMEOUT)
    assert launcher.returncode != 0
    assert reason in error
    assert not output.exists()
    kept = part_files(output)
    assert 4 <= len(kept) < NUM_PARTS

    with launch(again, *program) as launcher:
        wait_for_parts(launcher, output, len(kept) + 1)
        assert launcher.poll() is not None or kept < part_files(output)
        _, error = launcher.communicate(timeout=TIMEOUT)
    assert launcher.returncode == 0, error
    assert output.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["kva.h5"]


@pytest.mark.real
def test_force_with_several_processes_starts_from_nothing(command, whole, tmp_path):
    """One of them removes what was there, before another begins."""
    output = tmp_path / "kva.h5"
    program = ["-m", "loki", *command, "--output", str(output)]
    assert by_hand(1, *program, "--steps", "2")[0] == 0
    code, error = by_hand(2, *program)
    assert code != 0
    assert "kva.h5 exists already: remove it or choose another output file" in error
    code, error = by_hand(2, *program, "--force")
    assert code == 0, error
    assert output.read_bytes() == whole


FAILS_IN_RANK_1 = """
import os, resource, sys
from loki.cli.main import run
if os.environ["RANK"] == "1":
    if sys.argv.pop(1) == "input":
        sys.argv[sys.argv.index("--dataset") + 1] = "no.jsonl"
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
else:
    del sys.argv[1]
run()
"""


@pytest.mark.real
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("input", "loki: dataset 'no.jsonl' is unknown: choose probe, mmlu or a JSON Lines file that exists"),
        ("disk", ".safetensors: File too large"),
    ],
)
def test_an_error_in_one_process_ends_all_with_one_line(command, whole, tmp_path, what, message):
    script, output = tmp_path / "fails.py", tmp_path / "kva.h5"
    script.write_text(FAILS_IN_RANK_1)
    done = run(torchrun(2, script, what, *command, "--output", output))
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("loki: ")]
    # The other one is ended by the launcher, and may have time to say that it waits for nobody.
    lines = [line for line in lines if not line.startswith("loki: another process ended before its work was done")]
    assert len(lines) == 1, done.stderr
    assert message in lines[0]
    assert "loki/cli/main.py" not in done.stderr  # no traceback of ours
    assert not output.exists()
    assert by_hand(2, "-m", "loki", *command, "--output", output)[0] == 0
    assert output.read_bytes() == whole
