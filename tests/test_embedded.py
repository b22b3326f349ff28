"""The embedded model's folder, with an invented conversion; the real one is in test_real_model.py."""

import json

import pytest

from loki import embedded
from loki.errors import OutputError


@pytest.fixture
def convert(monkeypatch, tmp_path):
    """Replaces the conversion; what it is given is called with the folder that will hold the model."""
    monkeypatch.setenv("LOKI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_find_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(embedded.importlib.metadata, "version", lambda package: "1")
    directory = tmp_path / "cache/SmolLM2-135M-Instruct-1"

    def replace(meanwhile):
        def write(gguf, folder):
            (folder / "model.safetensors").write_text("ours")
            meanwhile(directory)

        monkeypatch.setattr(embedded, "_convert", write)
        return directory

    return replace


def test_converted_once(convert):
    calls = []
    directory = convert(calls.append)
    assert [embedded.embedded_model_directory() for _ in range(2)] == [directory, directory]
    assert len(calls) == 1
    assert json.loads((directory / embedded.LABEL_FILE).read_text())["label"] == embedded.EMBEDDED_LABEL


def test_two_processes_convert_at_the_same_time(convert):
    """The one that ends last takes the other's, and leaves nothing aside."""

    def other(directory):
        directory.mkdir()
        (directory / "model.safetensors").write_text("theirs")
        (directory / embedded.LABEL_FILE).write_text("{}")

    directory = convert(other)
    assert embedded.embedded_model_directory() == directory
    assert (directory / "model.safetensors").read_text() == "theirs"
    assert list(directory.parent.iterdir()) == [directory]


def test_a_folder_of_something_else_is_left_alone(convert):
    def other(directory):
        directory.mkdir()
        (directory / "mine.txt").touch()

    directory = convert(other)
    with pytest.raises(OutputError, match="cannot write"):
        embedded.embedded_model_directory()
    assert [path.name for path in directory.iterdir()] == ["mine.txt"]
