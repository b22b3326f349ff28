import errno
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

from loki.errors import OutputError
from loki.log import assembly
from loki.log.assembly import sync_folder, write_log


class FailingFile:
    """The unbuffered file that HDF5 writes into: write number `fails_at` takes half, then raises; so do all later."""

    def __init__(self, file, fails_at, error):
        self._file, self._fails_at, self._error, self.num_writes = file, fails_at, error, 0

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, content):
        self.num_writes += 1
        if self._fails_at is None or self.num_writes < self._fails_at:
            return self._file.write(content)
        if self.num_writes == self._fails_at:
            self._file.write(content[: len(content) // 2])
        raise self._error


def arguments(make_header, num_prompts=40):
    rng = np.random.default_rng(0)
    order = rng.permutation(num_prompts)
    columns = {
        "dataset": rng.normal(size=(num_prompts, 3, 5)).astype(np.float32),
        "target_ids": np.arange(num_prompts),
        "num_tokens": np.arange(num_prompts),
        "completeness_gaps": np.zeros((num_prompts, 3), np.float32),
    }
    pieces = [(rows, {name: column[rows] for name, column in columns.items()}) for rows in np.split(order, 8)]
    return make_header(), [f"p{n}" for n in range(num_prompts)], np.arange(num_prompts), pieces


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt("stopped")], ids=["full", "interrupt"]
)
def test_a_write_that_fails_anywhere_inside_hdf5_is_raised_once(tmp_path, make_header, monkeypatch, error):
    """HDF5 itself would go on trying, and crash the interpreter at its end."""
    path, spool = tmp_path / "log.h5", assembly._Spool
    files = []

    def run(fails_at):
        files.append(None)
        monkeypatch.setattr(
            assembly,
            "_Spool",
            lambda file: spool(files.__setitem__(-1, FailingFile(file, fails_at, error)) or files[-1]),
        )
        write_log(path, *arguments(make_header))

    run(None)
    total = files[-1].num_writes
    assert total > 50  # 40 prompts, and HDF5's own tables
    for fails_at in range(1, total + 1):
        with pytest.raises(type(error), match=str(error.args[-1])) as caught:
            run(fails_at)
        assert caught.value is error
        assert files[-1].num_writes == fails_at  # not one more, after the first failure
    run(total + 1)
    with h5py.File(path) as file:
        assert file["dataset"].shape == (40, 3, 5)


IN_A_PROCESS_OF_ITS_OWN = """
import resource, sys
from pathlib import Path
import numpy as np
from loki.log.assembly import write_log
from loki.log.schema import LogHeader

num_bytes = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
N, L, D = 60, 3, 50
columns = {
    "dataset": np.ones((N, L, D), "f4"), "target_ids": np.ones(N, "i8"), "num_tokens": np.ones(N, "i8"),
    "completeness_gaps": np.ones((N, L), "f4"),
}
try:
    write_log(Path(sys.argv[1]), LogHeader({}, "", "", {}, L, D), ["p"] * N, np.arange(N), [(np.arange(N), columns)])
    print("written")
except OSError as error:
    print(error.strerror)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit stands for a full disk on Linux only")
def test_a_file_system_that_takes_no_more_bytes_crashes_nothing(tmp_path):
    """No stand-ins: the kernel refuses to let the file grow; the log has 48,048 bytes, 36,000 of them scores."""
    said = {}
    for num_bytes in (0, 1000, 20_000, 46_000, 60_000):
        done = subprocess.run(
            [sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN, str(tmp_path / "log.h5"), str(num_bytes)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        said[num_bytes] = done.stdout.strip()
    assert said == dict.fromkeys((0, 1000, 20_000, 46_000), "File too large") | {60_000: "written"}


def test_a_write_in_pieces_is_completed(tmp_path, make_header, monkeypatch, read_datasets):
    """The system may take fewer bytes than it is given."""

    class Slow(FailingFile):
        def write(self, content):
            return self._file.write(content[:7])

    spool = assembly._Spool
    write_log(tmp_path / "whole.h5", *arguments(make_header))
    monkeypatch.setattr(assembly, "_Spool", lambda file: spool(Slow(file, None, None)))
    write_log(tmp_path / "slow.h5", *arguments(make_header))
    assert read_datasets(tmp_path / "slow.h5") == read_datasets(tmp_path / "whole.h5")


def test_what_cannot_be_read_back_is_raised_too(tmp_path, make_header, monkeypatch):
    class Unreadable(FailingFile):
        def read(self, _num_bytes):
            raise OSError(errno.EIO, "Input/output error")

    spool = assembly._Spool
    monkeypatch.setattr(assembly, "_Spool", lambda file: spool(Unreadable(file, None, None)))
    with pytest.raises(OSError, match="Input/output error"):
        write_log(tmp_path / "log.h5", *arguments(make_header))


@pytest.mark.parametrize("rows", [[0, 1, 1], [0, 1]])
def test_rows_filled_twice_or_never_are_our_own_mistake(tmp_path, make_header, rows):
    header, ids, index_N, _ = arguments(make_header, 40)
    columns = {"dataset": np.zeros((1, 3, 5)), "completeness_gaps": np.zeros((1, 3))}
    columns |= dict.fromkeys(("target_ids", "num_tokens"), np.zeros(1))
    with pytest.raises(AssertionError, match="filled"):
        write_log(tmp_path / "log.h5", header, ids[:3], index_N[:3], [(np.array([row]), columns) for row in rows])


@pytest.mark.parametrize(("code", "is_raised"), [(errno.EIO, True), (errno.EINVAL, False), (errno.ENOTSUP, False)])
def test_a_folder_is_flushed_where_the_file_system_can(tmp_path, monkeypatch, code, is_raised):
    flushed = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
        sync_folder(tmp_path)
    assert flushed == [tmp_path.stat().st_ino]

    def fails(_descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fails)
    if is_raised:
        with pytest.raises(OutputError, match=r"cannot write .*: Input/output error"):
            sync_folder(tmp_path)
    else:
        sync_folder(tmp_path)
