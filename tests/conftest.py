"""Fixtures of all tests. Nothing may reach for the network."""

import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
# Modelling files of model folders are copied there before they run.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="loki-modules-")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
# Most models here are so small that sharing their work costs more than it saves; and two tests run at a time.
os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path

import hypothesis
import pytest
from frozen import pytest_collection_finish  # noqa: F401
from tiny import make_model, make_tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("loki", deadline=None)
hypothesis.settings.load_profile("loki")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--data-dir", type=Path, help="folder of benchmark data, for tests marked `data`")


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture
def data_dir(pytestconfig: pytest.Config) -> Path:
    """The folder of benchmark data."""
    chosen: Path | None = pytestconfig.getoption("data_dir")
    assert chosen is not None, "give --data-dir"
    return chosen


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return make_model()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, as a Hugging Face folder."""
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_model().save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def positions() -> list[list[int]]:
    return [[7, 1], [0, 19, 3], [5]]
