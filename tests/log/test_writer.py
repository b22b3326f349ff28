import threading
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loki.errors import ArtefactError, InputError, OutputError
from loki.log import AttributionLog, LogWriter, schema
from loki.log.writer import Batch

PARTS = "log.h5.parts"


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


def assert_holds(path: Path, scores, places=slice(None)):
    _, found, targets, num_tokens, gaps, ids = content_of(path)
    np.testing.assert_array_equal(found, scores.scores_NLD[places])
    np.testing.assert_array_equal(targets, scores.target_ids_N[places])
    np.testing.assert_array_equal(num_tokens, scores.num_tokens_N[places])
    np.testing.assert_array_equal(gaps, scores.completeness_gaps_NL[places])
    assert ids == list(np.array(scores.prompt_ids)[places])


def part_of(path: Path, index: int) -> Path:
    (part,) = path.with_name(PARTS).glob(f"batch-{index:06d}-*")
    return part


@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])
def test_what_is_written_is_read_back_in_prompt_order(path, scores, make_header, batch_size):
    assert [place for batch in scores.plan(batch_size) for place in batch] != [0, 1, 2, 3, 4]
    scores.write_log(path, batch_size=batch_size)
    assert_holds(path, scores)
    assert content_of(path)[0] == make_header(num_prompts=5)
    assert names(path.parent) == {"log.h5"}


def test_the_file_follows_the_published_layout(path, scores, read_datasets):
    """Plain h5py: name, shape, dtype and chunks by prompts; columns typed as the schema says."""
    scores.write_log(path)
    forms = {name: value[:3] for name, value in read_datasets(path).items() if "attribute" not in name}
    assert forms == {
        "dataset": ("float32", (5, 3, 5), (1, 3, 5)),
        "prompt_ids": ("object", (5,), None),
        "prompt_index": ("int64", (5,), None),
        "target_ids": ("int64", (5,), None),
        "num_tokens": ("int64", (5,), None),
        "completeness_gaps": ("float32", (5, 3), None),
    }
    with h5py.File(path) as file:
        assert set(file.attrs) == {"header"}
        np.testing.assert_array_equal(file["prompt_index"][:], range(5))
    assert path.stat().st_mode & 0o777 == 0o644


def test_float16_is_kept_on_request(path, scores):
    scores.write_log(path, dtype="float16")
    with h5py.File(path) as file:
        assert file["dataset"].dtype == np.float16
        np.testing.assert_array_equal(file["dataset"][:], scores.scores_NLD.astype(np.float16))


def test_order_of_writing_does_not_matter(path, scores):
    writer = scores.writer(path)
    for index in (2, 0, 1):
        writer.write_batch(index, scores.batch(writer.batches[index]))
    writer.finish()
    assert_holds(path, scores)


@given(data=st.data(), num_prompts=st.integers(1, 12))
def test_any_plan_gives_the_same_log(tmp_path_factory, make_scores, make_header, data, num_prompts):
    scores, path = make_scores(num_prompts), tmp_path_factory.mktemp("plan") / "log.h5"
    order = data.draw(st.permutations(range(num_prompts)))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, num_prompts - 1))))) if num_prompts > 1 else []
    plan = [order[start:stop] for start, stop in zip([0, *cuts], [*cuts, num_prompts], strict=True)]
    writer = LogWriter(path, make_header(), scores.prompt_ids, plan)
    assert scores.write_missing(writer) == list(range(len(plan)))
    writer.finish()
    assert_holds(path, scores)


@pytest.mark.parametrize(
    "plan",
    [
        [[0, 1], [2, 3]],
        [[0, 1], [2, 3], [4, 4]],
        [[0, 1], [2, 3], [4], []],
        [[0, 1], [2, 3], [5]],
        [[0, 1], [2, 3], [-1]],
        [[0, 1, 2, 3, 4], [0]],
        [],
    ],
)
def test_a_plan_that_is_no_partition_is_refused(path, scores, make_header, plan):
    with pytest.raises(ValueError, match=r"not a partition of 5 prompts|have a prompt twice, an unknown one, or none"):
        LogWriter(path, make_header(), scores.prompt_ids, plan)
    assert names(path.parent) == set()


@pytest.mark.parametrize("plan", [[[0, 2], [2]], [[0], []], [[5]], [[-1]]])
def test_a_shards_plan_with_prompts_twice_unknown_or_no_prompts_is_refused(path, scores, make_header, plan):
    with pytest.raises(ValueError, match="batches of shard 1/2 have a prompt twice, an unknown one, or none"):
        LogWriter(path, make_header(shard="1/2"), scores.prompt_ids, plan)
    assert names(path.parent) == set()


def test_a_shards_log_has_its_prompts_and_says_which(path, scores):
    scores.write_log(path, places=[4, 0, 3], shard="2/2")
    assert_holds(path, scores, [0, 3, 4])
    with AttributionLog(path) as log:
        assert (log.header.shard, log.header.num_prompts, log.num_prompts) == ("2/2", 5, 3)
        np.testing.assert_array_equal(log.column("prompt_index"), [0, 3, 4])


def test_more_shards_than_prompts_are_refused(path, scores):
    with pytest.raises(InputError, match="shard 6/6 has none of the 5 prompts: use fewer shards"):
        scores.writer(path, places=[], shard="6/6")


def test_a_killed_run_goes_on_behind_its_whole_parts(path, scores):
    first = scores.writer(path)
    first.write_batch(1, scores.batch(first.batches[1]))
    whole = part_of(path, 1).read_bytes()
    for name in (".batch-000002-0000.safetensors.x1", ".manifest.json.x1", ".log.h5.x1"):
        (path.with_name(PARTS) / name).write_bytes(b"cut off while writing")

    second = scores.writer(path)
    assert scores.write_missing(second) == [0, 2]
    assert part_of(path, 1).read_bytes() == whole
    second.finish()
    assert_holds(path, scores)
    assert names(path.parent) == {"log.h5"}


def test_what_another_process_is_writing_is_not_cleared_before_the_end(path, scores):
    scores.writer(path)
    in_flight = path.with_name(PARTS) / ".batch-000002-0000.safetensors.x1"
    in_flight.write_bytes(b"of a live process")
    writer = scores.writer(path)
    scores.write_missing(writer, rank=0, num_ranks=2)
    assert in_flight.exists()
    with pytest.raises(ArtefactError, match="lacks 1 of 3"):
        writer.finish()
    assert in_flight.exists()


def test_room_taken_by_a_killed_run_is_given_back_before_assembling(path, scores, monkeypatch):
    """Its half-assembled log may have a gigabyte, which the next try needs."""
    writer = scores.writer(path)
    scores.write_missing(writer)
    stale = path.with_name(PARTS) / ".log.h5.x1"
    stale.write_bytes(b"half a log")
    seen = []
    assembling = "loki.log.writer.write_log"
    from loki.log.assembly import write_log

    monkeypatch.setattr(assembling, lambda *arguments: seen.append(stale.exists()) or write_log(*arguments))
    writer.finish()
    assert seen == [False]


def test_files_of_others_in_the_folder_of_parts_stay(path, scores, caplog):
    writer = scores.writer(path)
    scores.write_missing(writer)
    others = {"notes.txt", ".notes", "batch-1.txt"}
    for name in others:
        (path.with_name(PARTS) / name).write_text("mine")
    writer.finish()
    assert_holds(path, scores)
    assert names(path.with_name(PARTS)) == others
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "the log is whole, but" in record.getMessage()
    assert "cannot be removed ([Errno 39] Directory not empty" in record.getMessage()


DAMAGES = pytest.mark.parametrize(
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


@DAMAGES
def test_a_damaged_part_is_computed_again(path, scores, damage):
    first = scores.writer(path)
    scores.write_missing(first)
    part = part_of(path, 1)
    part.write_bytes(damage(part.read_bytes()))
    with pytest.raises(ArtefactError, match="lacks 1 of 3 batches: run the analysis again"):
        first.finish()
    assert names(path.parent) == {PARTS}
    assert first.missing_batches() == [1]  # what it wrote itself it does not trust any longer

    second = scores.writer(path)
    assert scores.write_missing(second) == [1]
    second.finish()
    assert_holds(path, scores)


def test_all_damaged_parts_are_counted(path, scores):
    scores.write_missing(scores.writer(path))
    for index in (0, 2):
        part_of(path, index).write_bytes(b"torn")
    with pytest.raises(ArtefactError, match="lacks 2 of 3 batches"):
        scores.writer(path).finish()


def test_a_part_that_cannot_be_read_is_computed_again(path, scores, monkeypatch):
    scores.write_missing(scores.writer(path))
    bad, read_bytes = part_of(path, 1), Path.read_bytes

    def fails(self):
        if self == bad:
            raise OSError(5, "Input/output error")
        return read_bytes(self)

    monkeypatch.setattr(Path, "read_bytes", fails)
    assert scores.writer(path).missing_batches() == [1]


def test_a_damaged_part_beside_the_right_one_does_no_harm(path, scores):
    writer = scores.writer(path)
    scores.write_missing(writer)
    for checksum in ("0" * 16, "f" * 16):
        (path.with_name(PARTS) / f"batch-000000-{checksum}.safetensors").write_bytes(b"torn")
    for again in (writer, scores.writer(path)):
        assert again.missing_batches() == []
    writer.finish()
    assert_holds(path, scores)


def test_a_part_in_the_place_of_another_is_none(path, scores):
    """Both batches have the same shape: only the checksum tells that these are not its scores."""
    writer = scores.writer(path)
    scores.write_missing(writer)
    right, wrong = part_of(path, 0), part_of(path, 1)
    wrong.rename(wrong.with_name(wrong.name.replace("batch-000001", "batch-000000")))
    right.unlink()
    assert scores.writer(path).missing_batches() == [0, 1]


def test_parts_of_other_settings_are_none_even_without_their_manifest(path, scores):
    """As after a run that was killed while it removed its parts: the manifest may be gone, parts still there."""
    first = scores.writer(path)
    scores.write_missing(first)
    (path.with_name(PARTS) / "manifest.json").unlink()
    assert scores.writer(path, settings={"steps": 5}).missing_batches() == [0, 1, 2]
    (path.with_name(PARTS) / "manifest.json").unlink()
    assert scores.writer(path).missing_batches() == []


def test_verifying_takes_one_look_at_the_folder_and_reads_each_part_once(path, make_scores, monkeypatch):
    scores = make_scores(60)
    scores.write_missing(scores.writer(path))
    writer = scores.writer(path)
    reads, looks = [], []
    read_bytes, iterdir = Path.read_bytes, Path.iterdir
    monkeypatch.setattr(Path, "read_bytes", lambda self: (reads.append(self.name), read_bytes(self))[1])
    monkeypatch.setattr(Path, "iterdir", lambda self: (looks.append(self), iterdir(self))[1])
    assert writer.missing_batches() == []
    assert len(reads) == len(set(reads)) == 30
    assert len(looks) == 1
    assert writer.missing_batches() == []
    assert len(reads) == 30
    assert len(looks) == 2


def test_only_ones_own_share_is_read(path, scores, monkeypatch):
    scores.write_missing(scores.writer(path))
    writer = scores.writer(path)
    reads, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: (reads.append(self), read_bytes(self))[1])
    writer.missing_batches(rank=1, num_ranks=2)
    assert reads == [part_of(path, 1)]


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("model", {"architecture": "llama-3x5x7", "weights": "beef", "dtype": "float32"}, "weights: 00ff, here beef"),
        ("model_name", "another", "tiny, here another"),
        ("prompts", "probe 5678", "probe 1234, here probe 5678"),
        ("settings", {"rule": "riemann_right", "steps": 7}, "rule: riemann_left, here riemann_right"),
        ("num_layers", 4, "3, here 4"),
        ("num_rows", 6, "5, here 6"),
        ("dtype", "float16", "float32, here float16"),
        ("shard", "1/1", "None, here 1/1"),
    ],
)
def test_an_unfinished_log_of_other_settings_is_refused(path, scores, key, value, named):
    scores.writer(path)
    with pytest.raises(ArtefactError) as caught:
        scores.writer(path, **{key: value})
    assert str(caught.value) == (
        f"{path}.parts holds an unfinished log of other {key} ({named}): "
        "run with the same settings to finish it, or remove that folder"
    )
    assert scores.writer(path).missing_batches() == [0, 1, 2]


def test_settings_that_json_changes_are_found_equal_again(path, scores):
    for _ in range(2):
        scores.writer(path, settings={"layers": (0, 1)})


def test_other_prompts_and_batches_are_refused(path, scores, make_scores, make_header):
    scores.writer(path)
    with pytest.raises(ArtefactError, match=r"unfinished log of other batch_size \(2, here 3\), batches \("):
        scores.writer(path, batch_size=3)
    with pytest.raises(ArtefactError, match=r"unfinished log of other batches \([0-9a-f]{16}, here [0-9a-f]{16}\):"):
        LogWriter(path, make_header(), scores.prompt_ids, scores.plan(2)[::-1])
    with pytest.raises(ArtefactError, match=r"other batches \(.*num_prompts \(5, here 6\), prompt_ids \("):
        make_scores(6).writer(path)
    scores.prompt_ids.reverse()
    with pytest.raises(ArtefactError, match=r"unfinished log of other prompt_ids \("):
        scores.writer(path)


def test_other_package_versions_may_go_on(path, scores):
    scores.writer(path, versions={"torch": "1"})
    scores.writer(path, versions={"torch": "2"})


@pytest.mark.parametrize(
    ("content", "match"),
    [("{", "is not JSON.*remove this file to go on"), ("[]", "is no manifest: remove it to go on")],
)
def test_a_damaged_manifest_costs_no_batch(path, scores, content, match):
    scores.write_missing(scores.writer(path))
    manifest = path.with_name(PARTS) / "manifest.json"
    manifest.write_text(content)
    with pytest.raises(ArtefactError, match=match):
        scores.writer(path)
    manifest.unlink()
    assert scores.writer(path).missing_batches() == []


def test_a_folder_of_parts_that_is_a_file_is_one_line(path, scores):
    path.with_name(PARTS).write_text("mine")
    with pytest.raises(OutputError, match=r"cannot write .*manifest\.json: "):
        scores.writer(path)


def test_no_prompts_are_refused(path, make_header):
    with pytest.raises(InputError, match="no prompts to analyse: give at least one"):
        LogWriter(path, make_header(), [], [])
    assert names(path.parent) == set()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused_with_their_place(path, scores, value):
    scores.scores_NLD[3, 1, 4] = value
    writer = scores.writer(path)
    (index,) = (index for index, batch in enumerate(writer.batches) if 3 in batch)
    with pytest.raises(InputError, match=r"prompt 'prompt/3é' is not finite at layer 1, row 4.*float32 or bfloat16"):
        writer.write_batch(index, scores.batch(writer.batches[index]))
    assert writer.missing_batches() == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_scores_that_overflow_the_logs_own_dtype_are_refused(path, scores):
    """A log that its reader refuses must not be written: 70000 is finite in float32 and infinite in float16."""
    writer = scores.writer(path, dtype="float16")
    scores.scores_NLD[writer.batches[0][0], 0, 0] = 70000
    with pytest.raises(InputError, match="not finite at layer 0, row 0"):
        writer.write_batch(0, scores.batch(writer.batches[0]))


@pytest.mark.parametrize("column", [column.attribute for column in schema.COLUMNS])
def test_a_column_of_another_shape_is_refused(path, scores, column):
    """One prompt in place of two would be copied to both, were it let through."""
    writer = scores.writer(path)
    batch = vars(scores.batch(writer.batches[0]))
    for wrong in (batch[column][:1], batch[column][..., None]):
        with pytest.raises(ValueError, match=rf"{column} of batch 0 has shape .*, not \(2"):
            writer.write_batch(0, Batch(**(batch | {column: wrong})))
    assert writer.missing_batches() == [0, 1, 2]


@pytest.mark.parametrize("index", [-1, 3])
def test_a_batch_that_is_not_in_the_plan_is_refused(path, scores, index):
    with pytest.raises(ValueError, match=f"batch {index} is not one of 3"):
        scores.writer(path).write_batch(index, scores.batch([0, 1]))


def test_finish_needs_every_batch_and_says_what_to_do(path, scores):
    writer = scores.writer(path)
    writer.write_batch(0, scores.batch(writer.batches[0]))
    with pytest.raises(ArtefactError) as caught:
        writer.finish()
    assert str(caught.value) == (
        f"{path}.parts lacks 2 of 3 batches: run the analysis again to add them; several processes must share "
        "this folder, those that cannot take --shard and `loki merge-logs`"
    )
    assert not path.exists()


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_shares_of_processes_are_disjoint_and_complete(path, make_scores, num_ranks):
    scores = make_scores(13)  # 7 batches: the share of a rank are those whose number leaves it over
    writers = [scores.writer(path) for _ in range(num_ranks)]
    shares = [writer.missing_batches(rank, num_ranks) for rank, writer in enumerate(writers)]
    assert shares == [[index for index in range(7) if index % num_ranks == rank] for rank in range(num_ranks)]
    for rank, writer in enumerate(writers):
        scores.write_missing(writer, rank=rank, num_ranks=num_ranks)
    writers[0].finish()
    assert_holds(path, scores)
    assert names(path.parent) == {"log.h5"}


@pytest.mark.parametrize(("rank", "num_ranks"), [(-1, 2), (2, 2), (0, 0)])
def test_an_impossible_rank_is_refused(path, scores, rank, num_ranks):
    with pytest.raises(ValueError, match=f"rank {rank} of {num_ranks} is not possible"):
        scores.writer(path).missing_batches(rank, num_ranks)


def at_once(*calls):
    """Run calls in threads that start together; what each returned or raised."""
    start, results = threading.Barrier(len(calls)), [None] * len(calls)

    def run(number, call):
        start.wait()
        try:
            results[number] = call()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_many_processes_may_begin_at_once(tmp_path, make_scores):
    scores = make_scores(5)
    for attempt in range(20):
        path = tmp_path / f"{attempt}.h5"
        writers = at_once(*[lambda path=path: scores.writer(path)] * 6)
        assert all(isinstance(writer, LogWriter) for writer in writers), writers
        assert names(writers[0].parts_directory) == {"manifest.json"}


def test_many_processes_may_write_at_once(path, make_scores):
    scores = make_scores(60)
    writers = [scores.writer(path) for _ in range(3)]
    shares = at_once(
        *[lambda rank=rank: scores.write_missing(writers[rank], rank=rank, num_ranks=3) for rank in range(3)]
    )
    assert shares == [list(range(rank, 30, 3)) for rank in range(3)]
    writers[2].finish()
    assert_holds(path, scores)


def test_of_two_analyses_that_begin_at_once_no_batch_is_mixed(tmp_path, make_scores):
    """Whatever the order of events, a part of one never counts for the other."""
    scores = make_scores(5)
    for attempt in range(20):
        path = tmp_path / f"{attempt}.h5"
        settings = [{"steps": 5}, {"steps": 7}]
        both = at_once(*[lambda path=path, own=own: scores.writer(path, settings=own) for own in settings])
        assert all(isinstance(writer, LogWriter | ArtefactError) for writer in both), both
        assert any(isinstance(writer, LogWriter) for writer in both)
        for writer in both:
            if isinstance(writer, LogWriter):
                scores.write_missing(writer)
        for own, writer in zip(settings, both, strict=True):
            (path.with_name(path.name + ".parts") / "manifest.json").unlink()
            missing = scores.writer(path, settings=own).missing_batches()
            assert missing == ([] if isinstance(writer, LogWriter) else [0, 1, 2])


def test_another_file_at_the_place_is_refused_and_untouched(path, scores, make_scores):
    refused = pytest.raises(OutputError, match=r"log\.h5 exists already: remove it or choose another output file")
    path.write_bytes(b"mine")
    with refused:
        scores.writer(path)
    assert path.read_bytes() == b"mine"
    path.unlink()
    scores.write_log(path)
    others = make_scores(5)
    others.prompt_ids[3] = "another"
    for other in (
        lambda: scores.writer(path, settings={"steps": 5}),
        lambda: scores.writer(path, shard="1/1"),
        lambda: scores.writer(path, shard="1/2", places=[0, 1]),
        lambda: others.writer(path),
    ):
        with refused:
            other()
    assert names(path.parent) == {"log.h5"}
    assert_holds(path, scores)
    path.unlink()
    scores.write_log(path, shard="1/2", places=[0, 2])
    with refused:
        scores.writer(path, shard="1/2", places=[0, 1])


def test_a_finished_log_needs_nothing_more(path, scores, read_datasets):
    """As after a kill between putting the log in place and removing the parts."""
    writer = scores.writer(path)
    assert not writer.finished
    scores.write_missing(writer)
    leftover = part_of(path, 1)
    content = leftover.read_bytes()
    writer.finish()
    assert writer.finished
    before = read_datasets(path)
    assert scores.writer(path).finished
    assert names(path.parent) == {"log.h5"}
    leftover.parent.mkdir()
    leftover.write_bytes(content)
    leftover.with_name(".log.h5.x1").write_bytes(b"half a log")
    again = scores.writer(path)
    assert again.finished
    assert again.missing_batches() == []
    again.finish()
    assert read_datasets(path) == before
    assert names(path.parent) == {"log.h5"}


def test_finishing_takes_the_memory_of_a_batch_not_of_a_log(path, make_header):
    """200 prompts of 32 kB are 6.4 MB, a batch 64 kB; bookkeeping per prompt is small beside either."""
    num_prompts, num_layers, num_rows = 200, 4, 2048
    header = make_header(num_layers=num_layers, num_rows=num_rows)
    writer = LogWriter(
        path, header, [str(n) for n in range(num_prompts)], [[n, n + 100] for n in range(num_prompts // 2)]
    )
    batch = Batch(
        np.ones((2, num_layers, num_rows), np.float32),
        np.ones(2, np.int64),
        np.ones(2, np.int64),
        np.ones((2, num_layers), np.float32),
    )
    for index in range(writer.num_batches):
        writer.write_batch(index, batch)
    tracemalloc.start()
    writer.finish()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 6_400_000
    assert peak < 700_000
