"""The tables of a study's result, for the report and as Markdown; every number comes from the result's JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loki.errors import ArtefactError
from loki.reporting.content import Table
from loki.results import Result
from loki.study.finished import HELD_OUT

MINUS = "\u2212"
KIND = "study"
BASE_ROW, NONE_ROW = "base, untrained", "none"
AGAINST = " against "
Method = Mapping[str, Any]


def tables(result: Result) -> dict[str, Table]:
    """All tables by their names: `learned`, `tasks`, `benchmarks`, `costs`, and where there is any, `equal-score`,
    `pairs`, `relative` and `suppressed`.

    Raises:
        ArtefactError: the result is not one of a study.
    """
    if result.kind != KIND:
        raise ArtefactError(f"this is a result of kind {result.kind!r}: name one that `loki study` wrote")
    methods = result.figures["methods"]
    trained = [method for method in methods if method["kind"] != "suppress"]
    zeroed = [method for method in methods if method["kind"] == "suppress"]
    found = {
        "learned": _learned(result, trained),
        "tasks": _tasks(result, trained),
        "benchmarks": _benchmarks(result, trained),
        "costs": _costs(trained),
    }
    if result.figures.get("equal_score") is not None:
        found["equal-score"] = _equal_score(result)
    if result.figures.get("pairs"):
        found["pairs"] = _pairs(result)
    if result.figures.get("relative") is not None:
        found["relative"] = _relative(result)
    return found | ({"suppressed": _suppressed(result, zeroed)} if zeroed else {})


def texts_of(result: Result) -> list[str]:
    """The texts whose loss and divergence were measured."""
    return list(result.settings["evaluate"]["texts"])


def _tasks_of(result: Result) -> list[str]:
    """What was learned; results of earlier versions name the main task alone."""
    return result.figures.get("tasks") or [result.figures["task"]]


def _learned(result: Result, methods: Sequence[Method]) -> Table:
    task, texts = result.figures["task"], texts_of(result)
    base = result.figures["base"]
    head = ["method", "rate", "seeds", "task, %", "held-out loss"]
    head += [f"{text}, {what}" for text in texts for what in ("loss", "KL")] + ["forgetting, %", "losses only, %"]
    rows = [
        [BASE_ROW, "", "", _number(base[task]["value"], 1), _number(base[HELD_OUT]["value"], 3)]
        + [_number(base[f"{text}_loss"]["value"], 3) if i == 0 else "" for text in texts for i in range(2)]
        + ["", ""]
    ]
    for method in methods:
        scores = method["scores"]
        rows.append(
            [
                method["label"],
                f"{method['learning_rate']:g}",
                str(len(method["seeds"])),
                _after(scores.get(task), 1),
                _after(scores.get(HELD_OUT), 3),
                *(
                    cell
                    for text in texts
                    for cell in (_change(scores.get(f"{text}_loss"), 3), _after(scores.get(f"{text}_kl"), 4))
                ),
                _number(method["forgetting_percent"], 1),
                _number(method["losses_only_percent"], 1),
            ]
        )
    return _table("What was learned, and what was forgotten", head, rows)


def _tasks(result: Result, methods: Sequence[Method]) -> Table:
    """Each of the task's scores after training."""
    names, base = _tasks_of(result), result.figures["base"]
    rows = [["items", *(str(base[name]["count"]) for name in names)]]
    rows.append([BASE_ROW, *(_number(base[name]["value"], 1) for name in names)])
    rows += [[method["label"], *(_after(method["scores"].get(name), 1) for name in names)] for method in methods]
    return _table("The task's scores, %", ["method", *names], rows)


def _benchmarks(result: Result, methods: Sequence[Method]) -> Table:
    figures = result.figures
    names = [*figures["above_chance"], *figures["at_chance"]]
    base = figures["base"]
    rows = [
        [
            BASE_ROW,
            *(f"{_number(base[name]['value'], 1)} (chance {_number(base[name]['chance'], 0)})" for name in names),
        ]
    ]
    rows += [[method["label"], *(_change(method["scores"].get(name), 1) for name in names)] for method in methods]
    return _table("Benchmarks: points gained or lost", ["method", *names], rows)


def _costs(methods: Sequence[Method]) -> Table:
    units: Mapping[str, tuple[str, Callable[[float], str]]] = {
        "num_trainable": ("trained weights", lambda value: f"{value / 1e6:.2f} M"),
        "saved_bytes": ("file, MB", lambda value: f"{value / 1e6:.1f}"),
        "seconds_per_step": ("s a step", lambda value: f"{value:.2f}"),
        "peak_memory_mib": ("peak, MiB", lambda value: f"{value:,.0f}"),
    }
    rows = [
        [method["label"], *(shown(method["costs"][name]) for name, (_, shown) in units.items())]
        for method in methods
        if units.keys() <= method["costs"].keys()
    ]
    return _table("What training costs", ["method", *(head for head, _ in units.values())], rows)


def _equal_score(result: Result) -> Table:
    """Methods by what they have forgotten at the target; a method that does not reach it says so."""
    found, texts = result.figures["equal_score"], texts_of(result)
    methods = {method["name"]: method for method in result.figures["methods"]}
    reference = methods[found["reference"]]["label"]
    head = ["method", "seeds", "best, %"]
    head += [f"{text}, {what}" for text in texts for what in ("KL", f"times {reference}")]
    best = found.get("best", {})

    def forgotten(name: str) -> float:
        value = found["methods"][name][texts[0]]["forgotten"]
        return float("inf") if value is None else float(value)

    rows = []
    for name in sorted(found["methods"], key=forgotten):
        cells = [methods[name]["label"], str(len(methods[name]["seeds"])), _number(best.get(name), 1)]
        for text in texts:
            at = found["methods"][name][text]
            for what, digits in (("forgotten", 4), ("ratio", 2)):
                cells.append(_measured(at[what], at[f"{what}_low"], at[f"{what}_high"], digits))
        rows.append(cells)
    share = f"{100 * found['share']:g} %"
    return _table(f"Forgotten at {found['target']:.1f} % on the task, {share} of {reference}'s best", head, rows)


def _pairs(result: Result) -> Table:
    """Pairs of methods that differ in one thing."""
    labels = {method["name"]: method["label"] for method in result.figures["methods"]}
    texts = texts_of(result)
    head = ["method", "seeds", "task, points", f"at equal {texts[0]} KL", "held-out loss"]
    head += [f"{text} KL, times" for text in texts]
    # Results of earlier versions do not tell it.
    told = any("forgotten_ratio_at_equal_loss" in pair for pair in result.figures["pairs"])
    head += [f"{texts[0]} KL at equal loss, times"] if told else []
    rows = []
    for pair in result.figures["pairs"]:
        equal = pair["learned_at_equal_divergence"][texts[0]]
        ratios = [pair["forgotten_ratio"][text] for text in texts]
        ratios += [pair["forgotten_ratio_at_equal_loss"][texts[0]]] if told else []
        rows.append(
            [
                f"{labels[pair['method']]}{AGAINST}{labels[pair['against']]}",
                str(len(pair["seeds"])),
                _measured(*_ends(pair["learned"]), 1, signed=True),
                _measured(*_ends(equal), 1, signed=True),
                _measured(*_ends(pair["held_out"]), 3, signed=True),
                *(_measured(*_ends(ratio), 2) for ratio in ratios),
            ]
        )
    return _table("Methods that differ in one thing", head, rows)


def _ends(estimate: Mapping[str, float | None]) -> tuple[float | None, float | None, float | None]:
    return estimate["value"], estimate["low"], estimate["high"]


def _relative(result: Result) -> Table:
    """Scores as shares of full fine-tuning's."""
    found, names = result.figures["relative"], _tasks_of(result)
    methods = {method["name"]: method for method in result.figures["methods"]}
    rows = []
    for name, by_task in found["methods"].items():
        cells = (by_task.get(task, {"value": None, "low": None, "high": None}) for task in names)
        shown = [_measured(cell["value"], cell["low"], cell["high"], 2) for cell in cells]
        rows.append([methods[name]["label"], *shown])
    return _table(f"Scores relative to {methods[found['reference']]['label']}", ["method", *names], rows)


def _suppressed(result: Result, methods: Sequence[Method]) -> Table:
    texts, names = texts_of(result), result.figures["above_chance"]
    base = result.figures["base"]
    score = ["forgetting, %"] if names else []
    head = ["rows at zero", *(f"{text}, loss" for text in texts), *names, *score]
    rows = [
        [NONE_ROW]
        + [_number(base[f"{text}_loss"]["value"], 3) for text in texts]
        + [_number(base[name]["value"], 1) for name in names]
        + [""] * len(score)
    ]
    for method in methods:
        scores = method["scores"]
        cells = [_change(scores.get(f"{text}_loss"), 3) for text in texts]
        cells += [_change(scores.get(name), 1) for name in names]
        cells += [_number(method["forgetting_percent"], 1) for _ in score]
        rows.append([method["label"], *cells])
    return _table("Rows at zero", head, rows)


def _after(scored: Mapping[str, Any] | None, digits: int) -> str:
    """The value after training, with the deviation between seeds where there are several."""
    if scored is None:
        return "–"
    deviation = scored["seed_deviation"]
    return _number(scored["after"], digits) + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def _change(scored: Mapping[str, Any] | None, digits: int) -> str:
    """The change with its interval."""
    if scored is None or scored["change"] is None:
        return "–"
    low, high = (_number(scored[end], digits, signed=True) for end in ("low", "high"))
    return f"{_number(scored['change'], digits, signed=True)} [{low}, {high}]"


def _measured(value: float | None, low: float | None, high: float | None, digits: int, *, signed: bool = False) -> str:
    """A value with its interval, of which an end may be out of reach."""
    if value is None:
        return "n/a"
    ends = ("n/a" if end is None else _number(end, digits, signed=signed) for end in (low, high))
    return f"{_number(value, digits, signed=signed)} [{', '.join(ends)}]"


def _number(value: float | None, digits: int, *, signed: bool = False) -> str:
    if value is None:
        return "–"
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    # A change that rounds to nothing has no sign.
    return f"{0:.{digits}f}" if not float(text) else text.replace("-", MINUS)


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    return Table(caption, tuple(head), tuple(map(tuple, rows)))


def markdown(table: Table) -> str:
    """A table as Markdown, numbers to the right."""
    lines = [table.headings, ("---", *["---:"] * (len(table.headings) - 1)), *table.rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
