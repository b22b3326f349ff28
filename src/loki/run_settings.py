"""The settings of a run: one YAML file, checked before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loki.analysis.settings import KVASettings
from loki.choices import DtypeName, EngineName, Objective, Rule, SiteName, StrategyName
from loki.errors import InputError
from loki.selection.quota import parse_quota
from loki.training.config import BudgetSection, PreserveSection, first_mistake, read_settings
from loki.training.settings import AnswersName, ReporterName, TrainSettings


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AnalyseSection(_Section):
    """Stage 1."""

    prompts: Literal["probe"] = "probe"
    rule: Rule = "riemann_left"
    steps: int = 7
    objective: Objective = "probability"
    multiply_by_activation: bool = True
    site: SiteName = "auto"
    engine: EngineName = "branch"
    batch_size: int = Field(default=4, ge=1)

    def settings(self) -> KVASettings:
        """In the library's own form.

        Raises:
            InputError: a combination that is not possible.
        """
        return KVASettings(**self.model_dump(exclude={"prompts", "batch_size"}))


class SelectSection(_Section):
    """Stage 2."""

    strategy: StrategyName = "layer_balanced"
    quota: str | int | float = 10


class TrainSection(_Section):
    """Stage 3."""

    data: str = "function-calls"
    examples: int | None = Field(default=None, ge=1)
    learning_rate: float
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 4
    accumulate: int = 1
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_length: int | None = 2048
    save_every: int = 20
    log_every: int = 5
    gradient_checkpointing: bool = False
    scale_learning_rate: bool = True
    rank: int = 0
    lora_alpha: float | None = None
    packing: bool = False
    answers: AnswersName = "auto"
    report_to: ReporterName = "none"
    mixed_precision: bool = False
    budget: BudgetSection | None = None
    preserve: PreserveSection | None = None
    row_rates: str | None = None

    def settings(self, seed: int) -> TrainSettings:
        """In the library's own form.

        Raises:
            InputError: a number that is not possible.
        """
        return TrainSettings(
            seed=seed, **self.model_dump(exclude={"data", "examples", "budget", "preserve", "row_rates"})
        )


class MergeSection(_Section):
    """The merged checkpoint."""

    dtype: DtypeName = "auto"
    """Stored dtype; `auto` keeps the model's own."""


class EvaluateSection(_Section):
    """Before and after."""

    task: Literal["function-calls"] | None = None
    requests: int = Field(default=100, ge=1)
    completions: str | None = None
    """JSON Lines of held-out examples whose completions' loss is measured."""
    knowledge: Literal["probe"] | None = "probe"


class RunSettings(_Section):
    """Everything that one run is made of."""

    model: str
    output_dir: Path
    seed: int = 0
    dtype: DtypeName = "auto"
    device: str | None = None
    trust_remote_code: bool = False
    analyse: AnalyseSection = AnalyseSection()
    select: SelectSection = SelectSection()
    train: TrainSection
    merge: MergeSection = MergeSection()
    evaluate: EvaluateSection = EvaluateSection()

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form, without the place where the run is kept."""
        values = self.model_dump(mode="json")
        del values["output_dir"]
        return values


def load_settings(path: Path, *, output_dir: Path | None = None) -> RunSettings:
    """Read a run's YAML.

    Raises:
        InputError: no such file, not YAML, or a setting that is unknown or not possible.
    """
    values = read_settings(path)
    if output_dir is not None:
        values["output_dir"] = str(output_dir)
    try:
        settings = RunSettings.model_validate(values)
    except ValidationError as error:
        raise InputError(f"settings file {path}: {first_mistake(error)}") from error
    # What the stages would refuse is refused before the first one starts.
    settings.analyse.settings()
    settings.train.settings(settings.seed)
    parse_quota(settings.select.quota)
    return settings
