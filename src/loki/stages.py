"""The stages of a run: each reads what the one before left in the run directory and leaves its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import ValidationError

from loki.analysis.run import AnalysisOptions, analyse
from loki.architecture import shape_of_config
from loki.errors import ArtefactError, InputError
from loki.evaluation.compare import compare_models
from loki.implanting.merge import merge
from loki.log import schema
from loki.log.reader import AttributionLog
from loki.models import load_config, load_model, load_tokenizer, model_label, resolve_dtype
from loki.progress import Track, silent
from loki.prompts.function_calls import make_examples
from loki.prompts.questions import load_probe
from loki.prompts.sources import DatasetSpec, load_datasets
from loki.provenance import require_writable_parent
from loki.reporting.data import Forgetting, ReportData
from loki.reporting.html import write_report
from loki.reporting.reading import read_log, report_of_log
from loki.results import Comparison, Result
from loki.rows import RowSelection, meta_path
from loki.run_settings import RunSettings
from loki.selection.run import default_positions_name, select_to_file
from loki.study.page import study_report
from loki.training.examples import load_examples
from loki.training.sft import load_record, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

StageName = Literal["analyse", "select", "train", "merge", "evaluate"]
LOG_FILE, ADAPTER_DIR, MERGED_DIR = "kva.h5", "adapter", "merged"
SUMMARY_FILE, REPORT_FILE = "summary.json", "report.html"


@dataclass
class Run:
    """A run under way: its settings and how it tells of its progress."""

    settings: RunSettings
    track: Track = silent

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.settings.output_dir

    @property
    def positions_path(self) -> Path:
        """Where this run's selected rows stand: `10.json` for a quota of 10 %."""
        return self.directory / default_positions_name(self.settings.select.strategy, self.settings.select.quota)

    def load_model(self, name_or_path: str) -> PreTrainedModel:
        """A fresh copy of a model, with the run's dtype and device."""
        chosen = self.settings
        return load_model(
            name_or_path, dtype=chosen.dtype, device=chosen.device, trust_remote_code=chosen.trust_remote_code
        )


@dataclass(frozen=True)
class Outcome:
    """What a stage found out."""

    figures: Mapping[str, Any]
    comparisons: tuple[Comparison, ...] = ()


def analyse_stage(run: Run) -> Outcome:
    """Attribute the analysis half of the probe into `kva.h5`."""
    chosen = run.settings.analyse
    analyse(
        run.load_model(run.settings.model),
        load_tokenizer(run.settings.model, trust_remote_code=run.settings.trust_remote_code),
        load_datasets([DatasetSpec(chosen.prompts)]),
        chosen.settings(),
        run.directory / LOG_FILE,
        model_name=model_label(run.settings.model),
        prompt_set=chosen.prompts,
        options=AnalysisOptions(batch_size=chosen.batch_size),
        track=run.track,
    )
    with AttributionLog(run.directory / LOG_FILE) as log:
        gaps_NL, num_tokens_N = log.column(schema.COMPLETENESS_GAPS), log.column(schema.NUM_TOKENS)
        figures: dict[str, Any] = {
            "num_prompts": log.num_prompts,
            "num_layers": log.num_layers,
            "num_rows": log.num_rows,
        }
    if num_tokens_N is not None:
        figures["mean_tokens"] = float(num_tokens_N.mean())
    if gaps_NL is not None and np.isfinite(gaps_NL).all():
        figures["mean_absolute_completeness_gap"] = float(np.abs(gaps_NL).mean())
    return Outcome(figures)


def select_stage(run: Run) -> Outcome:
    """Select rows from `kva.h5` into a positions file."""
    chosen = run.settings.select
    config = load_config(run.settings.model, trust_remote_code=run.settings.trust_remote_code)
    selection = select_to_file(
        run.directory / LOG_FILE,
        run.positions_path,
        quota=chosen.quota,
        strategy=chosen.strategy,
        shape=shape_of_config(config),
    )
    rows, num_rows = selection.rows, selection.election.candidates_LD.size
    figures: dict[str, Any] = {
        "num_selected_rows": rows.num_selected,
        "num_rows": num_rows,
        "selected_percent": 100 * rows.num_selected / num_rows,
    }
    if selection.votes is not None:
        figures["num_abstentions"] = selection.votes.num_abstentions
    return Outcome(figures)


def train_stage(run: Run) -> Outcome:
    """Train the selected rows into `adapter/`."""
    from loki.training.row_rates import RowRates

    chosen, seed = run.settings.train, run.settings.seed
    record = train(
        run.load_model(run.settings.model),
        load_tokenizer(run.settings.model, trust_remote_code=run.settings.trust_remote_code),
        RowSelection.load(run.positions_path),
        load_examples(chosen.data, count=chosen.examples, seed=seed),
        chosen.settings(seed),
        run.directory / ADAPTER_DIR,
        budget=None if chosen.budget is None else chosen.budget.budget(),
        preserve=None if chosen.preserve is None else chosen.preserve.preserve(),
        row_rates=None if chosen.row_rates is None else RowRates(chosen.row_rates),
        track=run.track,
    )
    log = record["log"]
    return Outcome(
        {
            "num_examples": record["num_examples"],
            "num_trainable_weights": record["num_trainable"],
            "first_loss": log[0]["loss"] if log else record["train_loss"],
            "last_loss": log[-1]["loss"] if log else record["train_loss"],
        }
    )


def merge_stage(run: Run) -> Outcome:
    """Merge base and adapter into `merged/`, an ordinary checkpoint."""
    name = run.settings.merge.dtype
    report = merge(
        run.settings.model,
        run.directory / ADAPTER_DIR,
        run.directory / MERGED_DIR,
        dtype=None if name == "auto" else resolve_dtype(name),
    )
    return Outcome(
        {
            "num_weights": report.num_parameters,
            "num_changed_weights": report.num_changed,
            "change_norm": report.change_norm,
            "change_lost_in_rounding_percent": report.lost_percent,
        }
    )


def evaluate_stage(run: Run) -> Outcome:
    """Compare the merged checkpoint with the base."""
    chosen, seed = run.settings.evaluate, run.settings.seed
    evaluation = compare_models(
        run.load_model(run.settings.model),
        run.load_model(str(run.directory / MERGED_DIR)),
        load_tokenizer(run.settings.model, trust_remote_code=run.settings.trust_remote_code),
        requests=make_examples("test", chosen.requests, seed) if chosen.task == "function-calls" else (),
        completions=load_examples(chosen.completions, count=None, seed=seed) if chosen.completions else (),
        questions=load_probe("evaluation") if chosen.knowledge == "probe" else (),
        track=run.track,
    )
    return Outcome(evaluation.figures, evaluation.comparisons)


@dataclass(frozen=True)
class Stage:
    """One stage: what it does and which files it leaves."""

    name: StageName
    work: Callable[[Run], Outcome]
    outputs: Callable[[Run], Sequence[Path]]
    unfinished: str | None = None
    """Folder of an interrupted stage, from which it goes on."""


STAGES = (
    Stage("analyse", analyse_stage, lambda run: [run.directory / LOG_FILE], f"{LOG_FILE}.parts"),
    Stage("select", select_stage, lambda run: [run.positions_path, meta_path(run.positions_path)]),
    Stage("train", train_stage, lambda run: [run.directory / ADAPTER_DIR], f"{ADAPTER_DIR}.unfinished"),
    Stage("merge", merge_stage, lambda run: [run.directory / MERGED_DIR]),
    Stage("evaluate", evaluate_stage, lambda _run: []),
)


def summarise(run: Run) -> Result:
    """All stages' figures and the before/after table, into `summary.json`."""
    results = {stage.name: Result.load(run.directory / f"{stage.name}.json") for stage in STAGES}
    figures: dict[str, Any] = {name: dict(result.figures) for name, result in results.items()}
    figures["seconds"] = round(sum(result.figures["seconds"] for result in results.values()), 1)
    summary = Result(
        kind="summary",
        settings=run.settings.as_dict(),
        figures=figures,
        comparisons=results["evaluate"].comparisons,
        seed=run.settings.seed,
        versions=results["evaluate"].versions,
        model=model_label(run.settings.model),
    )
    summary.save(run.directory / SUMMARY_FILE)
    return summary


def report(
    path: Path,
    positions: Sequence[Path] = (),
    *,
    output: Path | None = None,
    figures_dir: Path | None = None,
    with_stability: bool = True,
) -> Path:
    """Draw the page of a finished run's directory, of an attribution log with positions, or of a study's result.

    Returns where it is.

    `positions` are compared with each other, and in a run with the run's own. `output` is `report.html` in the run
    directory, or `<name>.report.html` beside the file, when left out; `figures_dir` takes each figure as PNG and SVG.

    Raises:
        InputError: neither a finished run nor a file.
        ArtefactError: a file that is damaged, or of another model.
        OutputError: a folder cannot be written.
    """
    if path.is_file():
        output = output or path.with_suffix(".report.html")
    elif not path.exists():
        raise InputError(
            f"{path} does not exist: name the directory of a finished `loki run`, an attribution log, or a study's "
            "result"
        )
    elif not (path / SUMMARY_FILE).is_file():
        raise InputError(f"{path} has no {SUMMARY_FILE}: name the directory of a finished `loki run`")
    output = output or path / REPORT_FILE
    for place in [output] if figures_dir is None else [output, figures_dir / output.name]:
        require_writable_parent(place)
    if path.is_file() and path.suffix == ".json":
        if positions:
            raise InputError(f"{path} is a study's result, which has no positions to compare: leave --positions out")
        data = study_report(Result.load(path))
    elif path.is_file():
        data = report_of_log(path, positions, with_stability=with_stability)
    else:
        data = _report_of_run(path, positions, with_stability=with_stability)
    write_report(output, data, figures_dir=figures_dir)
    return output


def _report_of_run(directory: Path, positions: Sequence[Path], *, with_stability: bool) -> ReportData:
    summary = Result.load(directory / SUMMARY_FILE)
    try:
        settings = RunSettings.model_validate({**summary.settings, "output_dir": directory})
    except ValidationError as error:
        raise ArtefactError(f"{directory / SUMMARY_FILE} holds no settings of a run: run again") from error
    run = Run(settings)
    reading = read_log(directory / LOG_FILE, [run.positions_path, *positions], with_stability=with_stability)
    record = load_record(directory / ADAPTER_DIR) or {}
    return ReportData(
        title=f"LoKI run {directory.name}",
        model_label=summary.model or settings.model,
        summary=summary,
        survey=reading.survey,
        selections=reading.selections,
        stability=reading.stability,
        training_log=record.get("log", []),
        forgetting=Forgetting.of_record(record["budget"]) if "budget" in record else None,
    )
