"""Which sections a report has, in their order, and those on spread, stability, other selections and training.

Every sentence with a number in it is made from the data here; the template only sets it.
"""

from __future__ import annotations

import numpy as np

from loki.reporting import charts, subject_sections
from loki.reporting.content import Content, Section, Table
from loki.reporting.data import Forgetting, ReportData
from loki.reporting.interactive import rows_data, subjects_data
from loki.reporting.map_sections import crowding_section, magnitude_section, signed_section
from loki.reporting.numbers import NBSP, format_number, percent, plural, times
from loki.reporting.statistics import crowding, similar_order
from loki.reporting.survey import LogSurvey
from loki.rows import RowSelection
from loki.selection.overlap import overlap

SETTLED, NEARLY_SETTLED = 0.95, 0.8
"""Mean stability from which more prompts would change little, and below which they are needed."""


def make_content(data: ReportData) -> Content:
    """All sections for which there is data.

    Raises:
        InputError: matplotlib is missing.
        ArtefactError: a selection does not fit the log.
    """
    sections: list[Section] = []
    glance: list[tuple[str, str]] = []
    script_data: dict[str, str] = {}
    survey, wording = data.survey, data.wording
    if survey is not None:
        num_layers, num_rows = survey.high.counts_LD.shape
        for selection in data.selections:
            selection.rows.require_fit(num_layers=num_layers, num_rows=num_rows, what=f"positions {selection.name}")
        crowded = crowding(survey.high.counts_LD, survey.low.counts_LD)
        stability_LD = data.stability.shares_LD if data.stability is not None else None
        script_data["rows-data"] = rows_data(survey, data.shown, stability_LD)
        analysed = "prompts analysed" if wording.entry == "prompt" else "windows of text analysed"
        glance.append((format_number(survey.num_prompts), analysed))
        glance.append((f"{num_layers} × {format_number(num_rows)}", "layers × rows in each"))
        sections.append(signed_section(survey, data.shown))
        if survey.is_signed:
            sections.append(magnitude_section(survey, data))
        sections.append(_spread(survey))
        if crowded is not None:
            sections.append(crowding_section(survey, crowded))
            glance.append((f"{times(crowded.ratio)} ×", "as often as by chance do high and low votes share a layer"))
        if survey.subjects is not None:
            order_S = similar_order(np.log(np.maximum(survey.subjects.relative_SL, 1e-12)))
            names = [survey.subject_names[subject] for subject in order_S]
            script_data["subjects-data"] = subjects_data(survey.subjects.relative_SL[order_S], names)
            sections.append(subject_sections.layers_section(survey.subjects, survey.subject_names, order_S, wording))
            sections.append(subject_sections.rows_section(survey.subjects, survey.subject_names, data.shown, wording))
    if data.shown is not None:
        glance.insert(2, (format_number(data.shown.num_selected), "rows selected"))
        if data.stability is not None:
            sections.append(_stability(data.shown, data.stability.shares_LD, data.stability.mean, wording.entries))
            glance.append((percent(data.stability.mean, 0), "of resamples agree on a selected row"))
        if len(data.selections) > 1:
            sections.append(_compared(data))
    if np.isfinite(charts.series(data.training_log, "loss")[1]).any():
        sections.append(_training(data))
    if data.forgetting is not None and charts.measured(data.forgetting):
        sections.append(_forgetting(data.forgetting))
    return Content((*sections, *data.sections), tuple(glance), script_data)


def _spread(survey: LogSurvey) -> Section:
    means_LD = survey.mean_scores_LD
    low_L, high_L = np.quantile(means_LD, [0.05, 0.95], axis=1)
    widest, narrowest = int((high_L - low_L).argmax()), int((high_L - low_L).argmin())
    wording, signed = survey.wording, survey.is_signed

    def reach(layer: int) -> str:
        return f"{format_number(float(low_L[layer]), 2)} to {format_number(float(high_L[layer]), 2)}"

    result = (
        f"Rows differ most in layer {widest}, where the middle 90{NBSP}% of them have a mean {wording.noun} of "
        f"{reach(widest)}, and least in layer {narrowest} ({reach(narrowest)})"
    )
    reading = f"Each ridge counts the rows of a layer by their mean {wording.noun}"
    reading += f"{'' if signed else ', which is never negative,'} over all {wording.entries}"
    linear = f"linear near zero, below about {format_number(charts.linear_unit(means_LD))}"
    if signed:
        result += f"; {percent(float((means_LD < 0).mean()))} of all rows are negative"
        if wording.argues:
            reading += (
                ": to the left rows that on average argue against the answer, to the right rows that argue for it"
            )
        reading += f". The axis is logarithmic on both sides and {linear}, which makes the valley in the middle"
    else:
        reading += f". The axis is logarithmic, and {linear}"
    reading += "; the short tick on each line is the layer’s median row."
    title = f"Mean {wording.noun} of the rows of each layer"
    picture = charts.score_ridges(means_LD, title=title, wording=wording, signed=signed)
    return Section(
        "spread",
        f"How {wording.noun} spreads in each layer",
        f"{result}.",
        reading,
        {f"{wording.file_stem}_by_layer": picture},
    )


def _stability(selection: RowSelection, shares_LD: np.ndarray, mean: float, entries: str) -> Section:
    shares_K = np.concatenate([shares_LD[layer, list(rows)] for layer, rows in enumerate(selection.rows)])
    unsettled = int((shares_K < NEARLY_SETTLED).sum())
    count = f"{format_number(unsettled)} of {plural(len(shares_K), 'row')}"
    result = f"A selected row is chosen by {percent(mean)} of bootstrap resamples of the {entries} on average"
    if mean >= SETTLED:
        result += f": more {entries} would change little."
    elif mean >= NEARLY_SETTLED:
        result += f": most rows are settled, and more {entries} would decide about the "
        result += f"{count} below {percent(NEARLY_SETTLED, 0)}."
    else:
        result += f": more {entries} are needed, {count} are chosen by fewer than {percent(NEARLY_SETTLED, 0)}."
    reading = (
        f"Each resample draws as many {entries} as there are, with replacement, and selects again in the same way. "
        "Rows at the right are chosen nearly always; rows further left stand near the edge of the quota, where a few "
        f"{entries} decide."
    )
    picture = charts.stability_histogram(shares_K, title="Stability of the selected rows")
    return Section("stability", "How stable is the selection?", result, reading, {"stability": picture})


def _compared(data: ReportData) -> Section:
    first, *others = data.selections
    num_rows = None if data.survey is None else data.survey.high.counts_LD.shape[1]
    rows = [(first.name, first.how, format_number(first.rows.num_selected), "", "")]
    shares = []
    for other in others:
        total = overlap([first.rows, other.rows], num_rows).total
        smaller = min(total.counts)
        shares.append(total.num_common / smaller)
        chance = "" if total.chance is None else percent(total.chance.expected / smaller)
        rows.append((other.name, other.how, format_number(other.rows.num_selected), percent(shares[-1]), chance))
    result = (
        f"{first.name} shares {percent(min(shares))}"
        + (f" to {percent(max(shares))}" if len(shares) > 1 else "")
        + f" of rows with {'the others' if len(others) > 1 else others[0].name}, counted on the smaller of the two."
    )
    headings = ("Positions", "Strategy", "Rows", f"Shared with {first.name}", "By chance")
    reading = "By chance means that each draws as many rows as it has in every layer, at random."
    return Section(
        "compared", "Selections compared", result, reading, table=Table("Selections compared", headings, tuple(rows), 2)
    )


def _training(data: ReportData) -> Section:
    log = data.training_log
    steps, losses = charts.series(log, "loss")
    finite = np.flatnonzero(np.isfinite(losses))
    first, last = finite[0], finite[-1]
    if first == last:
        result = f"The loss is {format_number(losses[last])} at step {format_number(steps[last])}."
    else:
        result = (
            f"The loss goes from {format_number(losses[first])} at step {format_number(steps[first])} "
            f"to {format_number(losses[last])} at step {format_number(steps[last])}."
        )
    reading = "The thick line is the training loss (left axis); its trend says more than single bumps."
    if np.isfinite(charts.series(log, "learning_rate")[1]).any():
        reading += " The thin line is the learning rate (right axis)."
    picture = charts.training_curve(log, title=f"Training curve over {len(steps)} logged steps")
    return Section("training", "Training", result, reading, {"training": picture})


def _forgetting(forgetting: Forgetting) -> Section:
    first, last = forgetting.history[0], forgetting.history[-1]
    rise = f"{'+' if last['loss_rise'] > 0 else ''}{format_number(last['loss_rise'], 2)}"
    result = (
        f"At step {format_number(last['step'])} the watched text’s loss has changed by {rise} nats per token, and the "
        f"KL divergence from the base is {format_number(last['kl'], 2)}"
    )
    reading = (
        "All is measured against the model before training: the change of the mean loss over the tokens of a text, and "
        "the mean KL divergence of the predictions there, which also sees what the loss averages away."
    )
    if "probe_accuracy" in last:
        before, after = (f"{row['probe_accuracy']:.1f}" for row in (first, last))
        result += (
            f"; of the probe’s questions {after}{NBSP}% are answered right, {before}{NBSP}% at step "
            f"{format_number(first['step'])} (standard error {last['probe_standard_error']:.1f})"
        )
        reading += (
            " The probe’s questions are the same each time, so a change of its accuracy is usually surer than the "
            "standard errors of the two values make it look."
        )
    picture = charts.forgetting_curves(forgetting, title=f"Forgetting over {len(forgetting.history)} measurements")
    return Section(
        "forgetting",
        "Forgetting during training",
        f"{result}. {_verdict(forgetting)}",
        reading,
        {"forgetting": picture},
    )


def _verdict(forgetting: Forgetting) -> str:
    """What became of the budget, in one sentence."""
    names = {"loss_rise": "loss rise", "kl": "KL divergence"}
    given = " and ".join(f"{names[name]} {format_number(limit)}" for name, limit in forgetting.limits.items())
    if not given:
        return "No limit was set."
    # The first row is the model before training, and nothing is done about it.
    spent = [row for row in forgetting.history[1:] if forgetting.exceeded(row)]
    if not spent:
        return f"The budget ({given}) was not spent."
    passed = " and ".join(names[name] for name in forgetting.exceeded(spent[0]))
    words = f"The budget ({given}) was spent at step {format_number(spent[0]['step'])} by the {passed}"
    if forgetting.action == "stop":
        return f"{words}, and training stopped there."
    # Nothing is left to lower after the last step.
    times = sum(row is not forgetting.history[-1] for row in spent)
    return f"{words}; the learning rate was lowered {plural(times, 'time')}." if times else f"{words}, the last one."
