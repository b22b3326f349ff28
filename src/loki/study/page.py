"""A study as a report page: the fronts, and its tables."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

from loki.reporting.content import Section
from loki.reporting.data import ReportData
from loki.reporting.drawing import Picture
from loki.reporting.fronts import Point, front, front_chart
from loki.results import Result
from loki.study.tables import tables, texts_of

READINGS = {
    "learned": (
        "Loss and KL divergence are in nats per token of text that no method saw, against the same model before "
        "training; changes have 95 % bootstrap intervals over items, and ± is the standard deviation between seeds. "
        "Forgetting is the relative loss over the benchmarks on which the base is above chance, as in the paper; "
        "losses only leaves out what was gained."
    ),
    "tasks": "Means over items and seeds, in percent; ± is the standard deviation between seeds.",
    "benchmarks": "Points against the base, with 95 % bootstrap intervals over the same items.",
    "costs": "Medians over runs that may have shared the processors: compare them with each other only.",
    "equal-score": (
        "The target is a share of the reference's best score. Each method's curve goes from the base over parts of its "
        "change to the whole of it, and is read at the target by linear interpolation; n/a does not reach it, "
        "best is the most that it reaches. 95 % bootstrap intervals over the task's items, the texts' windows and, "
        "where a method has several, its seeds; the same items and windows are drawn for all."
    ),
    "pairs": (
        "One method minus another, or times it, over the seeds that both have. Points of the task are means over the "
        "parts of the change and the whole, and at an equal divergence means over the divergences that both curves "
        "reach; n/a where there are none. Loss is that of held-out examples, divergence that of the whole change. 95 % "
        "bootstrap intervals over the same items, windows and seeds of both; of one seed they leave out how much "
        "seeds differ."
    ),
    "relative": (
        "Each score over that of full fine-tuning, with 95 % bootstrap intervals over the same items of both; n/a "
        "where full fine-tuning gets nothing right."
    ),
    "suppressed": "Nothing is trained here: the rows are set to zero, and what the model knew is asked again.",
}
HEADINGS = {
    "learned": "What was learned, and what was forgotten",
    "tasks": "The task",
    "benchmarks": "Benchmarks",
    "costs": "What training costs",
    "equal-score": "Forgotten at an equal task score",
    "pairs": "One thing changed",
    "relative": "Relative to full fine-tuning",
    "suppressed": "What rows hold",
}


def study_report(result: Result) -> ReportData:
    """The page of a study's result.

    Raises:
        ArtefactError: the result is not one of a study.
        InputError: matplotlib is missing.
    """
    found = tables(result)
    title = result.figures["title"]
    parts = [_front_section(result, text) for text in texts_of(result) if points(result, text)]
    parts += [Section(name, HEADINGS[name], "", READINGS[name], table=table) for name, table in found.items()]
    return ReportData(
        title=title,
        model_label=result.model or "",
        sections=tuple(parts),
        provenance={"settings": result.settings, "versions": result.versions},
    )


def front_picture(result: Result, text: str) -> Picture:
    """Task score against divergence on a text, every method a curve."""
    return front_chart(
        points(result, text),
        learned=f"{result.figures['task']}, % right",
        forgotten=f"KL divergence from the base on {text}, nats per token",
        title=f"Learned against forgotten ({text})",
    )


def points(result: Result, text: str) -> list[Point]:
    """Of each method that was trained and scored the whole of its change and parts of it, in the mean of its seeds.

    Where there are several seeds, each of them is a point too.
    """
    task, divergence = result.figures["task"], f"{text}_kl"
    found = []
    for method in result.figures["methods"]:
        scores = method["scores"]
        if method["kind"] == "suppress" or task not in scores or divergence not in scores:
            continue
        label, family = method["label"], family_of(result, method)
        wholes = zip(scores[task]["by_seed"], scores[divergence]["by_seed"], strict=True)
        by_scale = {1.0: list(wholes)}
        for part in method.get("scaled", []):
            by_scale.setdefault(part["scale"], []).append((part[task], part[divergence]))
        for scale, seeds in by_scale.items():
            learned, forgotten = map(mean, zip(*seeds, strict=True))
            found.append(Point(label, family, learned, forgotten, label, "whole" if scale == 1 else "part"))
            if len(seeds) > 1:
                found += [Point(label, family, *seed, role="seed") for seed in seeds]
    return found


def family_of(result: Result, method: Mapping[str, Any]) -> str:
    """Whose rows are trained: chosen by attribution, drawn at random, or another method altogether."""
    if method["kind"] != "loki":
        return "other"
    return "random" if result.settings["methods"][method["name"]]["rows"]["strategy"] == "random" else "loki"


def _front_section(result: Result, text: str) -> Section:
    found = points(result, text)
    labels = list(dict.fromkeys(point.label for point in front(found)))
    sentence = f"No method is better in both than these, from least to most forgotten on {text}: {', '.join(labels)}."
    reading = (
        "Each point is the mean of a method's seeds; up is better at the task, left is closer to the base. Small "
        "points are parts of the same change, joined to the whole; faint ones are single seeds. Circles are rows "
        "chosen by a score, squares rows drawn at random, triangles other methods; numbers are those of the key, "
        "which goes from the most learned to the least."
    )
    return Section(
        f"front-{text}",
        f"Learned against forgotten on {text}",
        sentence,
        reading,
        {f"front_{text}": front_picture(result, text)},
    )
