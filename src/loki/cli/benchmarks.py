"""`loki evaluate --tasks … --text …`: benchmarks, what is learned, and running text, before and after."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from loki.choices import DtypeName
from loki.cli.show import notes, print_json, track
from loki.errors import InputError
from loki.evaluation.benchmarks.table import expand, require_known
from loki.evaluation.downstream import DOWNSTREAM, evaluate_downstream
from loki.evaluation.harness import evaluate_tasks
from loki.evaluation.scoreboard import Scoreboard, interval_text, make_scoreboard, parse_percentage, read_baseline
from loki.evaluation.text import load_texts, text_scores
from loki.models import load_tokenizer, merge_in_memory
from loki.provenance import require_writable_parent
from loki.results import Measure, Result

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from loki.evaluation.scores import ItemScores

FORGOT_TOO_MUCH = 1
"""Exit code where forgetting is above --fail-above."""


@dataclass(frozen=True)
class BenchmarkOptions:
    """The options of the command, each as its `--help` says."""

    model: str
    base: str | None
    adapter: Path | None
    tasks: tuple[str, ...]
    texts: tuple[str, ...]
    data_dir: Path | None
    limit: int | None
    text_tokens: int | None
    batch_size: int
    max_new_tokens: int | None
    num_fewshot: int | None
    chat_template: bool
    baseline: Path | None
    fail_above: str | None
    allow_code_execution: bool
    output: Path | None
    seed: int
    dtype: DtypeName
    trust_remote_code: bool
    as_json: bool

    @property
    def benchmarks(self) -> list[str]:
        """Those of the tasks that lm-eval scores, groups by their members."""
        return [name for name in expand(self.tasks) if name not in DOWNSTREAM] if self.tasks else []

    @property
    def downstream(self) -> list[str]:
        """Those of the tasks that are learned."""
        return [name for name in expand(self.tasks) if name in DOWNSTREAM] if self.tasks else []


def evaluate_benchmarks(options: BenchmarkOptions, load: Callable[[str], PreTrainedModel]) -> None:
    """Score the model, and the one before training where it is named; show, write, and judge."""
    most = _check(options)
    before = None if options.baseline is None else read_baseline(options.baseline, _settings(options))
    texts = {name: load_texts(name, options.data_dir) for name in options.texts}
    tokenizer = load_tokenizer(options.base or options.model, trust_remote_code=options.trust_remote_code)
    reference = None
    if before is None and (options.base is not None or options.adapter is not None):
        reference = load(options.base or options.model)
        before = _benchmark_scores(options, reference, tokenizer, "before")
        before += _downstream_scores(options, reference, tokenizer, "before")
    model = load(options.model)
    if options.adapter is not None:
        model = merge_in_memory(model, options.adapter)
    after = _benchmark_scores(options, model, tokenizer, "after")
    learned = _downstream_scores(options, model, tokenizer, "after")
    after += learned
    for name, rows in texts.items():
        read = text_scores(
            model,
            tokenizer,
            Path(name).stem,
            rows,
            reference=reference,
            max_tokens=options.text_tokens,
            seed=options.seed,
            track=track,
        )
        after += read.model
        if before is not None:
            before += read.reference
    board = make_scoreboard(after, before, learned=[scores.task for scores in learned], seed=options.seed)
    result = Result("evaluate", _settings(options), board.figures(), board.comparisons, options.seed, _label(options))
    if options.output is not None:
        result.save(options.output)
        shutil.rmtree(_parts(options.output), ignore_errors=True)
        notes.print(f"wrote {options.output}")
    if options.as_json:
        print_json(result)
    else:
        _print(board, _label(options))
    if most is not None:
        _judge(board, most)


def _check(options: BenchmarkOptions) -> float | None:
    """Refuse what can be refused before a model is loaded; the percentage of --fail-above."""
    most = None if options.fail_above is None else parse_percentage(options.fail_above)
    if options.base is not None and options.adapter is not None:
        raise InputError(
            f"--base {options.base} and --adapter {options.adapter} exclude each other: with --adapter MODEL itself is "
            "the model before training"
        )
    if options.baseline is not None and options.base is not None:
        raise InputError(f"--baseline {options.baseline} and --base {options.base} exclude each other: give one")
    has_before = options.base is not None or options.adapter is not None or options.baseline is not None
    if most is not None and not (has_before and options.tasks):
        raise InputError(
            "--fail-above compares benchmarks with a model before training: give --tasks and --base or --baseline"
        )
    if options.tasks or not options.texts:
        expand(options.tasks)
        if options.data_dir is not None:
            require_known(options.benchmarks, others=DOWNSTREAM)
    if options.downstream:
        named = ", ".join(options.downstream)
        if options.data_dir is None:
            raise InputError(f"task {options.downstream[0]!r} is scored on local data: give --data-dir")
        if options.num_fewshot:
            raise InputError(f"--num-fewshot {options.num_fewshot} is for benchmarks, and {named} shows no examples")
        if most is not None and not options.benchmarks:
            raise InputError(
                f"--fail-above judges what was known before, and {named} is what is learned: name a benchmark too"
            )
    if options.output is not None:
        require_writable_parent(options.output)
    return most


def _downstream_scores(
    options: BenchmarkOptions, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, which: str
) -> list[ItemScores]:
    if not options.downstream:
        return []
    assert options.data_dir is not None
    return evaluate_downstream(
        model,
        tokenizer,
        options.downstream,
        data_dir=options.data_dir,
        limit=options.limit,
        seed=options.seed,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        folder=None if options.output is None else _parts(options.output) / which,
        track=track,
    )


def _benchmark_scores(
    options: BenchmarkOptions, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, which: str
) -> list[ItemScores]:
    if not options.benchmarks:
        return []
    return evaluate_tasks(
        model,
        tokenizer,
        options.benchmarks,
        data_dir=options.data_dir,
        limit=options.limit,
        seed=options.seed,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        num_fewshot=options.num_fewshot,
        chat_template=options.chat_template,
        allow_code_execution=options.allow_code_execution,
        folder=None if options.output is None else _parts(options.output) / which,
        track=track,
    )


def _parts(output: Path) -> Path:
    """Where scores are kept until all are there, so that the same command goes on after an interruption."""
    return output.with_name(f"{output.name}.parts")


def _settings(options: BenchmarkOptions) -> dict[str, object]:
    return {
        "model": options.model,
        "base": options.base,
        "adapter": str(options.adapter) if options.adapter else None,
        "baseline": str(options.baseline) if options.baseline else None,
        "tasks": expand(options.tasks) if options.tasks else [],
        "texts": list(options.texts),
        "local_data": options.data_dir is not None,
        "limit": options.limit,
        "text_tokens": options.text_tokens,
        "max_new_tokens": options.max_new_tokens,
        "num_fewshot": options.num_fewshot,
        "chat_template": options.chat_template,
        "dtype": options.dtype,
    }


def _label(options: BenchmarkOptions) -> str:
    return options.model if options.adapter is None else f"{options.model} with {options.adapter}"


def _print(board: Scoreboard, label: str) -> None:
    compared = any(difference is not None for difference in board.differences)
    judged = any(board.is_benchmark(scores) for scores in board.after)
    table = Table(
        title=f"{label} before and after" if compared else label,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=SIMPLE,
        pad_edge=False,
    )
    table.add_column("task", overflow="fold")
    for column in (
        *(("chance",) if judged else ()),
        *(("before",) if compared else ()),
        "after" if compared else "score",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    if compared:
        table.add_column("change, 95 % interval", justify="right", no_wrap=True)
    for after, before, difference in zip(board.after, board.before, board.differences, strict=True):
        chance = f"{after.chance or 0.0:.1f}" if board.is_benchmark(after) else ""
        if board.is_benchmark(after) and not (before or after).is_above_chance:
            chance = f"{chance} *"
        cells = [after.task, *((chance,) if judged else ())]
        if compared:
            cells.append("" if before is None else str(before.mean))
        cells.append(str(after.mean))
        if compared:
            cells.append("" if difference is None else _change(difference.change, interval_text(difference)))
        table.add_row(*cells)
    console = Console(highlight=False)
    console.print(table)
    if any(
        board.is_benchmark(scores) and not (old or scores).is_above_chance
        for scores, old in zip(board.after, board.before, strict=True)
    ):
        console.print(
            f"* {'the model before training' if compared else 'the model'} is not above chance by two standard errors",
            soft_wrap=True,
        )
    if board.forgotten is not None:
        _print_forgotten(board, console)
    elif any(before is not None and board.is_benchmark(before) for before in board.before):
        console.print("forgetting: no task on which the model before training is above chance", soft_wrap=True)


def _print_forgotten(board: Scoreboard, console: Console) -> None:
    forgotten = board.forgotten
    assert forgotten is not None
    console.print(
        f"forgetting {forgotten.scores.score:.2f} % (95 % interval {forgotten.low:.2f} … {forgotten.high:.2f}), "
        f"losses only {forgotten.scores.losses_only:.2f} %, {forgotten.points_lost:.2f} points lost, "
        f"over {', '.join(forgotten.counted)}",
        soft_wrap=True,
    )
    if forgotten.left_out:
        console.print(f"left out, base at chance: {', '.join(forgotten.left_out)}", soft_wrap=True)


def _change(change: Measure, interval: str) -> str:
    digits = 1 if change.unit == "points" else 3
    return f"{change.value:+.{digits}f}, {interval}"


def _judge(board: Scoreboard, most: float) -> None:
    forgotten = board.forgotten
    if forgotten is None:
        raise InputError(
            "--fail-above has nothing to judge, because the model before training is above chance on no task: "
            "give other tasks or more items"
        )
    if forgotten.scores.losses_only > most:
        notes.print(
            f"loki: forgetting (losses only) is {forgotten.scores.losses_only:.2f} %, above {most:g} %, "
            f"over {', '.join(forgotten.counted)}"
        )
        raise typer.Exit(FORGOT_TOO_MUCH)
