"""lm-eval's view of a loaded model, and lm-eval kept from talking.

Importing this imports lm-eval; nothing else of this package does.
"""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

QUIET = ("lm_eval", "transformers", "datasets", "evaluate")
"""Loggers that say nothing below an error while lm-eval works."""


class LanguageModel(HFLM):
    """A loaded model without lm-eval's progress bars; while it computes, the terminal is its caller's again."""

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is what greedy decoding would write."""
        with _terminal():
            answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy replies up to each request's stop texts."""
        with _terminal():
            replies: list[str] = super().generate_until(requests, disable_tqdm=True)
        return replies


def score(
    model: LanguageModel,
    task: ConfigurableTask,
    *,
    indices: Sequence[int] | None = None,
    chat_template: bool = False,
) -> list[Mapping[str, Any]]:
    """lm-eval's samples of one task, one for each item, in order: `doc` and each metric by name.

    `indices` are the items to score, ascending; all of them when None.
    """
    if task.config.num_fewshot is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(0)
    results = lm_eval.evaluate(
        lm=model,
        task_dict={"tasks": {task.task_name: task}, "groups": {}, "group_map": {}},
        samples=None if indices is None else {task.task_name: list(indices)},
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=chat_template,
        confirm_run_unsafe_code=True,  # refused before, where it is not allowed
    )
    samples: list[Mapping[str, Any]] = results["samples"][task.task_name]
    return samples


@contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval from logging, warning and printing; `LanguageModel` gives the terminal back while it computes."""
    loggers = [logging.getLogger(name) for name in QUIET]
    levels = [logger.level for logger in loggers]
    _terminals.append((sys.stdout, sys.stderr))
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        _terminals.pop()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


_terminals: list[tuple[TextIO, TextIO]] = []


@contextmanager
def _terminal() -> Iterator[None]:
    if not _terminals:
        yield
        return
    out, err = _terminals[-1]
    with redirect_stdout(out), redirect_stderr(err):
        yield
