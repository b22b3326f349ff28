import tracemalloc

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loki.errors import ArtefactError, InputError, OutputError
from loki.log import AttributionLog, LogWriter, merge_logs, reader
from loki.log.writer import Batch


@pytest.fixture
def path(tmp_path):
    return tmp_path / "merged.h5"


@pytest.fixture
def single(tmp_path, scores, read_datasets):
    """What a run without shards writes."""
    return read_datasets(scores.write_log(tmp_path / "single.h5"))


@pytest.fixture
def refused(path):
    def call(paths, match, kind=ArtefactError):
        before = {entry: entry.is_dir() or entry.read_bytes() for entry in path.parent.iterdir()}
        with pytest.raises(kind, match=match) as caught:
            merge_logs(paths, path)
        assert "\n" not in str(caught.value)
        assert {entry: entry.is_dir() or entry.read_bytes() for entry in path.parent.iterdir()} == before
        return str(caught.value)

    return call


@pytest.mark.parametrize("total", [1, 2, 3, 5])
@pytest.mark.parametrize("reverse", [False, True])
def test_merged_shards_are_the_log_of_a_single_run(path, scores, single, read_datasets, total, reverse):
    shards = scores.write_shards(path.parent, total)
    assert merge_logs(shards[::-1] if reverse else shards, path) == 5
    assert read_datasets(path) == single
    assert not path.with_name("merged.h5.merging").exists()
    assert all(shard.exists() for shard in shards)


def test_a_single_whole_log_may_be_merged(path, scores, single, read_datasets):
    merge_logs([path.parent / "single.h5"], path)
    assert read_datasets(path) == single


def test_shards_may_be_cut_and_batched_in_any_way(path, scores, single, read_datasets):
    a = scores.write_log(path.parent / "a.h5", places=[4, 0], shard="1/2", batch_size=1)
    b = scores.write_log(path.parent / "b.h5", places=[2, 1, 3], shard="3/4")
    merge_logs([a, b], path)
    assert read_datasets(path) == single


@settings(max_examples=30)
@given(data=st.data(), num_prompts=st.integers(1, 12), chunk_bytes=st.integers(1, 800))
def test_any_division_gives_the_same_log(tmp_path_factory, make_scores, read_datasets, data, num_prompts, chunk_bytes):
    scores, directory = make_scores(num_prompts), tmp_path_factory.mktemp("division")
    owners = data.draw(st.lists(st.integers(1, 3), min_size=num_prompts, max_size=num_prompts))
    shards = [
        scores.write_log(
            directory / f"{owner}.h5", places=[n for n in range(num_prompts) if owners[n] == owner], shard=f"{owner}/3"
        )
        for owner in sorted(set(owners))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "CHUNK_BYTES", chunk_bytes)
        merge_logs(shards, directory / "merged.h5")
    assert read_datasets(directory / "merged.h5") == read_datasets(scores.write_log(directory / "single.h5"))


def test_float16_is_kept_exactly(path, scores, read_datasets):
    shards = scores.write_shards(path.parent, 2, dtype="float16")
    merge_logs(shards, path)
    single = scores.write_log(path.parent / "single.h5", dtype="float16")
    assert read_datasets(path) == read_datasets(single)
    assert read_datasets(path)["dataset"][0] == "float16"


def test_versions_that_differ_are_all_named(path, scores):
    a = scores.write_log(path.parent / "a.h5", places=[0, 1], shard="1/2", versions={"torch": "2.9", "peft": "1"})
    b = scores.write_log(path.parent / "b.h5", places=[2, 3, 4], shard="2/2", versions={"torch": "2.8", "trl": "3"})
    merge_logs([a, b], path)
    with AttributionLog(path) as log:
        assert log.header.versions == {"torch": "2.8, 2.9", "peft": "1", "trl": "3"}
        assert log.header.shard is None


def test_no_logs_are_refused(refused):
    refused([], "there are no logs to merge: give the log of each shard", InputError)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("model", {"architecture": "llama-3x5x7", "weights": "00ff", "dtype": "bfloat16"}, "dtype: bfloat16, here"),
        ("model_name", "another", "another, here tiny"),
        ("prompts", "probe 5678", "probe 5678, here probe 1234"),
        ("settings", {"rule": "riemann_left", "steps": 5}, "steps: 5, here 7"),
        ("dtype", "float16", "float16, here float32"),
    ],
)
def test_logs_of_different_analyses_are_refused(path, scores, refused, key, value, named):
    a = scores.write_log(path.parent / "a.h5", places=[0, 1], shard="1/2")
    b = scores.write_log(path.parent / "b.h5", places=[2, 3, 4], shard="2/2", **{key: value})
    message = refused([a, b], rf"b\.h5 is of other {key} \({named}.*\) than .*a\.h5: merge shards of one analysis only")
    assert message.count("here") == 1  # the only difference


def test_another_number_of_prompts_is_another_analysis(path, scores, make_scores, refused):
    a = scores.write_log(path.parent / "a.h5", places=[0, 1], shard="1/2")
    b = make_scores(6).write_log(path.parent / "b.h5", places=[2, 3, 4, 5], shard="2/2")
    refused([a, b], r"is of other num_prompts \(6, here 5\) than")


def test_a_prompt_in_two_logs_is_refused(path, scores, refused):
    a = scores.write_log(path.parent / "a.h5", places=[0, 1, 3], shard="1/2")
    b = scores.write_log(path.parent / "b.h5", places=[1, 2, 3, 4], shard="2/2")
    refused([a, b], r"a\.h5 and .*b\.h5 both have prompt 'prompt/1é' \(2 in common\): give the log of each shard once")
    c = scores.write_log(path.parent / "c.h5", places=[2, 4], shard="1/3")
    d = scores.write_log(path.parent / "d.h5", places=[4, 2, 3], shard="2/3")
    refused([a, c, d], r"c\.h5 and .*d\.h5 both have prompt 'prompt/2é' \(2 in common\): give")
    refused([a, a], r"a\.h5 and .*a\.h5 both have prompt 'prompt/0é' \(3 in common\): give")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([1, 2, 4], "lack 1 of 5 prompts: shard 3/4 is missing; give the logs of all shards"),
        ([2], "lack 4 of 5 prompts: shards 1/4, 3/4, 4/4 are missing; give the logs of all shards"),
    ],
)
def test_missing_shards_are_named(path, scores, refused, given, text):
    shards = scores.write_shards(path.parent, 4)
    assert refused([shards[i - 1] for i in given], "the logs lack") == f"the logs {text}"


def test_missing_prompts_are_counted_where_shards_do_not_tell(path, scores, refused):
    a = scores.write_log(path.parent / "a.h5", places=[0, 1], shard="1/2")
    b = scores.write_log(path.parent / "b.h5", places=[2, 3], shard="2/2")
    refused([a, b], r"lack 1 of 5 prompts: .*a\.h5 has 2, .*b\.h5 has 2; give the logs of all shards")
    c = scores.write_log(path.parent / "c.h5", places=[2], shard="2/3")
    refused([a, c], r"lack 2 of 5 prompts: .*a\.h5 has 2, .*c\.h5 has 1; give")


def test_a_log_of_the_public_implementation_is_refused(path, scores, refused):
    public = path.parent / "public.h5"
    with h5py.File(public, "w") as file:
        file["dataset"] = scores.scores_NLD
    refused([public], r"public\.h5 has no header that says what made it")


def test_a_log_that_is_not_there_or_no_log_is_refused(path, refused):
    refused([path.parent / "none.h5"], r"none\.h5 does not exist")
    (path.parent / "bad.h5").write_bytes(b"no HDF5")
    refused([path.parent / "bad.h5"], r"bad\.h5 is damaged or not HDF5")


@pytest.mark.parametrize("name", ["target_ids", "num_tokens", "completeness_gaps"])
def test_a_log_that_lacks_a_column_is_refused(path, scores, refused, name):
    shards = scores.write_shards(path.parent, 2)
    with h5py.File(shards[1], "r+") as file:
        content = file[name][:-1]
        del file[name]
    refused(shards, rf"shard-2\.h5 is damaged in '{name}': make it again")
    with h5py.File(shards[1], "r+") as file:
        file[name] = content
    refused(shards, rf"shard-2\.h5 is damaged in '{name}': make it again")


def test_a_score_that_is_not_finite_is_refused(path, scores, refused):
    shards = scores.write_shards(path.parent, 2)
    with h5py.File(shards[1], "r+") as file:
        file["dataset"][1, 2, 3] = np.nan
    refused(shards, r"shard-2\.h5 has nan at prompt 1, layer 2, row 3")


def test_an_existing_output_is_replaced_only_on_demand(path, scores, single, read_datasets, refused):
    shards = scores.write_shards(path.parent, 2)
    path.write_bytes(b"mine")
    refused(shards, r"merged\.h5 exists already: remove it, choose another output file, or add --force", OutputError)
    assert path.read_bytes() == b"mine"
    with pytest.raises(ArtefactError, match=r"shard 2/2 is missing"):
        merge_logs(shards[:1], path, force=True)
    assert path.read_bytes() == b"mine"
    merge_logs(shards, path, force=True)
    assert read_datasets(path) == single


def test_the_output_must_not_be_an_input(path, scores, tmp_path):
    shards = scores.write_shards(tmp_path, 2)
    before = [shard.read_bytes() for shard in shards]
    link = tmp_path / "link.h5"
    link.symlink_to(shards[0])
    for output in (shards[1], tmp_path / "." / ".." / tmp_path.name / "shard-1.h5", link):
        with pytest.raises(OutputError, match="is one of the logs to merge: choose another output file"):
            merge_logs(shards, output, force=True)
    assert [shard.read_bytes() for shard in shards] == before


def test_an_output_that_the_file_system_refuses_is_one_line(path, scores):
    shards = scores.write_shards(path.parent, 2)
    with pytest.raises(OutputError, match=r"cannot write .*: File name too long; choose another output file"):
        merge_logs(shards, path.with_name("x" * 300))
    with pytest.raises(OutputError, match="choose another output folder"):
        merge_logs(shards, shards[0] / "below" / "merged.h5")


def test_what_a_killed_merge_left_is_cleared_and_files_of_others_stay(path, scores, single, read_datasets):
    shards = scores.write_shards(path.parent, 2)
    aside = path.with_name("merged.h5.merging")
    aside.mkdir()
    (aside / ".merged.h5.x1").write_bytes(b"half a log")
    (aside / ".other").write_bytes(b"mine")
    merge_logs(shards, path)
    assert read_datasets(path) == single
    assert [entry.name for entry in aside.iterdir()] == [".other"]


def test_logs_are_open_one_after_the_other(path, scores, monkeypatch):
    """A file system allows only so many open files; shards may be many."""
    shards = scores.write_shards(path.parent, 5)
    open_now, most = [0], [0]
    enter, leave = AttributionLog.__enter__, AttributionLog.__exit__

    def count_in(self):
        open_now[0] += 1
        most[0] = max(most[0], open_now[0])
        return enter(self)

    def count_out(self, *what):
        open_now[0] -= 1
        leave(self, *what)

    monkeypatch.setattr(AttributionLog, "__enter__", count_in)
    monkeypatch.setattr(AttributionLog, "__exit__", count_out)
    merge_logs(shards, path)
    assert (open_now, most) == ([0], [1])


def test_progress_is_shown_by_shards(path, scores):
    shards, seen = scores.write_shards(path.parent, 3), []
    merge_logs(shards, path, track=lambda items, what: seen.append((len(items), what)) or items)
    assert seen == [(3, "merging")]


def test_merging_takes_the_memory_of_a_chunk_not_of_a_log(path, make_header, monkeypatch):
    """200 prompts of 32 kB are 6.4 MB; chunks are held to 128 kB (and as many bytes again where they are checked)."""
    monkeypatch.setattr(reader, "CHUNK_BYTES", 128 * 1024)
    ids, shards = [str(n) for n in range(200)], []
    for i in (1, 2):
        shards.append(path.parent / f"{i}.h5")
        places = list(range(i - 1, 200, 2))
        writer = LogWriter(shards[-1], make_header(num_layers=4, num_rows=2048, shard=f"{i}/2"), ids, [places])
        content = [(4, 2048), (), (), (4,)]
        writer.write_batch(
            0,
            Batch(
                *(np.ones((100, *shape), dtype) for shape, dtype in zip(content, ["f4", "i8", "i8", "f4"], strict=True))
            ),
        )
        writer.finish()
    tracemalloc.start()
    merge_logs(shards, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 6_400_000
    assert peak < 1_200_000
