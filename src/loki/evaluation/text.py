"""Running text: the loss of its tokens, and how far predictions moved from the base's.

On small models most benchmarks are near chance and say nothing of what was forgotten; these two always do.

Shape suffixes: T tokens, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from loki.errors import InputError
from loki.evaluation.remembered import RememberedModel
from loki.evaluation.scores import ItemScores
from loki.progress import Track, silent
from loki.prompts.json_lines import read_rows, text_field, user_path
from loki.prompts.parts import PartName, part_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FILES = {"wikitext2": "text/wikitext2_test.jsonl.gz", "c4": "text/c4_demo.jsonl"}
"""Where a data folder keeps the texts that have a name."""
ROWS_AT_ONCE = 128
"""Positions whose whole distributions are in memory in float32 at one time."""


@dataclass(frozen=True)
class Text:
    """One text of a corpus."""

    id: str
    text: str


@dataclass(frozen=True)
class Movement:
    """Sums over the predicted tokens of one text, in nats."""

    loss: float
    """Negative log-likelihood."""
    kl: float | None
    """KL(reference ‖ model), where there is a reference."""
    reference_loss: float | None
    """Negative log-likelihood by the reference."""
    num_tokens: int


class TextScores(NamedTuple):
    """What was read of one corpus by a model, and on the way by its reference."""

    model: list[ItemScores]
    """Loss, and with a reference the divergence from it."""
    reference: list[ItemScores]
    """Loss; empty without a reference."""


def load_texts(name: str, data_dir: Path | None = None, *, part: PartName | None = None) -> list[Text]:
    """The texts of `wikitext2` or `c4` in a data folder, or of a JSON Lines file with `text` and perhaps `id`.

    `part` keeps one part of them, by id: `loki.prompts.parts`.

    Raises:
        InputError: no data folder for a corpus with a name, a file that cannot be read, or nothing in it.
    """
    if name in FILES and data_dir is None:
        raise InputError(f"text {name!r} comes from a data folder: give --data-dir, or name a JSON Lines file")
    path = data_dir / FILES[name] if data_dir is not None and name in FILES else user_path(name)
    if name not in FILES and not path.exists():
        raise InputError(f"text {name!r} is unknown: give {', '.join(FILES)} or a JSON Lines file with 'text'")
    texts = [
        Text(str(row.get("id", f"line {number}")), text_field(row, "text", where))
        for where, number, row in read_rows(path)
    ]
    kept = [text for text in texts if part is None or part_of(text.id) == part]
    if not kept:
        raise InputError(f"text {name!r} is empty: give at least one row with 'text'")
    return kept


def text_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    texts: Sequence[Text],
    *,
    reference: PreTrainedModel | RememberedModel | None = None,
    window: int = 512,
    max_tokens: int | None = None,
    seed: int = 0,
    track: Track = silent,
) -> TextScores:
    """Per-token loss of a corpus, and with `reference` the mean KL(reference ‖ model) over the same tokens.

    Items are windows of at most `window` tokens, each read on its own; its first token is not predicted. With
    `max_tokens`, windows drawn by `seed` that predict at least as many, or all there are. Tasks are named
    `<name>_loss` and `<name>_kl`, in nats per token; `exp` of the first is the perplexity. A reference for several
    models is best a `RememberedModel`.

    Raises:
        InputError: no text has two tokens.
    """
    windows = text_windows(tokenizer, name, texts, window, max_tokens=max_tokens, seed=seed)
    moved = [measure(model, ids_T, reference=reference) for _, ids_T in track(windows, f"reading {name}")]
    ids = tuple(id_ for id_, _ in windows)
    weights = tuple(float(part.num_tokens) for part in moved)

    def scores(metric: str, sums: Sequence[float]) -> ItemScores:
        means = tuple(total / number for total, number in zip(sums, weights, strict=True))
        return ItemScores(f"{name}_{metric}", metric, ids, means, "nats per token", False, weights=weights)

    found = TextScores([scores("loss", [part.loss for part in moved])], [])
    if reference is not None:
        found.model.append(scores("kl", [part.kl for part in moved if part.kl is not None]))
        losses = [part.reference_loss for part in moved if part.reference_loss is not None]
        found.reference.append(scores("loss", losses))
    return found


def text_windows(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    texts: Sequence[Text],
    window: int,
    *,
    max_tokens: int | None = None,
    seed: int = 0,
) -> list[tuple[str, torch.Tensor]]:
    """Ids and tokens (T,) of windows of at most `window` tokens, as `text_scores` reads them.

    Raises:
        InputError: no text has two tokens.
    """
    if window < 2:
        raise InputError(f"window {window} is not possible: give 2 tokens or more")
    windows = [
        (f"{text.id}/{number}", ids_T)
        for text in texts
        for number, ids_T in enumerate(windows_of(tokenizer, text.text, window))
    ]
    if not windows:
        raise InputError(f"text {name!r} has no two tokens in a row: give longer texts")
    return windows if max_tokens is None else _some(windows, max_tokens, seed)


def windows_of(tokenizer: PreTrainedTokenizerBase, text: str, window: int) -> Iterator[torch.Tensor]:
    """Token ids (T,) of a text, in windows; a last one of a single token is left out, for it predicts nothing."""
    ids_T = torch.tensor(tokenizer(text, verbose=False).input_ids, dtype=torch.int64)
    return (part_T for part_T in torch.split(ids_T, window) if len(part_T) > 1)


@torch.no_grad()
def measure(
    model: PreTrainedModel, ids_T: torch.Tensor, *, reference: PreTrainedModel | RememberedModel | None = None
) -> Movement:
    """Loss and divergence of the tokens after the first."""
    now_TV = _scores_of_next(model, ids_T)
    base_TV = None if reference is None else _scores_of_next(reference, ids_T).to(now_TV.device)
    targets_T = ids_T[1:].to(now_TV.device)
    loss = divergence = base_loss = 0.0
    for start in range(0, len(targets_T), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        now = now_TV[rows].float().log_softmax(-1)
        targets = targets_T[rows, None]
        loss -= float(now.gather(-1, targets).sum(dtype=torch.float64))
        if base_TV is not None:
            base = base_TV[rows].float().log_softmax(-1)
            base_loss -= float(base.gather(-1, targets).sum(dtype=torch.float64))
            divergence += float((base.exp() * (base - now)).sum(dtype=torch.float64))
    if base_TV is None:
        return Movement(loss, None, None, len(targets_T))
    return Movement(loss, divergence, base_loss, len(targets_T))


def _some(windows: list[tuple[str, torch.Tensor]], max_tokens: int, seed: int) -> list[tuple[str, torch.Tensor]]:
    kept: list[tuple[str, torch.Tensor]] = []
    num_tokens = 0
    for window in random.Random(seed).sample(windows, len(windows)):
        if num_tokens >= max_tokens:
            break
        kept.append(window)
        num_tokens += len(window[1]) - 1
    return kept


def _scores_of_next(model: PreTrainedModel | RememberedModel, ids_T: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (T−1, V), but for a constant a row, of the tokens after the first."""
    logits_TV: torch.Tensor = model(input_ids=ids_T[None].to(model.device), use_cache=False).logits[0, :-1]
    return logits_TV
