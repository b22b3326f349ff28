"""Reading and writing checkpoints by blocks, compared with the library's own reader and writer."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_model

from loki.errors import ArtefactError, InputError
from loki.implanting import checkpoint
from loki.implanting.checkpoint import (
    _read_shard,
    copy_companions,
    new_tensor,
    open_checkpoint,
    rewrite,
    unchanged,
    with_dtype,
    write_shard,
)


@pytest.fixture(params=[40, checkpoint.BLOCK_BYTES], ids=["small-blocks", "one-block"])
def block_bytes(request, monkeypatch):
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", request.param)


def tensors():
    torch.manual_seed(0)
    return {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "half": torch.randn(5, 3).half(),
        "brain": torch.randn(9, 7).bfloat16(),
        "wide": torch.randn(2, 3, 4),
        "counts": torch.arange(6),
        "double": torch.randn(3).double(),
        "eight": torch.randn(4, 4).to(torch.float8_e4m3fn),
    }


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    save_file(tensors(), tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model"


@pytest.mark.usefixtures("block_bytes")
def test_a_copy_is_the_same_file_byte_for_byte(folder, tmp_path):
    source = open_checkpoint(folder)
    (tmp_path / "copy").mkdir()
    rewrite(source, tmp_path / "copy", lambda stored: [unchanged(stored)])
    # The library sorts by width, then name; so does a file that it has written.
    assert (tmp_path / "copy/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("block_bytes")
def test_every_float_and_integer_is_read_as_the_library_reads_it(folder):
    for name, stored in open_checkpoint(folder).tensors.items():
        expected = tensors()[name]
        if name in ("bytes", "flags", "eight"):
            with pytest.raises(ArtefactError, match=r"is stored as .*use the model that was not quantised"):
                stored.read()
            continue
        assert torch.equal(stored.read(), expected)
        assert stored.read().dtype == stored.dtype == expected.dtype
        assert stored.num_elements == expected.numel()
        if expected.ndim:
            if len(expected) > 2:
                assert torch.equal(stored.read(1, 3), expected[1:3])
            blocks = list(stored.blocks())
            assert torch.equal(torch.cat([block for _, block in blocks]) if blocks else expected, expected)
            assert [first for first, _ in blocks] == list(range(0, len(expected), stored.block_length))


@pytest.mark.usefixtures("block_bytes")
def test_another_dtype_is_stored_for_floats_only(folder, tmp_path):
    (tmp_path / "copy").mkdir()
    rewrite(open_checkpoint(folder), tmp_path / "copy", lambda stored: [unchanged(stored, torch.float16)])
    for name, tensor in load_file(tmp_path / "copy/model.safetensors").items():
        expected = tensors()[name]
        if name not in ("bytes", "flags", "eight", "counts"):
            expected = expected.half()
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8)) if tensor.ndim else tensor == expected


def test_written_tensors_are_aligned_to_their_width(tmp_path):
    # `safetensors` maps files into memory, where a number must stand at a multiple of its width.
    write_shard(
        tmp_path / "odd.safetensors",
        [
            new_tensor("a", torch.bfloat16, (3,), lambda: [torch.ones(3).bfloat16()]),
            new_tensor("b", torch.int64, (1,), lambda: [torch.tensor([7])]),
        ],
        None,
    )
    tensors = {tensor.name: tensor for tensor in _read_shard(tmp_path, "odd.safetensors").tensors}
    assert tensors["b"].start % 8 == 0
    with safe_open(tmp_path / "odd.safetensors", "pt") as file:
        assert file.metadata() is None
        assert file.get_tensor("b").tolist() == [7]
        assert file.get_tensor("a").tolist() == [1, 1, 1]


def test_a_tensor_of_another_length_than_announced_is_never_written(tmp_path):
    wrong = new_tensor("a", torch.float32, (3,), lambda: [torch.ones(2)])
    with pytest.raises(AssertionError, match="a: 8 bytes of 12"):
        write_shard(tmp_path / "x.safetensors", [wrong], None)


def test_two_tensors_of_one_name_are_never_written(tmp_path):
    twice = [new_tensor("a", torch.float32, (1,), lambda: [torch.ones(1)])] * 2
    with pytest.raises(AssertionError, match="two tensors are named a"):
        write_shard(tmp_path / "x.safetensors", twice, None)


@pytest.fixture
def sharded(tmp_path):
    make_model().save_pretrained(tmp_path / "sharded", max_shard_size="5KB")
    return tmp_path / "sharded"


def test_the_index_names_the_new_tensors_and_their_size(sharded, tmp_path):
    def doubled(stored):
        other = unchanged(stored)
        return [other, new_tensor(f"{stored.name}.twin", torch.float32, (1,), lambda: [torch.ones(1)])]

    (tmp_path / "copy").mkdir()
    source = open_checkpoint(sharded)
    rewrite(source, tmp_path / "copy", doubled)
    before = json.loads((sharded / "model.safetensors.index.json").read_text())
    after = json.loads((tmp_path / "copy/model.safetensors.index.json").read_text())
    num_tensors = len(before["weight_map"])
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"] + 4 * num_tensors
    assert after["metadata"]["total_parameters"] == before["metadata"]["total_parameters"]
    for name, file in after["weight_map"].items():
        assert name in load_file(tmp_path / "copy" / file)
        assert before["weight_map"][name.removesuffix(".twin")] == file
    assert len(after["weight_map"]) == 2 * num_tensors
    open_checkpoint(tmp_path / "copy")


def test_one_file_is_read_in_place_of_an_index_as_transformers_does(sharded, folder):
    shutil.copyfile(folder / "model.safetensors", sharded / "model.safetensors")
    assert set(open_checkpoint(sharded).tensors) == set(tensors())


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "names no shards"),
        ('{"weight_map": {}}', "names no shards"),
        ('{"weight_map": {"a": 1}}', "names no shards"),
        ('{"weight_map": {"a": "/etc/hostname"}}', "shard '/etc/hostname' .* is missing"),
        ('{"weight_map": {"a": ".."}}', r"shard '\.\.' .* is missing"),
        ('{"weight_map": {"a": "sub/x.safetensors"}}', "shard 'sub/x.safetensors' .* is missing"),
        ('{"weight_map": {"a": "model.safetensors.index.json"}}', "is damaged"),
    ],
)
def test_an_index_that_cannot_be_trusted_is_refused(tmp_path, index, message):
    (tmp_path / "sub").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "sub/x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ArtefactError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("place", ["a.safetensors", "b.safetensors"])
def test_a_tensor_in_two_shards_is_refused(tmp_path, place):
    for name in "ab":
        save_file({"x": torch.ones(1), name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    places = {"x": place, "a": "a.safetensors", "b": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ArtefactError, match=r"do not hold what their index says \('x', for one\)"):
        open_checkpoint(tmp_path)


def test_companions_are_no_code_no_pickles_no_index_and_nothing_of_ours(tmp_path):
    (tmp_path / "model/sub.json").mkdir(parents=True)
    carried = ["config.json", "tokenizer.json", "chat_template.jinja", "vocab.txt", "tokenizer.model", "LICENSE.md"]
    left = [
        "model.safetensors.index.json",
        "adapter_config.json",
        "loki_model.json",
        "code.py",
        "optimizer.pt",
        "x.bin",
    ]
    for name in carried + left:
        (tmp_path / "model" / name).write_text(name)
    (tmp_path / "copy").mkdir()
    copy_companions(tmp_path / "model", tmp_path / "copy")
    assert {file.name: file.read_text() for file in (tmp_path / "copy").iterdir()} == {n: n for n in carried}


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:20], lambda data: b"", lambda data: data + b"x"]
)
def test_a_file_of_another_length_than_its_header_says_is_refused(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ArtefactError, match="is damaged: fetch the model again"):
        open_checkpoint(folder)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(folder):
    stored = open_checkpoint(folder).tensors["wide"]
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: stored.start + 8])
    with pytest.raises(ArtefactError, match="ended early"):
        stored.read()
    with pytest.raises(ArtefactError, match="ended early"):
        list(stored.raw())


def test_a_folder_without_safetensors_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match="has no safetensors weights: save it with safe_serialization"):
        open_checkpoint(tmp_path)


def test_the_dtype_is_named_in_nested_configs_too():
    config = {"torch_dtype": "float32", "text_config": {"dtype": "float32", "a": 1}, "rope": {"b": 2}, "c": None}
    assert with_dtype(config, torch.bfloat16) == {
        "dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "a": 1},
        "rope": {"b": 2},
        "c": None,
    }
