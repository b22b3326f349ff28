"""Comparisons of a study's methods with each other, as plain JSON."""

from __future__ import annotations

from typing import Any

import numpy as np

from loki.study.equal_score import SHARE, Curve, compare_at_equal_score, curve_of
from loki.study.finished import HELD_OUT, FinishedRuns, points_of, scores_of, together
from loki.study.pairs import compare_pair
from loki.study.plan import Run
from loki.study.relative import relative_scores


def equal_score(found: FinishedRuns) -> dict[str, Any] | None:
    """Forgetting of all methods at the reference's score; None without a reference that has run."""
    reference = found.settings.reference
    if reference not in found.trained:
        return None
    curves = {name: curve for name in found.trained if (curve := _curve(found, found.of(name))) is not None}
    if reference not in curves:
        return None
    compared = compare_at_equal_score(curves, reference, _weights(found))
    return {
        "reference": reference,
        "share": SHARE,
        "target": compared.target,
        "best": dict(compared.best),
        "methods": {
            name: {text: at.as_dict() for text, at in by_text.items()} for name, by_text in compared.by_method.items()
        },
    }


def relative(found: FinishedRuns) -> dict[str, Any] | None:
    """Scores relative to full fine-tuning; None where it has not run."""
    reference = next((name for name in found.trained if found.settings.methods[name].kind == "full"), None)
    if reference is None:
        return None
    by_method = {}
    for name in found.trained:
        done = [scores_of(found.results[run]) for run in found.of(name)]
        by_method[name] = {task: together([scores[task] for scores in done]) for task in found.tasks if task in done[0]}
    shares = relative_scores(reference, by_method, found.tasks)
    return {
        "reference": reference,
        "methods": {name: {task: at.as_dict() for task, at in by_task.items()} for name, by_task in shares.items()},
    }


def pairs(found: FinishedRuns) -> list[dict[str, Any]]:
    """The pairs of methods that the settings name and that have run with a seed in common."""
    compared = []
    for names in found.settings.pairs:
        runs = [{run.seed: run for run in found.of(name)} for name in names]
        seeds = [seed for seed in runs[0] if seed in runs[1]]
        curves = [_curve(found, [by_seed[seed] for seed in seeds]) for by_seed in runs] if seeds else []
        one, other = curves or (None, None)
        if one is None or other is None or one.learned_SPN.shape != other.learned_SPN.shape:
            continue
        lost = [_held_out(found, [by_seed[seed] for seed in seeds]) for by_seed in runs]
        pair = compare_pair(one, other, (lost[0], lost[1]), _weights(found))
        compared.append({"method": names[0], "against": names[1], "seeds": seeds, **pair.as_dict()})
    return compared


def _curve(found: FinishedRuns, done: list[Run]) -> Curve | None:
    """The curve of a method's runs; None where a point lacks the task or a text, or there are no texts."""
    if not found.tasks or not found.texts:
        return None
    runs = [points_of(found.results[run]) for run in done]
    needed = {found.tasks[0], *(f"{text}_kl" for text in found.texts)}
    if not all(needed <= point.keys() for run in runs for point in run):
        return None
    return curve_of(found.base[found.tasks[0]], runs, {text: found.base[f"{text}_loss"].ids for text in found.texts})


def _held_out(found: FinishedRuns, done: list[Run]) -> np.ndarray:
    """Held-out losses (S, P, H) of a method's runs; of the whole change alone where parts were not asked."""
    runs = [points_of(found.results[run]) for run in done]
    if not all(HELD_OUT in point for run in runs for point in run):
        runs = [run[-1:] for run in runs]
    return np.array([[point[HELD_OUT].scores for point in run] for run in runs])


def _weights(found: FinishedRuns) -> dict[str, np.ndarray]:
    """Of the windows of each text: the tokens that they predict."""
    read = {text: found.base[f"{text}_loss"] for text in found.texts}
    return {text: np.array(scores.weights or [1.0] * len(scores.ids)) for text, scores in read.items()}
