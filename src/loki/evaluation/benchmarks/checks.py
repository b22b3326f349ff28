"""Scores of replies that are no comparison of texts: do tests pass, are instructions followed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from loki.errors import InputError
from loki.evaluation.sandbox import runs_to_its_end

Check = Callable[[Mapping[str, Any], str], bool]
"""Row and reply to whether the reply is right."""
NEEDS_SENTENCES = frozenset({"length_constraints:number_sentences", "change_case:capital_word_frequency"})
"""Instructions of IFEval that lm-eval checks with nltk's sentence model, which is a download of its own."""


def passes_tests(row: Mapping[str, Any], reply: str) -> bool:
    """HumanEval: whether the function that the reply completes passes the row's tests, in the sandbox."""
    return runs_to_its_end(f"{row['prompt']}{reply}\n{row['test']}\ncheck({row['entry_point']})\n")


def follows_instructions(row: Mapping[str, Any], reply: str) -> bool:
    """IFEval: whether every instruction is followed, by lm-eval's strict check."""
    checker = _ifeval()
    example = checker.InputExample(
        key=0, instruction_id_list=row["instruction_id_list"], prompt=row["prompt"], kwargs=row["kwargs"]
    )
    return bool(checker.test_instruction_following_strict(example, reply).follow_all_instructions)


CHECKS: Mapping[str, Check] = {"humaneval": passes_tests, "ifeval": follows_instructions}


def is_checkable(row: Mapping[str, Any]) -> bool:
    """Whether every instruction of an IFEval row can be checked here.

    Raises:
        InputError: lm-eval's packages for IFEval are missing.
    """
    return has_sentences() or not NEEDS_SENTENCES & set(row["instruction_id_list"])


def has_sentences() -> bool:
    """Whether nltk's sentence model is there.

    Raises:
        InputError: nltk itself, or another package of lm-eval's extra, is missing.
    """
    for package in ("nltk", "langdetect", "immutabledict"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"task 'ifeval' needs the package {package}: run `pip install 'lm-eval[ifeval]'`")
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


def _ifeval() -> Any:
    with _no_download():
        from lm_eval.tasks.ifeval import utils
    import langdetect

    # Its guesses are drawn at random otherwise.
    langdetect.DetectorFactory.seed = 0
    return utils


@contextmanager
def _no_download() -> Iterator[None]:
    """Keep the checker from fetching nltk's data while it is imported."""
    import nltk

    fetch, nltk.download = nltk.download, lambda *_args, **_settings: False
    try:
        yield
    finally:
        nltk.download = fetch
