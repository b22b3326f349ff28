"""The settings of a study: one YAML file, checked before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loki.analysis.settings import KVASettings, RowScoreSettings
from loki.choices import DtypeName, ModuleName, Objective, Rule, ScoreName, StrategyName
from loki.errors import InputError
from loki.selection.quota import parse_quota
from loki.training.config import first_mistake, read_settings

Kind = Literal["full", "lora", "osf", "shira", "miss", "loki", "suppress"]
TaskName = Literal["function-calling", "reranking"]
Targets = Literal["all", "ffn", "attention", "outputs"]
CorpusName = Literal["mmlu", "probe", "lambada", "wikitext2", "c4"]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
"""Part of a file's name."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskSection(_Section):
    """What is learned, and how it is scored."""

    name: TaskName = "function-calling"
    examples: int = Field(default=800, ge=1)
    """Training examples."""
    held_out: int = Field(default=80, ge=1)
    """Further examples of the training file, by whose loss learning rates are chosen."""
    requests: int = Field(default=200, ge=1)
    """Items of the test file."""
    max_tokens: int = Field(default=448, ge=16)
    """Longer examples are left out."""
    max_new_tokens: int = Field(default=96, ge=1)
    """Of a reply."""
    passage_tokens: int = Field(default=128, ge=1)
    """To which passages are cut."""


class TrainSection(_Section):
    """The same for every method."""

    steps: int = Field(ge=1)
    batch_size: int = Field(default=4, ge=1)
    warmup_steps: int = Field(default=0, ge=0)
    mixed_precision: bool = False
    """Whether matrix products are in bfloat16, with weights and their changes in the model's dtype (autocast)."""
    screen_steps: int = Field(ge=1)
    """Steps of the runs that choose the learning rate."""


class EvaluateSection(_Section):
    """What is asked before and after."""

    benchmarks: tuple[str, ...] = ()
    """As `loki evaluate --tasks` takes them."""
    limit: int = Field(default=150, ge=1)
    """Items of each benchmark."""
    texts: Mapping[str, int] = Field(default_factory=dict)
    """Tokens of each text: `wikitext2`, `c4`."""
    window: int = Field(default=512, ge=2)
    """Tokens of a text that are read together."""
    scales: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    """Parts of the whole change, ascending, at which task and texts are scored too: each run gives a front."""
    answers_dtype: DtypeName | None = None
    """Of the model while it answers the task and the benchmarks; None leaves it as it was trained."""
    batch_size: int = Field(default=8, ge=1)
    reply_batch_size: int = Field(default=16, ge=1)
    """Requests of the task that are answered together."""


class AnalysisSection(_Section):
    """One attribution log."""

    corpora: tuple[CorpusName, ...]
    num_prompts: int | None = Field(default=None, ge=1)
    """Drawn from all corpora together, alike many from each; None takes everything."""
    rule: Rule = "riemann_left"
    steps: int = 7
    objective: Objective = "probability"
    multiply_by_activation: bool = True
    batch_size: int = Field(default=4, ge=1)
    score: ScoreName = "kva"
    """Those other than KVA read whole texts, and have none of its settings."""
    seed: int = 0
    """Of the labels that such a score draws."""
    site_module: ModuleName = "down_proj"
    """Whose rows are scored: the feed-forward block's output projection, or attention's."""

    def settings(self) -> KVASettings | RowScoreSettings:
        """In the library's own form.

        Raises:
            InputError: a combination that is not possible.
        """
        of_kva = {"rule", "steps", "objective", "multiply_by_activation"}
        if self.score == "kva":
            return KVASettings(**self.model_dump(include=of_kva), site_module=self.site_module)
        if given := sorted(of_kva & self.model_fields_set):
            raise InputError(f"analysis of score {self.score!r} has no {given[0]}: leave it out")
        return RowScoreSettings(self.score, seed=self.seed, site_module=self.site_module)


class RowsSection(_Section):
    """Which rows are trained, or set to zero."""

    strategy: StrategyName = "layer_balanced"
    quota: str | int | float = 10
    log: str | None = None
    """Name of an analysis; the random strategy needs none."""
    layers: str | None = None
    """Such as `0-9`; None is all."""
    site_module: ModuleName = "down_proj"
    """Whose rows: the feed-forward block's output projection, or attention's."""


class PreserveSection(_Section):
    """An anchor to the base's predictions on texts that are not scored, beside the task's loss."""

    texts: Literal["wikitext2", "c4"] = "c4"
    weight: float = 1.0
    every: int = 1


class DamageSection(_Section):
    """How rows are trained in view of their damage."""

    log: str
    """Name of an analysis whose score is damage or fisher."""
    anchor: float = Field(default=0.0, ge=0)
    """Weight of the anchor; 0 is none."""
    rates: bool = False
    """Whether rows of more damage take smaller steps."""


class DialSection(_Section):
    """How parts of a change are chosen, on texts that are not scored; without it all of it is scaled alike."""

    by: Literal["layers", "rows"]
    """A scale for each layer, or some of the rows."""
    texts: Literal["wikitext2", "c4"] = "c4"
    examples: int = Field(default=30, ge=1)
    """Of those that are held out."""
    text_tokens: int = Field(default=3000, ge=1)
    window: int = Field(default=256, ge=2)


class MethodSection(_Section):
    """One method; what a kind does not know is refused."""

    kind: Kind
    label: str
    learning_rates: tuple[float, ...] = ()
    """Those that are screened; the first run of a single one is the whole run."""
    seeds: tuple[int, ...] = (0,)
    rows: RowsSection | None = None
    """Of LoKI, and of rows that are suppressed."""
    more_rows: RowsSection | None = None
    """Of another projection than `rows`, trained or suppressed with them."""
    rank: int = Field(default=0, ge=0)
    """Of LoRA, SHiRA, MiSS and LoKI*."""
    targets: Targets = "all"
    """Linear layers with an adapter: of both blocks, of one, or those that end them, of which LoKI trains rows."""
    variant: Literal["plain", "rslora", "dora", "pissa", "corda"] = "plain"
    """Of LoRA."""
    calibration: str | None = None
    """Name of the analysis whose prompts CorDA reads."""
    preserve: PreserveSection | None = None
    """Of LoKI, and of LoRA where it leaves the base's weights alone."""
    damage: DamageSection | None = None
    """Of LoKI without a rank."""
    dial: DialSection | None = None
    """Of LoKI and of LoRA (by layers), whose `evaluate.scales` are then positions of this dial."""

    @property
    def logs(self) -> tuple[str, ...]:
        """Names of the analyses that the method reads."""
        chosen_by = [rows.log for rows in self.rows_by_module.values()]
        named = (*chosen_by, self.damage.log if self.damage else None, self.calibration)
        return tuple(dict.fromkeys(name for name in named if name is not None))

    @property
    def rows_by_module(self) -> Mapping[ModuleName, RowsSection]:
        """Sections of rows by the projection that they are rows of."""
        return {rows.site_module: rows for rows in (self.rows, self.more_rows) if rows is not None}

    def require_whole(self, name: str, analyses: Mapping[str, AnalysisSection]) -> None:
        """Raise InputError unless the method has all it needs and nothing that it has no use for."""
        is_trained = self.kind != "suppress"
        if is_trained != bool(self.learning_rates):
            raise InputError(f"method {name!r} {'needs learning_rates' if is_trained else 'takes no learning_rates'}")
        if len(set(self.learning_rates)) < len(self.learning_rates) or not all(r > 0 for r in self.learning_rates):
            raise InputError(f"method {name!r}: learning_rates must be above 0 and differ, not {self.learning_rates}")
        if (self.kind in ("loki", "suppress")) != (self.rows is not None):
            raise InputError(f"method {name!r} of kind {self.kind!r} {'takes no' if self.rows else 'needs'} rows")
        if self.kind in ("lora", "shira", "miss") and self.rank < 1:
            raise InputError(f"method {name!r} of kind {self.kind!r} needs a rank of 1 or more")
        if self.variant != "plain" and self.kind != "lora":
            raise InputError(f"method {name!r}: variant {self.variant!r} is one of LoRA, not of {self.kind!r}")
        if (self.variant == "corda") != (self.calibration is not None):
            raise InputError(f"method {name!r}: calibration belongs to variant corda, and that needs it")
        if self.preserve is not None and (self.kind not in ("loki", "lora") or self.variant in ("pissa", "corda")):
            raise InputError(
                f"method {name!r} takes no preserve: its base is not the model with its adapter off, as LoKI's is"
            )
        if self.more_rows is not None and (self.rows is None or len(self.rows_by_module) == 1):
            raise InputError(f"method {name!r}: more_rows are of another site_module than rows, and go with them")
        for rows in self.rows_by_module.values():
            parse_quota(rows.quota)
            if (rows.strategy == "random") != (rows.log is None):
                raise InputError(f"method {name!r}: rows need a log unless their strategy is random, which takes none")
        if self.damage is not None and self.more_rows is not None:
            raise InputError(
                f"method {name!r} takes no damage: its log is of one site_module, rows and more_rows of two"
            )
        if self.damage is not None and (self.kind != "loki" or self.rank):
            raise InputError(f"method {name!r} takes no damage: only LoKI without a rank does")
        if self.dial is not None:
            ways = {"loki": ("layers", "rows"), "lora": ("layers",) if self.variant in ("plain", "rslora") else ()}
            if self.dial.by not in ways.get(self.kind, ()):
                raise InputError(f"method {name!r} takes no dial by {self.dial.by}: LoKI does, and LoRA by layers")
        for log in self.logs:
            if log not in analyses:
                raise InputError(
                    f"method {name!r} names the analysis {log!r}: there are {', '.join(analyses) or 'none'}"
                )
        for module, rows in self.rows_by_module.items():
            logs = (rows.log, self.damage.log if self.damage else None)
            for log in (log for log in logs if log is not None and analyses[log].site_module != module):
                raise InputError(
                    f"method {name!r} has rows of {module}, and the analysis {log!r} is of "
                    f"{analyses[log].site_module}: give both the same site_module"
                )


class StudySettings(_Section):
    """Everything that a study is made of."""

    title: str
    model: str
    data_dir: Path
    dtype: DtypeName = "auto"
    device: str | None = None
    trust_remote_code: bool = False
    task: TaskSection = TaskSection()
    train: TrainSection
    evaluate: EvaluateSection = EvaluateSection()
    analyses: Mapping[Name, AnalysisSection] = Field(default_factory=dict)
    methods: Mapping[Name, MethodSection]
    reference: Name | None = None
    """The method whose best task score sets the score at which all are compared; None compares at none."""
    pairs: tuple[tuple[Name, Name], ...] = ()
    """Methods that differ in one thing, and are compared seed by seed: one, and the other that it is measured by."""


def load_study(path: Path, *, data_dir: Path | None = None) -> StudySettings:
    """Read a study's YAML; `data_dir` replaces its own.

    Raises:
        InputError: no such file, not YAML, or a setting that is unknown or not possible.
    """
    values: dict[str, Any] = read_settings(path)
    if data_dir is not None:
        values["data_dir"] = str(data_dir)
    try:
        settings = StudySettings.model_validate(values)
    except ValidationError as error:
        raise InputError(f"study {path}: {first_mistake(error)}") from error
    if not settings.methods:
        raise InputError(f"study {path} has no methods: name at least one")
    for analysis in settings.analyses.values():
        analysis.settings()
    for name, method in settings.methods.items():
        method.require_whole(name, settings.analyses)
        shortest = settings.train.screen_steps if len(method.learning_rates) > 1 else settings.train.steps
        if method.preserve is not None and method.preserve.every > shortest:
            raise InputError(
                f"study {path}: method {name!r}: preserve.every {method.preserve.every} is more than the {shortest} "
                f"steps of its shortest runs: give {shortest} or less"
            )
    if settings.reference is not None and settings.reference not in settings.methods:
        raise InputError(f"study {path}: reference {settings.reference!r} is none of its methods: name one of them")
    for name in (name for pair in settings.pairs for name in pair):
        if name not in settings.methods or settings.methods[name].kind == "suppress":
            raise InputError(f"study {path}: pairs names {name!r}: name two methods that are trained")
    if list(settings.evaluate.scales) != sorted(set(settings.evaluate.scales)):
        raise InputError(f"study {path}: scales must ascend, not {list(settings.evaluate.scales)}")
    if not settings.data_dir.is_dir():
        raise InputError(f"data folder {str(settings.data_dir)!r} does not exist: give --data-dir")
    return settings


def smoke(settings: StudySettings) -> StudySettings:
    """The same study with next to nothing in it: every part of it runs, and no figure means anything."""

    def little_of(analysis: AnalysisSection) -> AnalysisSection:
        # What is not KVA has no steps.
        return analysis.model_copy(update={"num_prompts": 2} | ({"steps": 2} if analysis.score == "kva" else {}))

    def little(method: MethodSection) -> MethodSection:
        dial = method.dial and method.dial.model_copy(update={"text_tokens": 64})
        preserve = method.preserve and method.preserve.model_copy(update={"every": 1})
        first = {"learning_rates": method.learning_rates[:1], "seeds": method.seeds[:1]}
        return method.model_copy(update={**first, "dial": dial, "preserve": preserve})

    return settings.model_copy(
        update={
            "task": settings.task.model_copy(update={"examples": 4, "held_out": 2, "requests": 2, "max_new_tokens": 4}),
            "train": settings.train.model_copy(
                update={"steps": 2, "screen_steps": 1, "batch_size": 2, "warmup_steps": 0}
            ),
            "evaluate": settings.evaluate.model_copy(
                update={"limit": 2, "texts": dict.fromkeys(settings.evaluate.texts, 64)}
            ),
            "analyses": {name: little_of(analysis) for name, analysis in settings.analyses.items()},
            "methods": {name: little(method) for name, method in settings.methods.items()},
        }
    )
