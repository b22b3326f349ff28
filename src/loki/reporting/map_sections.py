"""Sections on votes: where scores are high and low, signed and by magnitude (LoKI figure 2), and crowding.

Every sentence with a number in it is made from the data here; the template only sets it.
"""

from __future__ import annotations

import numpy as np

from loki.reporting import charts, maps
from loki.reporting.content import Explorer, Section
from loki.reporting.data import ReportData
from loki.reporting.numbers import NBSP, format_number, percent, plural, times
from loki.reporting.statistics import Crowding, bin_rows, crowding, layer_shares
from loki.reporting.survey import EXTREME_PERCENT, LogSurvey
from loki.rows import RowSelection
from loki.selection.overlap import overlap
from loki.selection.votes import Votes

EXTREME = f"{EXTREME_PERCENT}{NBSP}%"
OF_TEXT = "of text (all of it, if it is short)"


def signed_section(survey: LogSurvey, selection: RowSelection | None) -> Section:
    """Maps of high and low scores."""
    wording = survey.wording
    high, low = _frequency(survey.high), _frequency(survey.low)
    titles = (f"Among the {EXTREME} highest", f"Among the {EXTREME} lowest")
    pictures = maps.density_maps(high, low, selection, titles=titles, entries=wording.entries)
    return Section(
        "votes",
        f"Where {wording.noun} is high, and where it is low",
        f"Votes for the highest {wording.noun} fall most often on {_leaders(high)}, those for the lowest on "
        f"{_leaders(low)}; an equal share would be {percent(1 / len(high))}.",
        _map_reading(survey, high, selection, wording.noun, "highest"),
        dict(zip(("votes_high", "votes_low"), pictures, strict=True)),
        Explorer("rows", "signed", (f"highest {EXTREME}", f"lowest {EXTREME}"), maps.colour_scale(high, low)[0]),
    )


def magnitude_section(survey: LogSurvey, data: ReportData) -> Section:
    """Maps of large and small scores of either sign, and whether sign or magnitude chose the rows shown."""
    wording = survey.wording
    high, low = _frequency(survey.high_magnitude), _frequency(survey.low_magnitude)
    titles = (f"Among the {EXTREME} largest in magnitude", f"Among the {EXTREME} smallest in magnitude")
    pictures = maps.density_maps(high, low, data.shown, titles=titles, entries=wording.entries)
    result = (
        f"By magnitude, votes for the largest {wording.noun} fall most often on {_leaders(high)}, those for the "
        f"smallest on {_leaders(low)}."
    )
    if data.shown is not None and survey.rivals is not None:
        result = _choice(survey, data.selections[0].how, data.shown)
    reading = _map_reading(survey, high, data.shown, f"magnitude of {wording.noun}", "largest")
    reading += (
        f" The lowest {wording.noun} is not the smallest: it is large and negative. So votes on the signed score"
        f"{', as in the paper,' if wording.argues else ''} and votes on its magnitude choose different rows."
    )
    return Section(
        "magnitude",
        "The same by magnitude",
        result,
        reading,
        dict(zip(("magnitude_high", "magnitude_low"), pictures, strict=True)),
        Explorer("rows", "magnitude", (f"largest {EXTREME}", f"smallest {EXTREME}"), maps.colour_scale(high, low)[0]),
    )


def _choice(survey: LogSurvey, how: str, shown: RowSelection) -> str:
    """Which score chose the rows shown, and how far the two scores agree."""
    rivals, num_rows = survey.rivals, survey.high.counts_LD.shape[1]
    assert rivals is not None, "only called with a selection"
    by_signed = overlap([shown, rivals.signed], num_rows).total.num_common
    by_magnitude = overlap([shown, rivals.magnitude], num_rows).total.num_common
    both = overlap([rivals.signed, rivals.magnitude], num_rows).total
    total, noun = shown.num_selected, survey.wording.noun
    where = "in each layer" if rivals.scope == "layer" else "in the whole model"
    signed_end, magnitude_end = ("lowest", "smallest") if rivals.direction == "lowest" else ("highest", "largest")
    source = f" ({how})" if how else ""
    if by_signed == total:
        words = f"The rows shown{source} are those with most votes for the {signed_end} signed {noun} {where}"
    elif by_magnitude == total:
        words = f"The rows shown{source} are those with most votes for the {magnitude_end} magnitude {where}"
    else:
        words = (
            f"Of the {format_number(total)} rows shown{source}, {percent(by_signed / total)} are among those with most "
            f"votes for the {signed_end} signed {noun} {where}, {percent(by_magnitude / total)} among those for the "
            f"{magnitude_end} magnitude"
        )
    assert both.chance is not None, "the number of rows is known"
    return (
        f"{words}; the two scores choose {format_number(both.num_common)} of {plural(total, 'row')} in common, "
        f"where chance would give {format_number(round(both.chance.expected))}."
    )


def _map_reading(survey: LogSurvey, shares_LD: np.ndarray, selection: RowSelection | None, what: str, rank: str) -> str:
    wording = survey.wording
    bin_size = bin_rows(shares_LD[:1], maps.MAX_BINS)[1]
    cell = "one row" if bin_size == 1 else f"the mean of {bin_size} neighbouring rows"
    entry = wording.entry if wording.entry == "prompt" else f"{wording.entry} {OF_TEXT}"
    reading = (
        f"For every {entry}, the {EXTREME} of the model’s rows with the {rank} {what} get a vote, and so do those at "
        f"the other end. Each band is a layer, the first at the top, and each cell in it {cell}. "
        f"The stronger the colour, the larger the share of {wording.entries}, on a logarithmic scale; blank cells are "
        "never voted for. The bars sum the votes of each layer."
    )
    if selection is not None:
        reading += " The thin marks under a band show which rows were selected"
        reading += "." if bin_size == 1 else ": the stronger the mark, the more rows of the cell."
    return reading


def crowding_section(survey: LogSurvey, signed: Crowding) -> Section:
    """Whether high and low votes fall on the same layers, beside chance."""
    low, high = signed.chance_range
    if signed.rate > high:
        verdict = "high and low rows crowd into the same layers"
    elif signed.rate < low:
        verdict = "high and low rows avoid each other’s layers"
    else:
        verdict = "that is no more than chance"
    result = (
        f"A high and a low vote, each drawn at random, fall on the same layer in {percent(signed.rate)} of cases, "
        f"where chance gives {percent(signed.chance)}: {verdict}"
    )
    wording, ratios = survey.wording, f"{times(signed.ratio)} times chance"
    if survey.is_signed:
        magnitude = crowding(survey.high_magnitude.counts_LD, survey.low_magnitude.counts_LD)
        ratios += "" if magnitude is None else f"; by magnitude it is {times(magnitude.ratio)} times"
    result += f" ({ratios})"
    reading = (
        f"Upwards each layer’s share of all votes for the {EXTREME} of highest {wording.noun}, downwards its share "
        "of those for the lowest. Where the two halves mirror each other and leave the dashed lines, both kinds crowd "
        f"into the same layers{', which is the paper’s observation' if wording.argues else ''}. Chance deals the rows, "
        f"each with its own votes, at random over the layers; 95{NBSP}% of such deals give {percent(low, 2)} to "
        f"{percent(high, 2)}."
    )
    title = "Share of high and of low votes by layer"
    picture = charts.crowding_bars(survey.high.counts_LD, survey.low.counts_LD, title=title)
    return Section("crowding", "Do high and low rows share layers?", f"{result}.", reading, {"crowding": picture})


def _frequency(votes: Votes) -> np.ndarray:
    return votes.counts_LD / votes.num_prompts


def _leaders(shares_LD: np.ndarray) -> str:
    """The two layers with most votes: `layers 29 and 18 (13.2 % and 7.0 %)`."""
    shares_L = layer_shares(shares_LD)
    first = [int(layer) for layer in np.argsort(-shares_L, kind="stable")[:2] if shares_L[layer] > 0]
    if not first:
        return "no layer"
    if len(first) == 1:
        return f"layer {first[0]} ({percent(shares_L[first[0]])})"
    return f"layers {first[0]} and {first[1]} ({percent(shares_L[first[0]])} and {percent(shares_L[first[1]])})"
