"""Attributing a set of prompts into a log: resumable, in one process or many."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from loki.analysis.attribution import attribute_prompts
from loki.analysis.path import PromptAttribution
from loki.analysis.plan import Plan
from loki.analysis.ranks import Ranks
from loki.analysis.settings import KVASettings
from loki.architecture import attribution_sites, shape_of, site_warning
from loki.choices import TargetName
from loki.errors import InputError
from loki.log.schema import LogHeader, parse_shard
from loki.log.writer import Batch, LogWriter
from loki.progress import Track, silent
from loki.prompts.encoding import EncodedPrompt, encode_prompt
from loki.prompts.prompt import Prompt
from loki.provenance import digest, fingerprint_model

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class AnalysisOptions:
    """How an analysis is carried out; the settings of the attribution itself are `KVASettings`."""

    target: TargetName = "predicted"
    """The attributed token: the model's own prediction, or the first token of the prompt's answer."""
    chat_template: bool | None = None
    """Put messages into the model's chat template; None: where it has one."""
    batch_size: int = 1
    """Prompts that go through the model together."""
    max_branches: int | None = None
    """Branches under way at once; None: as many as fit into a bounded amount of memory."""
    shard: str | None = None
    """`i/n`: only this part of the prompts, for machines without a common launcher; see `loki.log.merge`."""
    log_dtype: str = "float32"
    """float32, or float16 for half the disk."""

    def __post_init__(self) -> None:
        if self.max_branches is not None and self.max_branches < 1:
            raise InputError(f"max_branches {self.max_branches} is not possible: give 1 or more")


@dataclass(frozen=True)
class Analysis:
    """Prompts made ready for a model, before anything is computed or written."""

    model: PreTrainedModel
    settings: KVASettings
    options: AnalysisOptions
    prompt_ids: list[str]
    encoded: list[EncodedPrompt]
    plan: Plan
    header: LogHeader = field(repr=False)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        settings: KVASettings,
        options: AnalysisOptions,
        *,
        model_name: str,
        prompt_set: str,
    ) -> Analysis:
        """Encode all prompts, and plan who computes what.

        Raises:
            InputError: no prompts, one too long for the model, or one without the answer that is the target.
            ArchitectureError: the model's projections cannot be found.
        """
        if not prompts:
            raise InputError("there are no prompts to analyse: give at least one")
        encoded = [encode_prompt(tokenizer, prompt, chat_template=options.chat_template) for prompt in prompts]
        longest = getattr(model.config, "max_position_embeddings", None)
        for prompt, tokens in zip(prompts, encoded, strict=True):
            if longest is not None and len(tokens.ids_T) > longest:
                raise InputError(
                    f"prompt {prompt.id!r} has {len(tokens.ids_T)} tokens, the model takes {longest}: shorten it"
                )
            if options.target == "answer" and tokens.answer_id is None:
                raise InputError(f"prompt {prompt.id!r} has no answer: give it one, or use --target predicted")
        shape = shape_of(model)
        attribution_sites(model, settings.site, settings.site_module)  # refuses what the model does not have
        warning = site_warning(model, settings.site, settings.site_module)
        if warning is not None:
            logger.warning(warning)
        content = [
            [prompt.id, tokens.ids_T.tolist(), tokens.answer_id if options.target == "answer" else None]
            for prompt, tokens in zip(prompts, encoded, strict=True)
        ]
        return cls(
            model,
            settings,
            options,
            [prompt.id for prompt in prompts],
            encoded,
            Plan.of(
                [len(tokens.ids_T) for tokens in encoded],
                options.batch_size,
                None if options.shard is None else parse_shard(options.shard),
            ),
            LogHeader(
                model=fingerprint_model(model).as_dict(),
                model_name=model_name,
                prompts=f"{prompt_set} {digest(content)}",
                settings={**settings.as_dict(), "target": options.target},
                num_layers=shape.num_layers,
                num_rows=shape.num_rows,
                dtype=options.log_dtype,
                shard=options.shard,
            ),
        )

    @property
    def num_prompts(self) -> int:
        """Prompts of this run: of its shard, where it has one."""
        return sum(map(len, self.plan.parts))

    def attribute(self, places: Sequence[int]) -> list[PromptAttribution]:
        """Attribution of the prompts at some places of the prompt set, as one batch."""
        chosen = [self.encoded[place] for place in places]
        return attribute_prompts(
            self.model,
            [tokens.ids_T for tokens in chosen],
            self.settings,
            target_ids=[tokens.answer_id for tokens in chosen] if self.options.target == "answer" else None,
            max_branches=self.options.max_branches,
        )

    def write(self, output: Path, *, ranks: Ranks | None = None, track: Track = silent) -> bool:
        """Attribute every prompt and write the log to `output`; False where it was complete already.

        An interrupted run goes on where it stopped when called again with the same arguments. Several ranks share
        the work and the folder of parts; the first of them assembles the log.

        Raises:
            InputError: scores that are not finite.
            ArtefactError, OutputError: as `LogWriter`.
        """
        ranks = ranks or Ranks()
        writer = LogWriter(output, self.header, self.prompt_ids, self.plan.parts)
        was_complete = writer.finished
        missing = writer.missing_batches(ranks.rank, ranks.num_ranks)
        sizes = [len(self.plan.parts[index]) for index in missing]
        what = "analysing" if ranks.num_ranks == 1 else f"analysing (process {ranks.rank + 1} of {ranks.num_ranks})"
        for index in track(missing, what, sizes=sizes, unit="prompts") if missing else ():
            results = [result for places in self.plan.batches(index) for result in self.attribute(places)]
            writer.write_batch(index, self._columns(self.plan.parts[index], results))
        ranks.wait_for_all()
        if ranks.is_first:
            writer.finish()
        ranks.wait_for_all()
        return not was_complete

    def _columns(self, places: Sequence[int], results: Sequence[PromptAttribution]) -> Batch:
        unknown = torch.full((self.header.num_layers,), float("nan"))
        gaps = [unknown if result.completeness_gap_L is None else result.completeness_gap_L for result in results]
        return Batch(
            scores_NLD=torch.stack([result.scores_LD for result in results]).numpy(),
            target_ids_N=np.array([result.target_id for result in results]),
            num_tokens_N=np.array([len(self.encoded[place].ids_T) for place in places]),
            completeness_gaps_NL=torch.stack(gaps).numpy(),
        )


def analyse(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: KVASettings,
    output: Path,
    *,
    model_name: str,
    prompt_set: str,
    options: AnalysisOptions | None = None,
    track: Track = silent,
) -> None:
    """Attribute prompts into a log in one process: `Analysis.of`, then `Analysis.write`."""
    analysis = Analysis.of(
        model,
        tokenizer,
        prompts,
        settings,
        options or AnalysisOptions(),
        model_name=model_name,
        prompt_set=prompt_set,
    )
    analysis.write(output, track=track)
