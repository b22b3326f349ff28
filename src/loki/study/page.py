"""A study as a report page: the fronts, and its tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    "benchmarks": "Points against the base, with 95 % bootstrap intervals over the same items.",
    "costs": "Medians over runs that may have shared the processors: compare them with each other only.",
    "suppressed": "Nothing is trained here: the rows are set to zero, and what the model knew is asked again.",
}
HEADINGS = {
    "learned": "What was learned, and what was forgotten",
    "benchmarks": "Benchmarks",
    "costs": "What training costs",
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
    """Task score against divergence on a text, every run a point."""
    return front_chart(
        points(result, text),
        learned=f"{result.figures['task']}, % right",
        forgotten=f"KL divergence from the base on {text}, nats per token",
        title=f"Learned against forgotten ({text})",
    )


def points(result: Result, text: str) -> list[Point]:
    """One point for each seed of each method that was trained and scored."""
    return [
        Point(method["label"], family_of(result, method), learned, forgotten)
        for method in result.figures["methods"]
        if method["kind"] != "suppress"
        for learned, forgotten in _by_seed(result, method, text)
    ]


def family_of(result: Result, method: Mapping[str, Any]) -> str:
    """Whose rows are trained: chosen by attribution, drawn at random, or another method altogether."""
    if method["kind"] != "loki":
        return "other"
    return "random" if result.settings["methods"][method["name"]]["rows"]["strategy"] == "random" else "loki"


def _by_seed(result: Result, method: Mapping[str, Any], text: str) -> Iterator[tuple[float, float]]:
    scores = method["scores"]
    task, divergence = scores.get(result.figures["task"]), scores.get(f"{text}_kl")
    if task is not None and divergence is not None:
        yield from zip(task["by_seed"], divergence["by_seed"], strict=True)


def _front_section(result: Result, text: str) -> Section:
    found = points(result, text)
    labels = list(dict.fromkeys(point.label for point in front(found)))
    sentence = f"No run is better in both than these, from least to most forgotten on {text}: {', '.join(labels)}."
    reading = (
        "Each point is one run; up is better at the task, left is closer to the base. Circles are rows chosen by "
        "attribution, squares rows drawn at random, triangles other methods."
    )
    return Section(
        f"front-{text}",
        f"Learned against forgotten on {text}",
        sentence,
        reading,
        {f"front_{text}": front_picture(result, text)},
    )
