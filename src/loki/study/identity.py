"""What makes a run the run that it is: a finished one of another identity is not taken for it."""

from __future__ import annotations

from functools import partial
from typing import Any

from pydantic import BaseModel

from loki.provenance import digest
from loki.results import Result
from loki.study.plan import Run
from loki.study.settings import StudySettings


def identity(settings: StudySettings, run: Run) -> dict[str, Any]:
    """All that decides a run's figures, as JSON: a finished run of another identity is not this one.

    Settings at their defaults are left out, so that a new one does not disown what was finished without it.
    """
    dump = partial(BaseModel.model_dump, mode="json", exclude_defaults=True)
    shared = dump(settings, exclude={"title", "data_dir", "analyses", "methods", "device", "reference", "pairs"})
    method = settings.methods.get(run.method)
    analyses = {}
    if method is not None:
        analyses = {name: dump(settings.analyses[name]) for name in sorted(method.logs)}
    train = shared.pop("train")
    if run.phase == "screen":
        train["steps"] = train.pop("screen_steps")
        shared.pop("evaluate", None)  # only the held-out loss is measured
    train.pop("screen_steps", None)
    return {
        **shared,
        **({} if run.phase in ("base", "suppress") else {"train": train}),
        "method": None if method is None else dump(method, exclude={"label", "learning_rates", "seeds"}),
        "analyses": analyses,
        "phase": run.phase,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
    }


def lacking_scales(result: Result, settings: StudySettings, run: Run) -> tuple[float, ...] | None:
    """Parts of the change that the settings name and a finished run was not scored at; None where it is another run."""
    there, scored = _apart(dict(result.settings))
    here, wanted = _apart(identity(settings, run))
    if digest(there) != digest(here):
        return None
    if run.phase != "whole":
        return ()
    return tuple(sorted(set(wanted) - set(scored))) if set(scored) <= set(wanted) else None


def _apart(known: dict[str, Any]) -> tuple[dict[str, Any], list[float]]:
    """An identity without its scales, and the scales."""
    evaluate = dict(known.get("evaluate", {}))
    scales = evaluate.pop("scales", [])
    return {**known, "evaluate": evaluate}, scales
