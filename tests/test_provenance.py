import errno
import json
import os
import stat
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from loki import provenance
from loki.errors import ArtefactError, OutputError
from loki.provenance import (
    ModelFingerprint,
    compare_models,
    digest,
    fingerprint_model,
    new_directory,
    read_json,
    require_new_directory,
    write_bytes,
    write_json,
    write_text,
)

FINGERPRINT = ModelFingerprint("llama-2x8x12", "0123456789abcdef", "float32")
OLD, NEW = b"old content", b"new content, which is longer"


def tiny(family="llama", *, seed=0, dtype=torch.float32, **changes):
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 20, "head_dim": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, pad_token_id=None, **(sizes | heads | changes))
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()}


def num_open_files() -> int:
    """Open descriptors of this process; 0 where the system does not tell."""
    return len(names(Path("/proc/self/fd"))) if sys.platform == "linux" else 0


def raises_no_space(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# Every call of the operating system between "nothing is there" and "the file is in place".
WRITE_STEPS = [
    (tempfile, "TemporaryFile"),
    (tempfile, "mkstemp"),
    (Path, "open"),
    (os, "fsync"),
    (Path, "chmod"),
    (Path, "replace"),
]


@pytest.mark.parametrize(("owner", "step"), WRITE_STEPS, ids=[step for _, step in WRITE_STEPS])
@pytest.mark.parametrize("before", [None, OLD])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, owner, step, before):
    path = tmp_path / "file.bin"
    if before is not None:
        path.write_bytes(before)
    before_open = num_open_files()
    with monkeypatch.context() as patch:
        patch.setattr(owner, step, raises_no_space)
        with pytest.raises(OutputError, match=r"cannot write .*file\.bin: No space left on device"):
            write_bytes(path, NEW)
    assert names(tmp_path) == (set() if before is None else {"file.bin"})
    if before is not None:
        assert path.read_bytes() == before
    assert num_open_files() == before_open


def test_an_interrupt_while_writing_leaves_no_file(tmp_path, monkeypatch):
    def interrupt(_descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(tmp_path / "file.bin", NEW)
    assert names(tmp_path) == set()


def test_the_content_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    """At the time of fsync and of the rename the temporary file has all bytes, and the old file still stands."""
    path, seen = tmp_path / "file.bin", []
    path.write_bytes(OLD)

    def look():
        (temporary,) = [entry for entry in tmp_path.iterdir() if entry != path]
        return path.read_bytes(), temporary.read_bytes()

    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(("fsync", *look())), fsync(fd)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (seen.append(("replace", *look())), replace(a, b))[1])
    write_bytes(path, NEW)
    assert seen == [("fsync", OLD, NEW), ("replace", OLD, NEW)]
    assert path.read_bytes() == NEW
    assert names(tmp_path) == {"file.bin"}


def test_written_files_are_readable_by_others_and_parents_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    write_text(path, "α·z")
    assert path.read_bytes() == "α·z".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="choose another output folder"):
        write_bytes(tmp_path / "file" / "below", NEW)


def test_a_name_too_long_for_the_file_system_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="cannot write"):
        write_bytes(tmp_path / ("x" * 300), NEW)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_json_refuses_numbers_that_are_not_finite(tmp_path, number):
    path = tmp_path / "result.json"
    write_json(path, {"score": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"scores": [0.5, number]})
    assert json.loads(path.read_text()) == {"score": 1.0}
    assert names(tmp_path) == {"result.json"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(json_values)
def test_json_survives_a_round_trip(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "round_trip.json"
    write_json(path, value)
    assert read_json(path, what="value") == value


def test_reading_json_names_what_is_missing_or_damaged(tmp_path):
    with pytest.raises(ArtefactError, match=r"result .*gone\.json does not exist"):
        read_json(tmp_path / "gone.json", what="result")
    with pytest.raises(ArtefactError, match="cannot be read"):
        read_json(tmp_path, what="result")
    for content in (b'{"a": 1', b"\xff\xfe"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(ArtefactError, match="is not JSON"):
            read_json(tmp_path / "bad.json", what="result")


def test_digest_of_a_known_value():
    # printf '{"a":1,"b":"é"}' | sha256sum
    assert digest({"b": "é", "a": 1}) == "09ad9fd2fb648cb2"


@given(st.dictionaries(st.text(), st.integers(), min_size=2, max_size=5))
def test_digest_ignores_key_order_and_sees_values(values):
    assert digest(dict(reversed(values.items()))) == digest(values)
    key = next(iter(values))
    assert digest(values | {key: values[key] + 1}) != digest(values)


def test_versions_name_installed_packages_only(monkeypatch):
    monkeypatch.setattr(provenance, "VERSIONED_PACKAGES", ("torch", "no-such-package-of-ours"))
    assert provenance.versions() == {"torch": torch.__version__}


def test_equal_models_have_equal_fingerprints():
    assert fingerprint_model(tiny()) == fingerprint_model(tiny())
    assert fingerprint_model(tiny()).architecture == "llama-2x8x12"
    assert fingerprint_model(tiny()).dtype == "float32"


@pytest.mark.parametrize("element", [0, -1])
def test_any_changed_tensor_changes_the_fingerprint_of_weights_only(element):
    model = tiny()
    before = fingerprint_model(model).as_dict()
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        kept = flat[element].clone()
        flat[element] += 1
        after = fingerprint_model(model).as_dict()
        flat[element] = kept
        assert after["weights"] != before["weights"]
        assert {**after, "weights": ""} == {**before, "weights": ""}
    assert fingerprint_model(model).as_dict() == before


def test_fingerprint_differs_in_dtype():
    """Weights that bfloat16 holds exactly: the two models differ in nothing but their dtype."""
    narrow = tiny().to(torch.bfloat16)
    wide = tiny()
    wide.load_state_dict(narrow.state_dict())
    found, expected = fingerprint_model(narrow), fingerprint_model(wide)
    assert (found.dtype, expected.dtype) == ("bfloat16", "float32")
    assert (found.architecture, found.weights) == (expected.architecture, expected.weights)


@pytest.mark.parametrize(
    "other",
    [
        {"family": "qwen2"},
        {"num_hidden_layers": 3},
        {"hidden_size": 16},
        {"intermediate_size": 16},
    ],
    ids=str,
)
def test_fingerprint_differs_in_architecture(other):
    assert fingerprint_model(tiny(**other)).architecture != fingerprint_model(tiny()).architecture


def test_fingerprint_reads_a_bounded_share_of_large_tensors(monkeypatch):
    """A tensor of 8 elements with 4 samples: every second element counts, the others do not."""
    monkeypatch.setattr(provenance, "SAMPLES_PER_TENSOR", 4)
    model = tiny()
    norm = model.model.norm.weight.data
    before = fingerprint_model(model)
    norm[1] += 1
    assert fingerprint_model(model) == before
    norm[2] += 1
    assert fingerprint_model(model) != before


def test_the_same_model_is_no_warning():
    assert compare_models(FINGERPRINT.as_dict(), FINGERPRINT, what="log", strict=True) is None


@pytest.mark.parametrize(("key", "value"), [("weights", "feedfeedfeedfeed"), ("dtype", "bfloat16")])
def test_other_weights_warn_and_are_an_error_when_strict(key, value):
    found = FINGERPRINT.as_dict() | {key: value}
    warning = compare_models(found, FINGERPRINT, what="log x.h5", strict=False)
    assert warning == (
        "log x.h5 was made with other weights of the same architecture "
        f"({key} {value} there, {FINGERPRINT.as_dict()[key]} here)"
    )
    with pytest.raises(ArtefactError, match=f"{key} {value} there.*leave out --strict"):
        compare_models(found, FINGERPRINT, what="log x.h5", strict=True)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("found", [FINGERPRINT.as_dict() | {"architecture": "qwen2-2x8x12"}, {}])
def test_another_architecture_is_always_an_error(found, strict):
    with pytest.raises(ArtefactError, match=r"was made with a .* model, not with this llama-2x8x12 one: use the model"):
        compare_models(found, FINGERPRINT, what="log", strict=strict)


def test_a_new_directory_appears_whole(tmp_path):
    path = tmp_path / "deep" / "run"
    with new_directory(path) as inside:
        (inside / "first").write_text("1")
        assert not path.exists()
        (inside / "second").write_text("2")
    assert names(path) == {"first", "second"}
    assert names(path.parent) == {"run"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_new_directory_is_absent_after_an_error(tmp_path, error):
    def write_and_raise():
        with new_directory(tmp_path / "run") as inside:
            (inside / "first").write_text("1")
            raise error

    with pytest.raises(error):
        write_and_raise()
    assert names(tmp_path) == set()


def test_a_full_disk_inside_the_block_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match=r"cannot write .*run: No space left"), new_directory(tmp_path / "run"):
        raises_no_space()
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("owner", "step"),
    [(tempfile, "mkdtemp"), (Path, "chmod"), (Path, "replace")],
    ids=["mkdtemp", "chmod", "replace"],
)
def test_a_full_disk_around_the_block_leaves_nothing(tmp_path, monkeypatch, owner, step):
    with monkeypatch.context() as patch:
        patch.setattr(owner, step, raises_no_space)
        with pytest.raises(OutputError, match="No space left"), new_directory(tmp_path / "run") as inside:
            (inside / "first").write_text("1")
    assert names(tmp_path) == set()


def test_an_existing_place_is_refused_and_untouched(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for place in ("run", "file"):
        with pytest.raises(OutputError, match="exists already: remove it or choose"), new_directory(tmp_path / place):
            pytest.fail("the block must not be entered")
        with pytest.raises(OutputError, match="exists already"):
            require_new_directory(tmp_path / place)
    assert names(tmp_path / "run") == {"old"}


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "run").mkdir()
    with new_directory(tmp_path / "run") as inside:
        (inside / "first").write_text("1")
    assert names(tmp_path / "run") == {"first"}
