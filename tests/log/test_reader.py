import json

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loki.errors import ArtefactError
from loki.log import AttributionLog, reader, schema

RNG = np.random.default_rng(0)
SCORES_NLD = RNG.normal(size=(7, 3, 5)).astype(np.float32)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.h5"


def write(path, scores_NLD=SCORES_NLD, header=None, **options):
    with h5py.File(path, "w") as file:
        file.create_dataset("dataset", data=scores_NLD, **options)
        if header is not None:
            file.attrs["header"] = header


def refused(path, match):
    with pytest.raises(ArtefactError, match=match):
        AttributionLog(path)


def test_a_missing_log_names_the_command_that_makes_it(path):
    refused(path, r"log\.h5 does not exist: make it with `loki analyse`")


def test_a_folder_is_no_log(tmp_path):
    with pytest.raises(ArtefactError, match="does not exist"):
        AttributionLog(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no HDF5 at all", b"\x89HDF\r\n\x1a\n"])
def test_a_file_that_is_not_hdf5_is_refused(path, content):
    path.write_bytes(content)
    refused(path, "is damaged or not HDF5: make it again")


@pytest.mark.parametrize("options", [{}, {"chunks": (1, 3, 5)}, {"chunks": (2, 3, 5), "compression": "gzip"}])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(path, share, options):
    write(path, **options)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path, "is damaged or not HDF5: make it again")


def test_a_damaged_chunk_is_refused_with_its_prompt(path, monkeypatch):
    """gzip has a check sum: a spoiled chunk of prompts 4 and 5 cannot be read, those before can."""
    write(path, compression="gzip", chunks=(2, 3, 5))
    with h5py.File(path) as file:
        chunk = file["dataset"].id.get_chunk_info(2)
        offset, size = chunk.byte_offset, chunk.size
    content = bytearray(path.read_bytes())
    content[offset : offset + size] = bytes(size)
    path.write_bytes(content)
    monkeypatch.setattr(reader, "CHUNK_BYTES", 2 * 4 * 3 * 5)
    with AttributionLog(path) as log:
        chunks = log.chunks()
        np.testing.assert_array_equal(next(chunks), SCORES_NLD[:2])
        np.testing.assert_array_equal(next(chunks), SCORES_NLD[2:4])
        with pytest.raises(ArtefactError, match="is damaged at prompt 4: make it again"):
            next(chunks)


@pytest.mark.parametrize("shape", [(), (7,), (7, 5), (7, 3, 5, 1)])
def test_another_number_of_dimensions_is_refused(path, shape):
    write(path, np.zeros(shape, np.float32))
    refused(path, r"no floating-point 'dataset' of shape \(prompts, layers, rows\)")


def test_scores_that_are_no_floating_point_dataset_are_refused(path):
    write(path, np.zeros((7, 3, 5), np.int64))
    refused(path, "no floating-point 'dataset'")
    with h5py.File(path, "w") as file:
        file.create_group("dataset")
    refused(path, "no floating-point 'dataset'")
    with h5py.File(path, "w") as file:
        file["scores"] = SCORES_NLD
    refused(path, "no floating-point 'dataset'")


@pytest.mark.parametrize("shape", [(0, 3, 5), (7, 0, 5), (7, 3, 0)])
def test_an_empty_log_is_refused(path, shape):
    write(path, np.zeros(shape, np.float32))
    refused(path, rf"is empty \({shape[0]}, {shape[1]}, {shape[2]}\): analyse at least one prompt")


@pytest.mark.parametrize("version", [0, 1, 3, "2", None])
def test_an_unknown_schema_is_refused(path, make_header, version):
    write(path, header=json.dumps(make_header().as_dict() | {"schema_version": version}))
    refused(path, rf"has schema {version!r}, this version reads {schema.SCHEMA_VERSION}: make it again")


@pytest.mark.parametrize(
    "header",
    ["", "{", "[]", "3", "null", '{"model": {}}', '{"schema_version": 2}', '{"schema_version": 2, "color": "red"}', 7],
)
def test_a_damaged_header_is_refused(path, header):
    write(path, header=header)
    refused(path, "has a damaged header: make it again")


@pytest.mark.parametrize("shard", ["3/2", "half", 2])
def test_a_header_of_an_impossible_shard_is_refused(path, make_header, shard):
    write(path, header=json.dumps(make_header().as_dict() | {"shard": shard}))
    refused(path, "has a damaged header: make it again")


@pytest.mark.parametrize("signature", [b"GCOL", b"TREE", b"SNOD", b"HEAP"])
def test_damaged_inner_structures_are_refused(path, make_header, signature):
    """The file opens, but a table inside it (of strings, of groups, of names) is spoiled."""
    write(path, header=json.dumps(make_header().as_dict()))
    content = path.read_bytes()
    assert signature in content
    path.write_bytes(content.replace(signature, b"\0\0\0\0"))
    refused(path, "damaged|no floating-point")


@pytest.mark.parametrize("read_bytes", [1, 2**20])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f2", ">f4"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_named_with_their_place(path, monkeypatch, value, dtype, read_bytes):
    scores_NLD = SCORES_NLD.astype(dtype)
    scores_NLD[5, 2, 1] = value
    write(path, scores_NLD)
    monkeypatch.setattr(reader, "CHUNK_BYTES", 2 * 4 * 3 * 5)  # the prompt is counted in the log, not in its chunk
    monkeypatch.setattr(reader, "READ_BYTES", read_bytes)
    with AttributionLog(path) as log, pytest.raises(ArtefactError) as caught:
        list(log.chunks())
    assert f"has {value} at prompt 5, layer 2, row 1: analyse again in float32 or bfloat16" in str(caught.value)


def test_infinities_of_both_signs_do_not_cancel(path):
    scores_NLD = SCORES_NLD.copy()
    scores_NLD[1, 0, 2], scores_NLD[1, 1, 4] = np.inf, -np.inf
    write(path, scores_NLD)
    with AttributionLog(path) as log, pytest.raises(ArtefactError, match="has inf at prompt 1, layer 0, row 2: "):
        list(log.chunks())


def test_a_score_too_large_for_single_precision_is_refused_as_it_stands(path):
    scores_NLD = SCORES_NLD.astype(np.float64)
    scores_NLD[3, 2, 4] = -1e300
    write(path, scores_NLD)
    with AttributionLog(path) as log, pytest.raises(ArtefactError, match=r"has -1e\+300 at prompt 3, layer 2, row 4: "):
        list(log.chunks())


@pytest.mark.parametrize("dtype", ["f2", "f4"])
def test_the_largest_scores_are_read(path, dtype):
    """Their sum is infinite, they are not."""
    scores_NLD = np.full((2, 3, 5), np.finfo(dtype).max, dtype)
    write(path, scores_NLD)
    with AttributionLog(path) as log:
        np.testing.assert_array_equal(np.concatenate(list(log.chunks())), scores_NLD.astype(np.float32))


def test_every_number_of_half_precision_is_read_exactly(path):
    numbers = np.arange(2**16, dtype=np.uint16).view(np.float16)
    scores_NLD = numbers[np.isfinite(numbers)].reshape(8, 2, -1)
    write(path, scores_NLD, chunks=(1, *scores_NLD.shape[1:]))
    with AttributionLog(path) as log:
        found = np.concatenate(list(log.chunks()))
    # Bits, so that the sign of a zero counts.
    np.testing.assert_array_equal(found.view(np.int32), scores_NLD.astype(np.float32).view(np.int32))


@pytest.mark.parametrize(("stored", "dtype"), [("f2", "f2"), ("f4", "f4"), ("f8", "f4"), (">f2", "f4"), (">f4", "f4")])
def test_stored_chunks_stay_in_half_precision(path, monkeypatch, stored, dtype):
    write(path, SCORES_NLD.astype(stored))
    monkeypatch.setattr(reader, "CHUNK_BYTES", 3 * 4 * 3 * 5)
    with AttributionLog(path) as log:
        chunks = list(log.stored_chunks())
    assert [len(chunk) for chunk in chunks] == [3, 3, 1]
    assert {chunk.dtype for chunk in chunks} == {np.dtype(dtype)}
    np.testing.assert_array_equal(np.concatenate(chunks), SCORES_NLD.astype(stored).astype(dtype))


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f2", ">f4"])
@pytest.mark.parametrize("options", [{}, {"chunks": (2, 2, 3), "compression": "gzip"}], ids=["plain", "gzip"])
def test_chunks_are_arrays_of_their_own(path, monkeypatch, dtype, options):
    """A reader that runs ahead must not write over what is still in use."""
    write(path, SCORES_NLD.astype(dtype), **options)
    monkeypatch.setattr(reader, "CHUNK_BYTES", 3 * 4 * 3 * 5)
    monkeypatch.setattr(reader, "READ_BYTES", 2 * np.dtype(dtype).itemsize * 3 * 5)
    with AttributionLog(path) as log:
        chunks = list(log.chunks())
    assert [len(chunk) for chunk in chunks] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(chunks), SCORES_NLD.astype(dtype).astype(np.float32))


@settings(deadline=None)
@given(chunk_bytes=st.integers(1, 4 * 7 * 3 * 5 + 50), read_bytes=st.integers(1, 4 * 7 * 3 * 5 + 50))
def test_chunks_cover_all_prompts_in_order(tmp_path_factory, chunk_bytes, read_bytes):
    path = tmp_path_factory.getbasetemp() / "chunks.h5"
    if not path.exists():
        write(path)
    with pytest.MonkeyPatch.context() as patch, AttributionLog(path) as log:
        patch.setattr(reader, "CHUNK_BYTES", chunk_bytes)
        patch.setattr(reader, "READ_BYTES", read_bytes)
        chunks = list(log.chunks())
    np.testing.assert_array_equal(np.concatenate(chunks), SCORES_NLD)
    assert all(chunk.nbytes <= chunk_bytes or len(chunk) == 1 for chunk in chunks)
    assert all(chunk.dtype == np.float32 for chunk in chunks)
    # No chunk but the last could have taken one more prompt.
    assert all(chunk.nbytes + chunk[0].nbytes > chunk_bytes for chunk in chunks[:-1])


def test_a_log_of_the_public_implementation_is_read(path):
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset(
            "dataset", data=SCORES_NLD.astype(np.float16), compression="gzip", chunks=(1, 3, 5), maxshape=(None, 3, 5)
        )
        dataset.attrs["metadata_model_name"] = "meta-llama/Llama-3.1-8B-Instruct"
        dataset.attrs["metadata_ig_steps"] = 7
    with AttributionLog(path) as log:
        assert log.header is None
        assert (log.num_prompts, log.num_layers, log.num_rows) == (7, 3, 5)
        (scores_NLD,) = log.chunks()
        assert scores_NLD.dtype == np.float32
        np.testing.assert_array_equal(scores_NLD, SCORES_NLD.astype(np.float16).astype(np.float32))
        assert log.column(schema.TARGET_IDS) is None


def test_a_log_of_the_public_implementation_does_not_say_which_prompts_it_has(path):
    write(path)
    with AttributionLog(path) as log, pytest.raises(ArtefactError, match="has no header that says what made it, as"):
        log.prompts()


def test_prompts_are_given_with_their_places(path, scores):
    scores.write_log(path, places=[4, 1, 2], shard="1/2")
    with AttributionLog(path) as log:
        index_N, ids = log.prompts()
    np.testing.assert_array_equal(index_N, [1, 2, 4])
    assert ids == ["prompt/1é", "prompt/2é", "prompt/4é"]


def put(file, name, values, **options):
    del file[name]
    file.create_dataset(name, data=values, **options)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.__delitem__("prompt_index"),
        lambda file: file.__delitem__("prompt_ids"),
        lambda file: put(file, "prompt_index", [0, 1, 2, 3]),
        lambda file: put(file, "prompt_index", [0.0, 1.0, 2.0, 3.0, 4.0]),
        lambda file: put(file, "prompt_index", [-1, 1, 2, 3, 4]),
        lambda file: put(file, "prompt_index", [0, 1, 2, 3, 5]),
        lambda file: put(file, "prompt_index", [0, 1, 1, 3, 4]),
        lambda file: put(file, "prompt_index", [0, 2, 1, 3, 4]),
        lambda file: put(file, "prompt_ids", ["a"] * 4, dtype=h5py.string_dtype()),
        lambda file: put(file, "prompt_ids", [1, 2, 3, 4, 5]),
        lambda file: put(file, "prompt_ids", [b"\xff"] * 5, dtype=h5py.string_dtype()),
        lambda file: file.attrs.modify(
            "header", file.attrs["header"].replace('"num_prompts": 5', '"num_prompts": null')
        ),
        lambda file: file.attrs.modify("header", file.attrs["header"].replace('"num_prompts": 5', '"num_prompts": 4')),
    ],
    ids=[
        "no places",
        "no ids",
        "too few places",
        "fractions",
        "below zero",
        "beyond the set",
        "twice",
        "not ascending",
        "too few ids",
        "ids that are no text",
        "ids that are no UTF-8",
        "size unknown",
        "size too small",
    ],
)
def test_a_damaged_table_of_prompts_is_refused(path, scores, damage):
    scores.write_log(path)
    with h5py.File(path, "r+") as file:
        damage(file)
    with AttributionLog(path) as log, pytest.raises(ArtefactError, match="is damaged in its table of prompts: make it"):
        log.prompts()


def test_a_path_that_the_file_system_refuses_is_one_line(tmp_path):
    with pytest.raises(ArtefactError, match="cannot be read: File name too long"):
        AttributionLog(tmp_path / ("x" * 300))


def test_a_log_is_closed_after_use(path):
    write(path)
    with AttributionLog(str(path)), pytest.raises(OSError, match="already open"):
        h5py.File(path, "r+")
    with h5py.File(path, "r+"):
        pass


def test_a_refused_log_is_closed(path):
    write(path, np.zeros((7, 5), np.float32))
    with pytest.raises(ArtefactError) as caught:
        AttributionLog(path)
    with h5py.File(path, "r+"):  # HDF5 refuses this while the file is open elsewhere
        assert caught.tb is not None  # the traceback keeps alive whatever was not closed


def test_the_mean_is_over_all_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "CHUNK_BYTES", 1)  # a prompt at a time
    scores = np.random.default_rng(1).random((5, 3, 20), dtype=np.float32)
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file.create_dataset("dataset", data=scores, chunks=(2, 3, 20))
    with AttributionLog(tmp_path / "d.h5") as log:
        found = log.mean_scores()
    assert found.dtype == np.float64
    assert found == pytest.approx(scores.mean(axis=0), rel=1e-6)
