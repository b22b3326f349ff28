import errno
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loki.errors import ArtefactError, InputError, LokiError, OutputError
from loki.log import AttributionLog, LogWriter, schema
from loki.log import writer as writer_module

PARTS = "log.h5.parts"


@pytest.fixture
def scores(make_scores):
    """Five prompts: at batch size 2 the last of three batches is short."""
    return make_scores(5)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "log.h5"


def content_of(path: Path):
    with AttributionLog(path) as log:
        columns = [log.column(name) for name in (schema.TARGET_IDS, schema.NUM_TOKENS, schema.COMPLETENESS_GAPS)]
        ids = [text.decode() for text in log.column(schema.PROMPT_IDS)]
        return log.header, np.concatenate(list(log.chunks())), *columns, ids


def names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()}


def assert_holds(path: Path, scores):
    _, found, targets, num_tokens, gaps, ids = content_of(path)
    np.testing.assert_array_equal(found, scores.scores_NLD)
    np.testing.assert_array_equal(targets, scores.target_ids_N)
    np.testing.assert_array_equal(num_tokens, scores.num_tokens_N)
    np.testing.assert_array_equal(gaps, scores.completeness_gaps_NL)
    assert ids == scores.prompt_ids


def part_of(path: Path, index: int) -> Path:
    (part,) = path.with_name(PARTS).glob(f"batch-{index:06d}-*")
    return part


@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])
def test_what_is_written_is_read_back(path, scores, make_header, batch_size):
    writer = scores.writer(path, batch_size=batch_size)
    scores.write_missing(writer)
    writer.finish()
    assert_holds(path, scores)
    assert content_of(path)[0] == make_header()
    assert names(path.parent) == {"log.h5"}


def test_the_file_follows_the_published_layout(path, scores):
    """Plain h5py: name, shape, dtype and chunks by prompts; columns typed as the schema says."""
    writer = scores.writer(path)
    scores.write_missing(writer)
    writer.finish()
    with h5py.File(path) as file:
        assert file["dataset"].shape == (5, 3, 5)
        assert file["dataset"].dtype == np.float32
        assert file["dataset"].chunks == (1, 3, 5)
        assert file["target_ids"].dtype == file["num_tokens"].dtype == np.int64
        assert set(file.attrs) == {"header"}


def test_float16_is_kept_on_request(path, scores):
    writer = scores.writer(path, dtype="float16")
    scores.write_missing(writer)
    writer.finish()
    with h5py.File(path) as file:
        assert file["dataset"].dtype == np.float16
        np.testing.assert_array_equal(file["dataset"][:], scores.scores_NLD.astype(np.float16))


def test_order_of_writing_does_not_matter(path, scores):
    writer = scores.writer(path)
    for index in (2, 0, 1):
        writer.write_batch(index, scores.batch(writer.batch_slice(index)))
    writer.finish()
    assert_holds(path, scores)


@given(num_prompts=st.integers(1, 50), batch_size=st.integers(1, 60))
def test_batches_cover_every_prompt_once_in_order(tmp_path_factory, make_scores, num_prompts, batch_size):
    path = tmp_path_factory.mktemp("cover") / "log.h5"
    writer = make_scores(num_prompts).writer(path, batch_size=batch_size)
    prompts = list(range(num_prompts))
    covered = [prompts[writer.batch_slice(index)] for index in range(writer.num_batches)]
    assert list(itertools.chain(*covered)) == prompts
    assert all(1 <= len(batch) <= batch_size for batch in covered)


def test_a_killed_run_goes_on_behind_its_whole_parts(path, scores):
    first = scores.writer(path)
    first.write_batch(1, scores.batch(first.batch_slice(1)))
    whole = part_of(path, 1).read_bytes()
    (path.with_name(PARTS) / ".batch-000002-0000.safetensors.x1").write_bytes(b"cut off while writing")

    second = scores.writer(path)
    assert scores.write_missing(second) == [0, 2]
    assert part_of(path, 1).read_bytes() == whole
    second.finish()
    assert_holds(path, scores)
    assert names(path.parent) == {"log.h5"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: bytes([content[0] ^ 255]) + content[1:],
        lambda content: content + b"\0",
    ],
    ids=["torn", "empty", "one bit", "first byte", "longer"],
)
def test_a_damaged_part_is_computed_again(path, scores, damage):
    first = scores.writer(path)
    scores.write_missing(first)
    part = part_of(path, 1)
    part.write_bytes(damage(part.read_bytes()))
    with pytest.raises(ArtefactError, match="lacks 1 of 3 batches: run the analysis again"):
        first.finish()
    assert not path.exists()

    second = scores.writer(path)
    assert scores.write_missing(second) == [1]
    second.finish()
    assert_holds(path, scores)


def test_a_damaged_part_beside_the_right_one_does_no_harm(path, scores):
    writer = scores.writer(path)
    scores.write_missing(writer)
    for checksum in ("0" * 16, "f" * 16):
        (path.with_name(PARTS) / f"batch-000000-{checksum}.safetensors").write_bytes(b"torn")
    assert writer.missing_batches() == []
    writer.finish()
    assert_holds(path, scores)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", {"architecture": "llama-3x5x7", "weights": "beef", "dtype": "float32"}),
        ("model_name", "another"),
        ("prompts", "probe 5678"),
        ("settings", {"rule": "riemann_right", "steps": 7}),
        ("num_layers", 4),
        ("num_rows", 6),
        ("dtype", "float16"),
    ],
)
def test_an_unfinished_log_of_other_settings_is_refused(path, scores, key, value):
    scores.writer(path)
    with pytest.raises(ArtefactError, match=f"unfinished log of other {key}: run with the same settings"):
        scores.writer(path, **{key: value})
    assert scores.writer(path).missing_batches() == [0, 1, 2]


def test_other_prompts_and_batch_size_are_refused(path, scores, make_scores):
    scores.writer(path)
    with pytest.raises(ArtefactError, match="unfinished log of other batch_size:"):
        scores.writer(path, batch_size=3)
    with pytest.raises(ArtefactError, match="unfinished log of other num_prompts, prompt_ids:"):
        make_scores(6).writer(path)
    scores.prompt_ids.reverse()
    with pytest.raises(ArtefactError, match="unfinished log of other prompt_ids:"):
        scores.writer(path)


def test_other_package_versions_may_go_on(path, scores):
    scores.writer(path, versions={"torch": "1"})
    scores.writer(path, versions={"torch": "2"})


def test_a_damaged_manifest_is_refused(path, scores):
    scores.writer(path)
    (path.with_name(PARTS) / "manifest.json").write_text("{")
    with pytest.raises(ArtefactError, match=r"manifest of the unfinished log .* is not JSON"):
        scores.writer(path)


def test_no_prompts_and_no_batch_size_are_refused(path, scores, make_header):
    with pytest.raises(InputError, match="no prompts to analyse: give at least one"):
        LogWriter(path, make_header(), [], batch_size=2)
    for size in (0, -1):
        with pytest.raises(InputError, match=f"batch size {size} is not possible: give 1 or more"):
            scores.writer(path, batch_size=size)
    assert names(path.parent) == set()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused_with_their_place(path, scores, value):
    scores.scores_NLD[3, 1, 4] = value
    writer = scores.writer(path)
    with pytest.raises(InputError, match=r"prompt 'prompt/3é' is not finite at layer 1, row 4.*float32 or bfloat16"):
        writer.write_batch(1, scores.batch(writer.batch_slice(1)))
    assert writer.missing_batches() == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_scores_that_overflow_the_logs_own_dtype_are_refused(path, scores):
    """A log that its reader refuses must not be written: 70000 is finite in float32 and infinite in float16."""
    scores.scores_NLD[0, 0, 0] = 70000
    writer = scores.writer(path, dtype="float16")
    with pytest.raises(InputError, match="not finite at layer 0, row 0"):
        writer.write_batch(0, scores.batch(writer.batch_slice(0)))


def test_a_batch_of_another_size_is_refused(path, scores):
    """One prompt in place of two would be copied to both, were it let through."""
    writer = scores.writer(path)
    with pytest.raises((LokiError, ValueError, AssertionError)):
        writer.write_batch(0, scores.batch(slice(0, 1)))
    assert writer.missing_batches() == [0, 1, 2]


def test_finish_needs_every_batch(path, scores):
    writer = scores.writer(path)
    writer.write_batch(0, scores.batch(writer.batch_slice(0)))
    with pytest.raises(ArtefactError, match="lacks 2 of 3 batches: run the analysis again"):
        writer.finish()
    assert not path.exists()


def raises_no_space(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


PART_STEPS = [
    (tempfile, "TemporaryFile"),
    (tempfile, "mkstemp"),
    (Path, "open"),
    (os, "fsync"),
    (Path, "chmod"),
    (Path, "replace"),
]


@pytest.mark.parametrize(("owner", "step"), PART_STEPS, ids=[step for _, step in PART_STEPS])
def test_a_full_disk_in_write_batch_leaves_earlier_parts_whole(path, scores, monkeypatch, owner, step):
    writer = scores.writer(path)
    writer.write_batch(0, scores.batch(writer.batch_slice(0)))
    before = names(path.with_name(PARTS))
    with monkeypatch.context() as patch:
        patch.setattr(owner, step, raises_no_space)
        with pytest.raises(OutputError, match="No space left on device"):
            writer.write_batch(1, scores.batch(writer.batch_slice(1)))
    assert names(path.with_name(PARTS)) == before
    assert scores.write_missing(writer) == [1, 2]
    writer.finish()
    assert_holds(path, scores)


FINISH_STEPS = [
    (tempfile, "mkstemp"),
    (os, "posix_fallocate"),
    (h5py, "File"),
    (h5py.File, "create_dataset"),
    (h5py.Dataset, "__setitem__"),
    (writer_module, "write_header"),
    (Path, "chmod"),
    (Path, "replace"),
]


@pytest.mark.parametrize(("owner", "step"), FINISH_STEPS, ids=[step for _, step in FINISH_STEPS])
def test_a_full_disk_in_finish_keeps_the_parts(path, scores, monkeypatch, owner, step):
    writer = scores.writer(path)
    scores.write_missing(writer)
    with monkeypatch.context() as patch:
        patch.setattr(owner, step, raises_no_space, raising=False)
        with pytest.raises(OutputError, match=r"cannot write .*log\.h5: No space left on device"):
            writer.finish()
    assert names(path.parent) == {PARTS}
    again = scores.writer(path)
    assert scores.write_missing(again) == []
    again.finish()
    assert_holds(path, scores)


FINISH_IN_A_SMALL_FILE_SYSTEM = """
import json, resource, sys
from pathlib import Path
from loki.errors import OutputError
from loki.log import LogHeader, LogWriter

path, header, prompt_ids, num_bytes = json.loads(sys.argv[1])
writer = LogWriter(Path(path), LogHeader(**header), prompt_ids, 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
try:
    writer.finish()
except OutputError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit stands for a full disk on Linux only")
@pytest.mark.parametrize("num_bytes", [0, 1000, 7000])
def test_a_file_system_that_takes_no_more_bytes_keeps_the_parts(path, make_scores, make_header, num_bytes):
    """No stand-ins: the kernel refuses to let a file grow. In a process of its own, because HDF5 may crash it."""
    scores = make_scores(40)
    writer = scores.writer(path)
    scores.write_missing(writer)
    arguments = json.dumps([str(path), make_header().as_dict(), scores.prompt_ids, num_bytes])
    ended = subprocess.run(
        [sys.executable, "-c", FINISH_IN_A_SMALL_FILE_SYSTEM, arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"cannot write {path}: " in ended.stdout
    assert names(path.parent) == {PARTS}
    assert scores.writer(path).missing_batches() == []
    writer.finish()
    assert_holds(path, scores)
    assert ended.returncode == 0, ended.stderr
