import logging
from collections.abc import Callable

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 40


def build_tiny_model(family: str = "llama", *, seed: int = 0, attention: str = "eager", **changes) -> PreTrainedModel:
    """A random model whose weights are large enough for its predictions to depend on every layer."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "initializer_range": 0.25,
        "pad_token_id": None,
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(sizes | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # norms at 1 and biases at 0 would hide what is done with them
            parameter.data += 0.2 * torch.randn_like(parameter)
        elif "embed" in name:
            parameter.data *= 4
    return model.eval()


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    return build_tiny_model


@pytest.fixture(scope="session")
def random_ids() -> Callable[..., torch.Tensor]:
    """Token ids (prompts, tokens), the same for the same shape."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(1))

    return draw


@pytest.fixture
def no_fallback(caplog):
    """The branch engine itself must have served: no warning that it could not."""
    caplog.set_level(logging.WARNING)
    yield
    # `caplog.records` has only those of the phase that asks.
    assert [record.message for record in caplog.get_records("call") if record.name.startswith("loki")] == []
