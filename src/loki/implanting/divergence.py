"""What merging costs in predictions: KL divergence between a model with its adapter and the merged checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from loki.errors import InputError
from loki.models import load_model, load_tokenizer
from loki.prompts.questions import load_probe
from loki.prompts.render import open_prompt

MAX_TOKENS = 512
"""How much of the text is read."""
BUILT_IN = "probe"


@dataclass(frozen=True)
class Divergence:
    """How far the merged model's predictions are from those of the model with its adapter."""

    kl_nats_per_token: float
    """Mean over tokens of KL(adapter ‖ merged)."""
    num_tokens: int


def divergence_tokens(source: str, model: str) -> torch.Tensor:
    """The first `MAX_TOKENS` tokens (1, T) of a text file in UTF-8, or of the built-in questions for `probe`.

    Raises:
        InputError: the file cannot be read, has fewer than two tokens, or the model has no tokenizer.
    """
    if source == BUILT_IN:
        text = "\n\n".join(open_prompt(question) for question in load_probe("evaluation"))
    else:
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise InputError(
                f"text {source!r} for --kl cannot be read ({reason}): give a text file, or probe"
            ) from error
    input_ids: torch.Tensor = load_tokenizer(model)(text, return_tensors="pt").input_ids[:, :MAX_TOKENS].long()
    if input_ids.shape[1] < 2:
        raise InputError(f"text {source!r} for --kl has fewer than 2 tokens: give a longer one")
    return input_ids


def kl_to_adapter(base: str, adapter: Path, merged: Path, input_ids: torch.Tensor) -> Divergence:
    """Mean KL divergence of next-token distributions over the tokens (1, T) of a text.

    Both models compute in float32, so what is measured is the rounding of stored weights; they are in memory one
    after the other.

    Raises:
        InputError: a model that cannot be loaded.
    """
    expected_TV = _log_probabilities(base, input_ids, adapter)
    found_TV = _log_probabilities(str(merged), input_ids)
    kl_T = (expected_TV.exp() * (expected_TV - found_TV)).sum(dim=-1)
    return Divergence(float(kl_T.mean()), len(kl_T))


@torch.no_grad()
def _log_probabilities(model: str, input_ids: torch.Tensor, adapter: Path | None = None) -> torch.Tensor:
    from peft import PeftModel

    loaded = load_model(model, dtype="float32")
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, adapter).eval()
    logits: torch.Tensor = loaded(input_ids.to(loaded.device)).logits[0]
    return logits.double().log_softmax(dim=-1).cpu()
