"""Parts of a trained change as `loki dial` has them: a scale for each layer, or some of the rows.

What each layer or row gained and damaged is measured on examples and texts that are not scored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loki.dialling.adapter import DialledAdapter
from loki.dialling.measure import Yardstick
from loki.dialling.settings import knobs
from loki.dialling.shares import Shares, integrated
from loki.evaluation.text import Text
from loki.study.settings import DialSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def dialled_parts(
    section: DialSection,
    base: PreTrainedModel,
    adapter: Path,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Sequence[Mapping[str, Any]],
    texts: Sequence[Text],
) -> Callable[[float], PreTrainedModel]:
    """The model with a part of the adapter's change, by the position of the knob in [0, 1].

    Raises:
        LokiError: an adapter that cannot be dialled, or nothing to measure it by.
    """
    dialled = DialledAdapter.load(base, adapter)
    examples = held_out[: section.examples]
    yardstick = Yardstick.of(
        dialled, tokenizer, examples, section.texts, texts, window=section.window, max_tokens=section.text_tokens
    )
    shares = Shares(-integrated(dialled, yardstick.task_losses), integrated(dialled, yardstick.divergences))
    knob = knobs(shares, dialled.layers_U)[section.by]

    def part(position: float) -> PreTrainedModel:
        dialled.set(knob(position))
        merged: PreTrainedModel = copy.deepcopy(dialled.model).merge_and_unload()
        return merged

    return part
