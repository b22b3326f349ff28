"""The settings of `loki train`: a YAML file, options, or both, checked before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from loki.choices import DtypeName, ModuleName
from loki.errors import InputError
from loki.training.settings import AnswersName, ReporterName, TrainSettings

if TYPE_CHECKING:
    from loki.training.budget import ForgettingBudget
    from loki.training.preserve import PreservePredictions

LENGTHS = {"steps", "epochs"}
"""Two ways to say how long to train: an option of the one comes before the other in the file."""
PRESERVE_OPTIONS = {"preserve": "text", "preserve_weight": "weight"}
"""Options that are settings of the section `preserve`."""
OPTION_OF = {"preserve.text": "--preserve"}
"""Settings that an option of another name gives."""


class BudgetSection(BaseModel):
    """A forgetting budget, as `loki.training.budget.ForgettingBudget` describes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str = "probe"
    max_loss_rise: float | None = None
    max_kl: float | None = None
    every: int = 20
    action: Literal["stop", "lower"] = "stop"
    factor: float = 0.5
    probe_accuracy: bool = True
    max_tokens: int = 2048

    def budget(self) -> ForgettingBudget:
        """The callback.

        Raises:
            InputError: a limit that is not possible, or a text that cannot be read.
        """
        from loki.training.budget import ForgettingBudget

        return ForgettingBudget(**self.model_dump())


class PreserveSection(BaseModel):
    """Texts to preserve, as `loki.training.preserve.PreservePredictions` describes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str | list[str]
    weight: float = 1.0
    every: int = 1
    batch_size: int = 4
    window: int = 128
    max_tokens: int = 65_536

    def preserve(self) -> PreservePredictions:
        """The callback.

        Raises:
            InputError: a number that is not possible, or a text that cannot be read.
        """
        from loki.training.preserve import PreservePredictions

        return PreservePredictions(**self.model_dump())


class TrainConfig(BaseModel):
    """What `loki train` is told; the numbers are those of `TrainSettings`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    positions: Annotated[
        tuple[Path, ...],
        BeforeValidator(lambda given: given if isinstance(given, list | tuple) else (given,)),
        Field(min_length=1),
    ]
    """Positions files, one for each projection whose rows are trained."""
    site_module: ModuleName | None = None
    """Whose rows a file names that does not say so; None is the down-projection's."""
    output_dir: Path
    learning_rate: float
    steps: int | None = None
    epochs: float | None = None
    data: str = "function-calls"
    examples: int | None = Field(default=None, ge=1)
    answers: AnswersName = "auto"
    batch_size: int = 4
    accumulate: int = 1
    scale_learning_rate: bool = True
    warmup_steps: int = 0
    weight_decay: float = 0.0
    rank: int = 0
    lora_alpha: float | None = None
    max_length: int | None = 2048
    packing: bool = False
    save_every: int = 50
    log_every: int = 5
    gradient_checkpointing: bool = False
    report_to: ReporterName = "none"
    mixed_precision: bool = False
    budget: BudgetSection | None = None
    preserve: PreserveSection | None = None
    row_rates: str | None = None
    seed: int = 0
    dtype: DtypeName = "auto"
    device: str | None = None
    trust_remote_code: bool = False
    strict: bool = False

    def settings(self) -> TrainSettings:
        """In the library's own form.

        Raises:
            InputError: a number that is not possible.
        """
        names = TrainSettings.__dataclass_fields__
        return TrainSettings(**self.model_dump(include=set(names)))


def load_train_config(path: Path | None, options: Mapping[str, Any]) -> TrainConfig:
    """Settings of a YAML file, if there is one; `options` that are not None come before it.

    Of these `preserve` is a text and `preserve_weight` its weight; the section keeps what they do not name.

    Raises:
        InputError: no such file, not YAML, or a setting that is missing, unknown or not possible.
    """
    values = {} if path is None else read_settings(path)
    given = {name: value for name, value in options.items() if value is not None}
    anchor = {setting: given.pop(name) for name, setting in PRESERVE_OPTIONS.items() if name in given}
    if anchor:
        section = values.get("preserve")
        given["preserve"] = {**(section if isinstance(section, dict) else {}), **anchor}
    if len(LENGTHS & given.keys()) == 1:
        values = {name: value for name, value in values.items() if name not in LENGTHS}
    try:
        config = TrainConfig.model_validate({**values, **given})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            option = OPTION_OF.get(name, f"--{name.replace('_', '-')}")
            setting = "`{}: {{{}: …}}`".format(*name.split(".")) if "." in name else f"`{name}: …`"
            raise InputError(f"{name} is missing: give {option}, or {setting} in a settings file") from error
        where = "options" if first["loc"][0] in given or path is None else f"settings file {path}"
        raise InputError(f"{where}: {first_mistake(error)}") from error
    config.settings()
    if config.mixed_precision and config.dtype not in ("auto", "float32"):
        raise InputError(
            f"mixed precision needs a float32 model, not dtype {config.dtype}: give dtype float32, "
            "or leave mixed precision out"
        )
    return config


def first_mistake(error: ValidationError) -> str:
    """The first setting that is wrong, why, and what was given: `train.steps: field required`."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    given = "" if first["type"] == "missing" else f", got {first['input']!r}"
    return f"{name}: {first['msg'].lower()}{given}"


def read_settings(path: Path) -> dict[str, Any]:
    """Settings by name, as a YAML file has them.

    Raises:
        InputError: no such file, not YAML, or something else than settings by name.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"settings file {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"settings file {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"settings file {path} must hold settings by name, such as `model: …`")
    return values
