"""What a setting of the dial does: the task's loss on held-out examples, and how far a text's predictions moved.

Shape suffixes: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from loki.dialling.adapter import DialledAdapter
from loki.errors import InputError
from loki.evaluation.completions import completion_loss
from loki.evaluation.remembered import RememberedModel
from loki.evaluation.text import Text, measure, text_windows
from loki.progress import Track, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Measured:
    """One point of a curve."""

    task_loss: float
    """Mean over the held-out examples, nats per token of the completion."""
    text_loss: float
    """Nats per token."""
    kl: float
    """KL(base ‖ model) on the text, nats per token."""


@dataclass(frozen=True)
class Yardstick:
    """The held-out part of the task and the text, made ready for a model."""

    adapter: DialledAdapter
    tokenizer: PreTrainedTokenizerBase
    examples: Sequence[Mapping[str, Any]]
    windows: Sequence[torch.Tensor]
    """Token ids (T,) each."""
    base: RememberedModel
    """The model without its adapter."""

    @classmethod
    def of(
        cls,
        adapter: DialledAdapter,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Mapping[str, Any]],
        name: str,
        texts: Sequence[Text],
        *,
        window: int = 512,
        max_tokens: int | None = None,
        seed: int = 0,
    ) -> Yardstick:
        """Cut the texts of `name` into windows; with `max_tokens`, as many, drawn by `seed`, as predict so many.

        Raises:
            InputError: no examples, or no text of two tokens.
        """
        if not examples:
            raise InputError("there are no held-out examples: give at least one")
        cut = text_windows(tokenizer, name, texts, window, max_tokens=max_tokens, seed=seed)
        model: Any = adapter.model
        base = RememberedModel(model, reading=model.disable_adapter)
        return cls(adapter, tokenizer, examples, [ids_T for _, ids_T in cut], base)

    @property
    def num_tokens(self) -> int:
        """Predicted tokens of the text."""
        return sum(len(ids_T) - 1 for ids_T in self.windows)

    def measure(self, *, what: str = "measuring", track: Track = silent) -> Measured:
        """The point at which the adapter is set."""
        model: Any = self.adapter.model
        jobs: list[Mapping[str, Any] | torch.Tensor] = [*self.examples, *self.windows]
        task = text = kl = 0.0
        for job in track(jobs, what):
            if isinstance(job, torch.Tensor):
                moved = measure(model, job, reference=self.base)
                text, kl = text + moved.loss, kl + (moved.kl or 0.0)
            else:
                with torch.no_grad():
                    task += float(completion_loss(model, self.tokenizer, job))
        return Measured(task / len(self.examples), text / self.num_tokens, kl / self.num_tokens)

    def task_losses(self) -> Iterator[torch.Tensor]:
        """Terms of the task's mean loss, to be differentiated."""
        model: Any = self.adapter.model
        for example in self.examples:
            yield completion_loss(model, self.tokenizer, example) / len(self.examples)

    def divergences(self) -> Iterator[torch.Tensor]:
        """Terms of the text's mean divergence, to be differentiated."""
        model: Any = self.adapter.model
        for ids_T in self.windows:
            ids_1T = ids_T[None].to(model.device)
            base_TV = self.base(input_ids=ids_1T).logits[0, :-1].float().log_softmax(-1)
            now_TV = model(input_ids=ids_1T, use_cache=False).logits[0, :-1].float().log_softmax(-1)
            divergence = torch.nn.functional.kl_div(now_TV, base_TV, reduction="sum", log_target=True)
            yield divergence / self.num_tokens


def perplexity_rise(measured: Measured, base: Measured) -> float:
    """In percent of the base's perplexity on the text."""
    return 100 * math.expm1(measured.text_loss - base.text_loss)
