"""Attributing a set of prompts, or scoring a set of texts, into a log: resumable, in one process or many."""

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
from loki.analysis.row_scores import require_predictions, score_texts
from loki.analysis.settings import KVASettings, RowScoreSettings
from loki.analysis.windows import encode_windows
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
    """How an analysis is carried out; what is computed is `KVASettings` or `RowScoreSettings`."""

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
    settings: KVASettings | RowScoreSettings
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
        settings: KVASettings | RowScoreSettings,
        options: AnalysisOptions,
        *,
        model_name: str,
        prompt_set: str,
    ) -> Analysis:
        """Encode all prompts, and plan who computes what.

        For `RowScoreSettings` the windows of long texts are the prompts from here on.

        Raises:
            InputError: no prompts, one too long for the model, one without the answer that is the target, or options
                that only KVA has.
            ArchitectureError: the model's projections cannot be found.
        """
        if not prompts:
            raise InputError("there are no prompts to analyse: give at least one")
        if isinstance(settings, KVASettings):
            ids = [prompt.id for prompt in prompts]
            encoded = [encode_prompt(tokenizer, prompt, chat_template=options.chat_template) for prompt in prompts]
        else:
            _require_row_scores(options)
            ids, encoded = encode_windows(tokenizer, prompts, settings.max_tokens, chat_template=options.chat_template)
        longest = getattr(model.config, "max_position_embeddings", None)
        for prompt_id, tokens in zip(ids, encoded, strict=True):
            if longest is not None and len(tokens.ids_T) > longest:
                remedy = "shorten it" if isinstance(settings, KVASettings) else f"give --max-tokens {longest} or less"
                raise InputError(
                    f"prompt {prompt_id!r} has {len(tokens.ids_T)} tokens, the model takes {longest}: {remedy}"
                )
            if isinstance(settings, RowScoreSettings):
                require_predictions(f"prompt {prompt_id!r}", tokens.ids_T, settings)
            elif options.target == "answer" and tokens.answer_id is None:
                raise InputError(f"prompt {prompt_id!r} has no answer: give it one, or use --target predicted")
        shape = shape_of(model)
        site = settings.site if isinstance(settings, KVASettings) else "down_proj"
        attribution_sites(model, site, settings.site_module)  # refuses what the model does not have
        if isinstance(settings, KVASettings):
            warning = site_warning(model, settings.site, settings.site_module)
            if warning is not None:
                logger.warning(warning)
        content = [
            [prompt_id, tokens.ids_T.tolist(), tokens.answer_id if options.target == "answer" else None]
            for prompt_id, tokens in zip(ids, encoded, strict=True)
        ]
        named: dict[str, str | int | bool] = {**settings.as_dict()}
        if isinstance(settings, KVASettings):
            named["target"] = options.target
        return cls(
            model,
            settings,
            options,
            ids,
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
                settings=named,
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
        """Attribution (or scores) of the prompts at some places of the prompt set, as one batch."""
        chosen = [self.encoded[place] for place in places]
        if isinstance(self.settings, RowScoreSettings):
            return score_texts(self.model, [tokens.ids_T for tokens in chosen], self.settings)
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


def _require_row_scores(options: AnalysisOptions) -> None:
    """Refuse what only KVA has.

    Raises:
        InputError: it is asked for.
    """
    if options.target != "predicted":
        raise InputError(f"target {options.target!r} is for score kva: leave it out")
    if options.max_branches is not None:
        raise InputError(f"max_branches {options.max_branches} is for score kva: leave it out")
    if options.log_dtype != "float32":
        raise InputError(
            f"log dtype {options.log_dtype!r} is for score kva: it has no numbers below 6e-8, where squares of small "
            "gradients are; use float32"
        )


def analyse(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: KVASettings | RowScoreSettings,
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
