import pytest
import torch
from dialled_models import CONFIGS, EXAMPLES, TEXTS, train
from tiny import make_model, make_tokenizer

from loki.dialling.adapter import DialledAdapter
from loki.dialling.measure import Yardstick


@pytest.fixture
def trained(tmp_path):
    """Trains an adapter for some steps on the examples and returns its folder."""

    def make(kind, *, steps=30, folder="adapter", dtype=torch.float32):
        path = tmp_path / folder
        train(CONFIGS[kind](), steps=steps).to(dtype).save_pretrained(path)
        return path

    return make


@pytest.fixture
def dialled(trained):
    """An adapter of a kind on the tiny model."""
    return lambda kind, **options: DialledAdapter.load(make_model(), trained(kind, **options))


@pytest.fixture
def yardstick():
    return lambda adapter: Yardstick.of(adapter, make_tokenizer(), EXAMPLES, "mine", TEXTS)
