"""A study from its settings to its results: analyses first, then run by run, each resumable and in its own process."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from loki.errors import ArtefactError, InputError, LokiError
from loki.progress import Track, silent
from loki.provenance import require_writable_parent
from loki.results import Result
from loki.study.analyses import make_log
from loki.study.finished import held_out_loss
from loki.study.identity import lacking_scales
from loki.study.parts import add_parts
from loki.study.plan import BASE, Run, num_runs, runs_to_come
from loki.study.run import carry_out
from loki.study.settings import StudySettings
from loki.study.training import Workplace

logger = logging.getLogger(__name__)

RUNS_DIR, LOGS_DIR, ADAPTERS_DIR, UNFINISHED_DIR = "runs", "analyses", "adapters", "unfinished"


@dataclass(frozen=True)
class Done:
    """A run that has just ended."""

    run: Run
    result: Result | None
    """None where it failed."""
    error: str | None
    seconds: float
    num_done: int
    num_runs: int


@dataclass(frozen=True)
class Begun:
    """A finished run of which further parts are wanted."""

    result: Result
    scales: tuple[float, ...]
    adapter: Path


Tell = Callable[[Done], None]


@dataclass
class Study:
    """A study in its folder: what is finished stays finished."""

    settings: StudySettings
    folder: Path
    only: Sequence[str] = ()
    """Methods to run; empty is all."""
    keep_adapters: bool = False
    """Whether whole runs leave their adapters in the folder."""
    save_minutes: float = 10.0
    """Between two checkpoints of a training, from which it goes on when it was interrupted; 0 keeps none."""
    results: dict[Run, Result] = field(default_factory=dict)
    """Finished runs."""
    begun: dict[Run, Begun] = field(default_factory=dict)
    """Runs that were finished when the settings named fewer parts of a change, and left their adapters."""
    failed: dict[Run, str] = field(default_factory=dict)
    """Errors of runs that failed this time; they are tried again the next."""

    def __post_init__(self) -> None:
        for name in self.only:
            if name not in self.settings.methods:
                raise InputError(f"method {name!r} is unknown: this study has {', '.join(self.settings.methods)}")
        require_writable_parent(self.folder / RUNS_DIR / "any")
        for run in self._walk():
            path = self.path_of(run)
            if path.is_file():
                self._take(run, Result.load(path))

    def _take(self, run: Run, found: Result) -> None:
        """Use what an earlier command finished."""
        lacking = lacking_scales(found, self.settings, run)
        adapter = self.folder / ADAPTERS_DIR / run.id
        if lacking is None or (lacking and not adapter.is_dir()):
            raise ArtefactError(
                f"{self.path_of(run)} was made under other settings: choose another --output-dir, or remove that file"
            )
        if lacking:
            self.begun[run] = Begun(found, lacking, adapter)
        else:
            self.results[run] = found

    def path_of(self, run: Run) -> Path:
        """The file of a run's result."""
        return self.folder / RUNS_DIR / f"{run.id}.json"

    def next_runs(self) -> list[Run]:
        """Runs that can be done now, in order."""
        return [run for run in self._walk() if run not in self.results and run not in self.failed]

    def conduct(
        self,
        *,
        workers: int | None = None,
        max_hours: float | None = None,
        tell: Tell = lambda _done: None,
        prepare: Callable[[], None] | None = None,
        track: Track = silent,
    ) -> None:
        """Carry out all runs that are left: one after the other in this process, or in `workers` processes at a time.

        Each process does one run, with its part of the processors, and calls `prepare` first. No run begins after
        `max_hours`.

        Raises:
            LokiError: an analysis that cannot be made.
        """
        start = time.monotonic()
        self._analyse(track)
        threads = None if workers is None else max(1, _num_processors() // workers)
        adapters = self.folder / ADAPTERS_DIR if self.keep_adapters else None
        place = Workplace(self.settings, self.folder / LOGS_DIR, threads, adapters)
        if self.save_minutes:
            place = replace(place, unfinished=self.folder / UNFINISHED_DIR, save_seconds=60 * self.save_minutes)
        with _here() if workers is None else _pool(prepare) as submit:
            under_way: dict[Future[Result], tuple[Run, float]] = {}
            while True:
                is_late = max_hours is not None and time.monotonic() - start > 3600 * max_hours
                busy = {run for run, _ in under_way.values()}
                waiting = [] if is_late else [run for run in self.next_runs() if run not in busy]
                for run in waiting[: (workers or 1) - len(under_way)]:
                    under_way[submit(*self._work(place, run))] = (run, time.monotonic())
                if not under_way:
                    break
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    run, began = under_way.pop(future)
                    self._finish(run, future, time.monotonic() - began, tell)
        with suppress(OSError):  # it holds what others left unfinished
            (self.folder / UNFINISHED_DIR).rmdir()

    def do_now(self, run: Run) -> None:
        """Carry out one run that needs no analysis, in this process.

        Raises:
            LokiError: as `carry_out`.
        """
        result = carry_out(Workplace(self.settings, self.folder / LOGS_DIR), run)
        result.save(self.path_of(run))
        self.results[run] = result

    def _walk(self) -> Iterator[Run]:
        """Runs in their order; those of a chosen learning rate appear as soon as `results` has what they need."""
        seen: set[Run] = set()
        while fresh := [run for run in self._known() if run not in seen]:
            seen.update(fresh)
            yield from fresh

    def _known(self) -> list[Run]:
        losses = {run: held_out_loss(result) for run, result in self.results.items()}
        runs = runs_to_come(self.settings, losses)
        return [run for run in runs if run == BASE or not self.only or run.method in self.only]

    def _analyse(self, track: Track) -> None:
        # A method of which anything is left has a run that can be done now.
        left = {run.method for run in self.next_runs() if run != BASE}
        methods = [self.settings.methods[name] for name in left]
        # Calibration reads an analysis' prompts, not its log.
        needed = {name for method in methods for name in method.logs if name != method.calibration}
        for name in self.settings.analyses:
            if name in needed:
                make_log(self.settings, name, self.folder / LOGS_DIR, track=track)

    def _work(self, place: Workplace, run: Run) -> tuple[Any, ...]:
        """What a process is to do for a run: a function and its arguments."""
        begun = self.begun.get(run)
        if begun is None:
            return carry_out, place, run
        return add_parts, place, run, begun.result, begun.scales, begun.adapter

    def _finish(self, run: Run, future: Future[Result], seconds: float, tell: Tell) -> None:
        result, error = None, None
        try:
            result = future.result()
        except BrokenProcessPool:
            error = "its process was killed, as a system does that is out of memory"
        except LokiError as problem:
            error = str(problem)
        except Exception as problem:  # a method of another project may fail in any way; the others go on
            logger.debug("run %s failed", run.id, exc_info=True)
            error = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
        if result is not None:
            result.save(self.path_of(run))
            self.results[run] = result
            shutil.rmtree(self.folder / UNFINISHED_DIR / run.id, ignore_errors=True)
        else:
            self.failed[run] = error or ""
        num_done = len(self.results) + len(self.failed)
        tell(Done(run, result, error, seconds, num_done, num_runs(self.settings, self.only)))


Submit = Callable[..., "Future[Result]"]
"""Takes a function and its arguments."""


@contextmanager
def _here() -> Iterator[Submit]:
    """Runs in this process."""

    def submit(work: Callable[..., Result], *args: Any) -> Future[Result]:
        future: Future[Result] = Future()
        try:
            future.set_result(work(*args))
        except Exception as error:  # told by the future, as a pool does it
            future.set_exception(error)
        return future

    yield submit


@contextmanager
def _pool(prepare: Callable[[], None] | None) -> Iterator[Submit]:
    """Processes that each do one run and end, so that a peak of memory is that of one run."""
    pools: list[ProcessPoolExecutor] = []

    def submit(work: Callable[..., Result], *args: Any) -> Future[Result]:
        # A pool of its own for each run: a process that is killed breaks all runs of its pool.
        pool = ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=_begin, initargs=(prepare, os.getpid())
        )
        pools.append(pool)
        future = pool.submit(work, *args)
        pool.shutdown(wait=False)
        return future

    try:
        yield submit
    except BaseException:
        for pool in pools:
            for process in list((getattr(pool, "_processes", None) or {}).values()):
                process.terminate()
        raise


def _begin(prepare: Callable[[], None] | None, parent: int) -> None:
    """Make a new process ready; it ends when the one that wants its result is gone, however that ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if prepare is not None:
        prepare()


def _num_processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
