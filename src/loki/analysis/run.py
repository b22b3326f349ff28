"""Attributing a set of prompts into a log, resumable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from loki.analysis.attribution import attribute_prompt
from loki.analysis.settings import KVASettings
from loki.architecture import shape_of
from loki.errors import InputError, OutputError
from loki.log.schema import LogHeader
from loki.log.writer import Batch, LogWriter
from loki.progress import Track, silent
from loki.prompts.questions import load_probe
from loki.prompts.render import encode_chat, single_choice_prompt
from loki.provenance import digest, fingerprint_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """One user message to attribute."""

    id: str
    message: str


def probe_prompts() -> list[Prompt]:
    """The analysis half of the built-in probe."""
    return [Prompt(question.id, single_choice_prompt(question)) for question in load_probe("analysis")]


def analyse(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: KVASettings,
    output: Path,
    *,
    model_name: str,
    prompt_set: str,
    batch_size: int = 8,
    track: Track = silent,
) -> None:
    """Attribute every prompt (as a chat message) and write the log to `output`, which must not exist yet.

    `batch_size` prompts are computed between two saves. An interrupted run goes on where it stopped when
    called again with the same arguments.

    Raises:
        InputError: no prompts, one too long for the model, or scores that are not finite.
        ArtefactError, OutputError: as `LogWriter`.
    """
    if output.exists():
        raise OutputError(f"{output} exists already: remove it or choose another output file")
    shape = shape_of(model)
    header = LogHeader(
        model=fingerprint_model(model).as_dict(),
        model_name=model_name,
        prompts=f"{prompt_set} {digest([[prompt.id, prompt.message] for prompt in prompts])}",
        settings=settings.as_dict(),
        num_layers=shape.num_layers,
        num_rows=shape.num_rows,
    )
    ids = [encode_chat(tokenizer, [{"role": "user", "content": prompt.message}]) for prompt in prompts]
    longest = getattr(model.config, "max_position_embeddings", None)
    for prompt, ids_T in zip(prompts, ids, strict=True):
        if longest is not None and len(ids_T) > longest:
            raise InputError(f"prompt {prompt.id!r} has {len(ids_T)} tokens, the model takes {longest}: shorten it")
    writer = LogWriter(output, header, [prompt.id for prompt in prompts], batch_size)
    for index in track(writer.missing_batches(), "analysing"):
        batch = [attribute_prompt(model, ids_T, settings) for ids_T in ids[writer.batch_slice(index)]]
        unknown = torch.full((shape.num_layers,), float("nan"))
        writer.write_batch(
            index,
            Batch(
                scores_NLD=torch.stack([result.scores_LD for result in batch]).numpy(),
                target_ids_N=np.array([result.target_id for result in batch]),
                num_tokens_N=np.array([len(ids_T) for ids_T in ids[writer.batch_slice(index)]]),
                completeness_gaps_NL=torch.stack(
                    [unknown if result.completeness_gap_L is None else result.completeness_gap_L for result in batch]
                ).numpy(),
            ),
        )
    writer.finish()
