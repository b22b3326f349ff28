"""`loki study`: methods compared on the same examples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loki.cli.options import JsonOption

if TYPE_CHECKING:
    from loki.results import Result
    from loki.study.conduct import Done
    from loki.study.forecast import Forecast


def study(
    config: Annotated[Path, typer.Argument(help="YAML of the study, such as experiments/forgetting.yaml.")],
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder of the finished runs; runs/<name of the YAML> when left out.")
    ] = None,
    result: Annotated[
        Path | None, typer.Option(help="The figures of all methods; study.json in the folder when left out.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Data folder, instead of the one in the YAML.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Run this method only; may be given several times.")] = None,
    workers: Annotated[int, typer.Option(help="Runs at the same time, each with its part of the processors.")] = 1,
    max_hours: Annotated[float | None, typer.Option(help="Begin no run after so many hours.")] = None,
    keep_adapters: Annotated[
        bool, typer.Option("--keep-adapters", help="Keep the adapters of whole runs, in the study's folder.")
    ] = False,
    save_minutes: Annotated[
        float,
        typer.Option(help="Minutes between checkpoints of a training, which goes on from them; 0 keeps none."),
    ] = 10.0,
    plan: Annotated[bool, typer.Option("--plan", help="Say how many runs and hours are left, and stop.")] = False,
    smoke: Annotated[
        bool,
        typer.Option("--smoke", help="Every method for two steps, to see that all of it runs; figures mean nothing."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train every method on the same examples, and measure what each learned, forgot and cost.

    Learning rates are chosen by the loss of held-out examples after short runs. Each finished run is a file of its own;
    the same command goes on where it was stopped, within a training too. The figures of all finished runs are written
    after each.

    Example: loki study experiments/forgetting.yaml --data-dir data --workers 2
    """
    from loki.cli.show import notes, print_json, track
    from loki.errors import InputError, LokiError
    from loki.provenance import require_writable_parent
    from loki.study.collect import collect
    from loki.study.conduct import Study
    from loki.study.forecast import forecast
    from loki.study.plan import BASE
    from loki.study.settings import load_study
    from loki.study.settings import smoke as shrink

    if workers < 1:
        raise InputError(f"--workers {workers} is not possible: give 1 or more")
    if max_hours is not None and not max_hours > 0:
        raise InputError(f"--max-hours {max_hours} is not possible: give a number above 0")
    if not save_minutes >= 0:
        raise InputError(f"--save-minutes {save_minutes} is not possible: give 0 or more")
    settings = load_study(config, data_dir=data_dir)
    folder = output_dir or Path("runs") / (f"{config.stem}-smoke" if smoke else config.stem)
    result = result or folder / "study.json"
    require_writable_parent(result)
    work = Study(shrink(settings) if smoke else settings, folder, only or (), keep_adapters, save_minutes)
    if plan:
        typer.echo(_plan_line(forecast(work)))
        return

    def collected() -> Result:
        """The figures of all that is finished, of methods that this command leaves out too."""
        return collect(work.settings, Study(work.settings, folder).results)

    def tell(done: Done) -> None:
        notes.print(_line(done))
        if BASE in work.results:
            collected().save(result)

    # Processes of their own cost more than a smoke test's runs.
    own = None if smoke else workers
    work.conduct(workers=own, max_hours=max_hours, tell=tell, prepare=_prepare, track=track)
    found = collected()
    found.save(result)
    notes.print(f"wrote {result}")
    if as_json:
        print_json(found)
    if work.failed:
        names = ", ".join(run.id for run in work.failed)
        raise LokiError(f"{len(work.failed)} runs failed ({names}): the same command tries them again")


def _prepare() -> None:
    """Make a run's own process as quiet as this one."""
    import warnings

    from transformers.utils import logging

    from loki.cli.kept_memory import keep_freed_memory

    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    keep_freed_memory()


def _line(done: Done) -> str:
    from loki.study.finished import held_out_loss

    head = f"{done.num_done}/{done.num_runs} {done.run.id}: {done.seconds / 60:.1f} min"
    if done.result is None:
        return f"{head}, failed: {done.error}"
    return f"{head}, held-out loss {held_out_loss(done.result):.3f}"


def _plan_line(found: Forecast) -> str:
    return (
        f"{found.num_runs} runs, {found.num_done} done: about {found.hours_left:.1f} hours left, one after the other "
        f"({found.seconds_per_step:.1f} s a step, {found.evaluation_seconds / 60:.1f} min an evaluation)"
    )
