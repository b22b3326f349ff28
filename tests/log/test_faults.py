"""No fault loses what is done: every step that changes the disk fails, once or for good, or never comes."""

import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest

from loki.errors import OutputError
from loki.log import merge_logs


class Killed(BaseException):
    """The process is no more: nothing catches this, and nothing that it would do afterwards reaches the disk."""


class CountedFile:
    """An open file whose writing steps are counted; a write that fails has written half."""

    def __init__(self, file, step):
        self._file, self._step = file, step

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_what):
        self.close()

    def write(self, content):
        self._step("write", lambda: self._file.write(memoryview(content).cast("B")[: len(content) // 2]))
        return self._file.write(content)

    def truncate(self, size=None):
        self._step("truncate")
        return self._file.truncate(size)

    def close(self):
        self._file.close()
        self._step("close file")


class Faults:
    """Counts the steps that change the disk, and makes one of them fail."""

    CALLS = ("mkdir", "open", "close", "fsync", "chmod", "replace", "unlink", "rmdir")

    def __init__(self, monkeypatch):
        self._monkeypatch = monkeypatch
        self.steps, self.happened = Counter(), False

    @contextmanager
    def at(self, kind, number):
        """Let step `number`, counted from 1, fail: `full` (once), `broken` (from then on), `killed`."""
        self.steps, self.happened = Counter(), False

        def step(name, before_failing=lambda: None):
            self.steps[name] += 1
            if self.steps.total() < number or (kind == "full" and self.happened):
                return
            if not self.happened:
                before_failing()
            self.happened = True
            if kind == "killed":
                raise Killed
            code = errno.ENOSPC if kind == "full" else errno.EIO
            raise OSError(code, os.strerror(code))

        def counted(name, call):
            def wrapped(*arguments, **options):
                if name == "close":  # it lets go of the descriptor also where it fails
                    call(*arguments, **options)
                    return step(name)
                step(name)
                return call(*arguments, **options)

            return wrapped

        with self._monkeypatch.context() as patch:
            for name in self.CALLS:
                patch.setattr(os, name, counted(name, getattr(os, name)))
            path_open = Path.open

            def open_counted(path, mode="r", *arguments, **options):
                if mode in {"r", "rb"}:
                    return path_open(path, mode, *arguments, **options)
                step("open file")
                return CountedFile(path_open(path, mode, *arguments, **options), step)

            patch.setattr(Path, "open", open_counted)
            yield


@pytest.fixture
def faults(monkeypatch):
    return Faults(monkeypatch)


def names(directory):
    return {entry.name for entry in directory.iterdir()}


def assert_one_line(error, kind):
    if kind == "killed":
        assert isinstance(error, Killed)
    else:
        assert isinstance(error, OutputError), repr(error)
        assert "\n" not in str(error)
        assert os.strerror(errno.ENOSPC if kind == "full" else errno.EIO) in str(error)
        assert str(error).startswith("cannot write ")


@pytest.mark.parametrize("kind", ["full", "broken", "killed"])
def test_no_fault_of_any_step_loses_a_batch(tmp_path, scores, read_datasets, faults, kind, caplog):
    whole = read_datasets(scores.write_log(tmp_path / "whole.h5"))
    for number in itertools.count(1):
        directory = tmp_path / str(number)
        directory.mkdir()
        path, kept, error = directory / "log.h5", [], None
        caplog.clear()
        with faults.at(kind, number):
            try:
                writer = scores.writer(path)
                for index in writer.missing_batches():
                    writer.write_batch(index, scores.batch(writer.batches[index]))
                    kept.append(index)
                writer.finish()
            except (Exception, Killed) as raised:
                error = raised
        if not faults.happened:
            break
        if error is not None:
            assert_one_line(error, kind)
        else:  # a step that can be done without, or one after the log was in place
            assert path.exists()
        if path.exists():
            assert read_datasets(path) == whole, number
            assert names(directory) == {"log.h5"} or error is not None or "cannot be removed" in caplog.text

        again = scores.writer(path)
        assert set(scores.write_missing(again)).isdisjoint(kept), number
        again.finish()
        assert read_datasets(path) == whole
        assert names(directory) == {"log.h5"}
    # All kinds of steps were met, and the five prompts and three batches have their share of them.
    assert set(faults.steps) == {*Faults.CALLS, "open file", "write", "truncate", "close file"}
    assert faults.steps["fsync"] == 1 + 3 + 2  # manifest, parts, the log and its folder
    assert faults.steps["replace"] == 1 + 3 + 1
    assert number == faults.steps.total() + 1 > 80


@pytest.mark.parametrize("kind", ["full", "broken", "killed"])
def test_no_fault_of_any_step_spoils_a_merge(tmp_path, scores, read_datasets, faults, kind):
    whole = read_datasets(scores.write_log(tmp_path / "whole.h5"))
    shards = scores.write_shards(tmp_path, 2)
    before = [shard.read_bytes() for shard in shards]
    for number in itertools.count(1):
        directory = tmp_path / str(number)
        directory.mkdir()
        path, error = directory / "log.h5", None
        with faults.at(kind, number):
            try:
                merge_logs(shards, path)
            except (Exception, Killed) as raised:
                error = raised
        if not faults.happened:
            break
        if error is not None:
            assert_one_line(error, kind)
        else:
            assert path.exists()
        if path.exists():
            assert read_datasets(path) == whole, number
        merge_logs(shards, path, force=path.exists())
        assert read_datasets(path) == whole
        assert names(directory) == {"log.h5"}
        assert [shard.read_bytes() for shard in shards] == before
    assert set(faults.steps) >= {"mkdir", "replace", "fsync", "rmdir", "open file", "write"}
    assert faults.steps["fsync"] == 2  # the log and its folder
    assert number == faults.steps.total() + 1 > 30


WRITES_MANY_BATCHES = """
import json, sys, time
from pathlib import Path
import numpy as np
from loki.errors import LokiError
from loki.log import LogHeader, LogWriter
from loki.log.writer import Batch

N, L, D = 800, 3, 5
path, header, rank, num_ranks, pause = json.loads(sys.argv[1])
scores = np.random.default_rng(0).normal(size=(N, L, D)).astype(np.float32)
plan = np.random.default_rng(1).permutation(N).reshape(-1, 2).tolist()
writer = LogWriter(Path(path), LogHeader(**header), [f"p{n}" for n in range(N)], plan)
for index in writer.missing_batches(rank, num_ranks):
    n = plan[index]
    writer.write_batch(index, Batch(scores[n], np.array(n), np.array(n), np.zeros((len(n), L), np.float32)))
    print(index, flush=True)
    time.sleep(pause)
if rank == 0:
    print("assembling", flush=True)
    try:
        writer.finish()
        print("finished", flush=True)
    except LokiError as error:
        print(error)
"""
NUM_BATCHES = 400

needs_sigkill = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")


@pytest.fixture
def start(make_header):
    def call(path, rank=0, num_ranks=1, pause=0):
        arguments = json.dumps([str(path), make_header().as_dict(), rank, num_ranks, pause])
        return subprocess.Popen(
            [sys.executable, "-c", WRITES_MANY_BATCHES, arguments],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            text=True,
        )

    return call


def lines_of(process):
    return [line.strip() for line in process.stdout]


def batches_of(process):
    return [int(line) for line in lines_of(process) if line.isdigit()]


@needs_sigkill
def test_kills_at_random_moments_lose_at_most_the_batch_in_flight(tmp_path, start, read_datasets):
    """Real ones: 15 while batches are written, 5 while the log is assembled and the parts are removed."""
    random_moment = random.Random(0)
    with start(tmp_path / "whole.h5") as process:
        assert lines_of(process) == [*map(str, range(NUM_BATCHES)), "assembling", "finished"]
    whole, path = read_datasets(tmp_path / "whole.h5"), tmp_path / "log.h5"

    kept, num_kills = [], 0
    for moment in [*(["writing"] * 15), *(["assembling"] * 5)]:
        with start(path) as process:
            wait_for = random_moment.randint(1, 20)
            for count, line in enumerate(process.stdout, start=1):
                if line.strip().isdigit():
                    kept.append(int(line))
                if (moment == "writing" and count == wait_for) or line == "assembling\n":
                    break
            time.sleep(random_moment.uniform(0, 0.01 if moment == "writing" else 0.1))
            process.send_signal(signal.SIGKILL)
            kept += batches_of(process)
        num_kills += process.returncode == -signal.SIGKILL
        assert len(kept) == len(set(kept))  # no batch that was reported as kept is done again
        assert not path.exists() or read_datasets(path) == whole
    assert num_kills >= 15
    with start(path) as process:
        kept += batches_of(process)
    assert process.returncode == 0
    assert len(kept) == len(set(kept))
    assert NUM_BATCHES - num_kills <= len(kept)  # a batch may be whole, and its process killed before it says so
    assert read_datasets(path) == whole
    assert names(tmp_path) == {"whole.h5", "log.h5"}


@needs_sigkill
def test_processes_share_a_log_and_one_that_is_killed_leaves_its_batches_to_the_next_run(
    tmp_path, start, read_datasets
):
    with start(tmp_path / "whole.h5") as process:
        process.wait()
    path = tmp_path / "log.h5"
    with start(path, 1, 3) as one, start(path, 2, 3, pause=0.1) as two:
        begun = [one.stdout.readline(), two.stdout.readline()]
        two.send_signal(signal.SIGKILL)
        kept_by_two = len(batches_of(two)) + 1
        assert [1, *batches_of(one)] == list(range(1, NUM_BATCHES, 3))
    assert begun == ["1\n", "2\n"]
    with start(path, 0, 3) as zero:
        *kept, assembling, error = lines_of(zero)
    assert (list(map(int, kept)), assembling) == (list(range(0, NUM_BATCHES, 3)), "assembling")
    num_lacking = len(range(2, NUM_BATCHES, 3)) - kept_by_two
    in_flight = f"lacks {num_lacking - 1} of"  # whole, and killed before saying so
    assert f"lacks {num_lacking} of {NUM_BATCHES} batches: run the analysis again" in error or in_flight in error
    assert not path.exists()

    with start(path) as process:
        *again, _, finished = lines_of(process)
    assert finished == "finished"
    assert num_lacking - 1 <= len(again) <= num_lacking
    assert read_datasets(path) == read_datasets(tmp_path / "whole.h5")
    assert names(tmp_path) == {"whole.h5", "log.h5"}
