"""The words of the sections: each number in them is known here by hand or counted in another way."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from loki.errors import ArtefactError
from loki.log.reader import AttributionLog
from loki.reporting.data import Forgetting, NamedSelection, ReportData
from loki.reporting.reading import read_log
from loki.reporting.sections import make_content
from loki.reporting.survey import LogSurvey, survey_log
from loki.rows import RowSelection
from loki.selection.votes import Votes


def votes(counts_LD, means_LD=None):
    counts_LD = np.array(counts_LD)
    means_LD = np.zeros(counts_LD.shape) if means_LD is None else np.array(means_LD)
    return Votes(counts_LD, means_LD, 10, 0)


def survey_of(high, low):
    parts = {
        "high": votes(high, np.linspace(-1, 1, np.size(high)).reshape(np.shape(high))),
        "low": votes(low),
        "high_magnitude": votes(high, np.ones(np.shape(high))),
        "low_magnitude": votes(low),
    }
    return LogSurvey(10, **parts)


def sections_of(**data):
    content = make_content(ReportData("t", "m", **data))
    return {section.name: section for section in content.sections}, content


def plain(text):
    return text.replace("\u00a0", " ").replace("\u202f", " ").replace("\u2212", "-")


def test_leading_layers_are_named_with_their_shares():
    high = [[0, 0, 0, 0], [6, 0, 0, 0], [2, 1, 0, 0], [0, 1, 0, 0]]
    low = [[9, 1, 0, 0], [0] * 4, [0] * 4, [0] * 4]
    sections, _ = sections_of(survey=survey_of(high, low))
    assert plain(sections["votes"].result) == (
        "Votes for the highest attribution fall most often on layers 1 and 2 (60.0 % and 30.0 %), those for the lowest "
        "on layer 0 (100.0 %); an equal share would be 25.0 %."
    )
    assert "thin marks" not in sections["votes"].reading
    assert "one row." in sections["votes"].reading
    assert "fall most often on layers 1 and 2" in sections["magnitude"].result


@pytest.mark.parametrize(
    ("low_layer", "verdict"),
    [(0, "high and low rows crowd into the same layers"), (5, "high and low rows avoid each other’s layers")],
)
def test_crowding_in_words(low_layer, verdict):
    high, low = np.zeros((8, 50), dtype=int), np.zeros((8, 50), dtype=int)
    high[0, :20] = low[low_layer, 25:45] = 3
    sections, content = sections_of(survey=survey_of(high, low))
    result = plain(sections["crowding"].result)
    assert verdict in result
    assert f"in {100 if low_layer == 0 else 0}.0 % of cases, where chance gives 12.3 %" in result
    if low_layer == 0:
        # 1 over 49/399.
        assert "(8.1 times chance; by magnitude it is 8.1 times)" in result
        assert ("8.1 ×", "as often as by chance do high and low votes share a layer") in content.glance


def test_no_more_than_chance():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 10, (8, 300))
    sections, _ = sections_of(survey=survey_of(counts, rng.permutation(counts.ravel()).reshape(8, 300)))
    assert "that is no more than chance" in sections["crowding"].result


def test_without_votes_of_one_kind_there_is_no_crowding():
    sections, content = sections_of(survey=survey_of(np.zeros((2, 9), dtype=int), np.ones((2, 9), dtype=int)))
    assert "crowding" not in sections
    assert "no layer" in sections["votes"].result
    assert len(content.glance) == 2


def test_spread_names_the_widest_and_the_narrowest_layer():
    means_LD = np.stack([np.linspace(-0.1, 0.1, 101), np.linspace(-1, 3, 101), np.full(101, 0.25)])
    ones = np.ones(means_LD.shape, dtype=int)
    sections, _ = sections_of(survey=replace(survey_of(ones, ones), high=votes(ones, means_LD)))
    assert plain(sections["spread"].result) == (
        "Rows differ most in layer 1, where the middle 90 % of them have a mean attribution of -0.8 to 2.8, and least "
        "in layer 2 (0.25 to 0.25); 24.8 % of all rows are negative."
    )


@pytest.fixture(name="log_with_rivals")
def make_log_with_rivals(write_log, tmp_path, scores_NLD):
    path = write_log(tmp_path / "kva.h5", scores_NLD)

    def read(selection):
        with AttributionLog(path) as log:
            return survey_log(log, selection)

    return read


def test_magnitude_section_says_which_score_chose_the_rows(log_with_rivals):
    rivals = log_with_rivals(RowSelection.from_lists([[0, 1, 2, 3]] * 3)).rivals
    both = sum(len(set(a) & set(b)) for a, b in zip(rivals.signed.rows, rivals.magnitude.rows, strict=True))
    tail = f"; the two scores choose {both} of 12 rows in common, where chance would give 1."
    for rows, start in (
        (
            rivals.signed,
            "The rows shown (mine) are those with most votes for the lowest signed attribution in each layer",
        ),
        (rivals.magnitude, "The rows shown (mine) are those with most votes for the smallest magnitude in each layer"),
    ):
        sections, _ = sections_of(survey=log_with_rivals(rows), selections=(NamedSelection("a.json", rows, "mine"),))
        assert sections["magnitude"].result == start + tail


def test_magnitude_section_of_rows_that_neither_score_chose(log_with_rivals):
    signed = log_with_rivals(RowSelection.from_lists([[0, 1]] * 3)).rivals.signed
    left = next(row for row in range(40) if row not in signed.rows[0])
    shown = RowSelection.from_lists([[signed.rows[0][0], left], *signed.as_lists()[1:]])
    sections, _ = sections_of(survey=log_with_rivals(shown), selections=(NamedSelection("a.json", shown),))
    assert plain(sections["magnitude"].result).startswith(
        "Of the 6 rows shown, 83.3 % are among those with most votes for the lowest signed attribution in each layer, "
    )


def test_subjects_in_words_and_table(make_log):
    log, (positions, _) = make_log()
    reading = read_log(log, [positions], with_stability=False)
    sections, content = sections_of(survey=reading.survey, selections=reading.selections)
    profile = reading.survey.subjects
    relative_SL = profile.relative_SL
    far, subject, layer = max(
        (max(ratio, 1 / ratio), subject, layer)
        for subject, ratios_L in enumerate(relative_SL)
        for layer, ratio in enumerate(ratios_L)
    )
    assert far > 2
    words = f"{reading.survey.subject_names[subject]} in layer {layer}: {relative_SL[subject, layer]:.2g} times"
    assert words in sections["subjects"].result
    ratios_L = relative_SL.max(axis=0) / relative_SL.min(axis=0)
    assert f"Layer {ratios_L.argmin()} differs least between subjects" in sections["subjects"].result

    table = sections["specific"].table
    assert table.headings == ("Subject", "Layer", "Row", "Times the rest", "z-score", "Selected")
    assert table.rows[0][:3] == ("virology", "1", "7")
    assert table.rows[0][5] == ("yes" if 7 in reading.selections[0].rows.rows[1] else "no")
    assert f"{profile.num_above} of 360 pairs" in sections["specific"].result
    assert f"above {profile.threshold:.1f}" in sections["specific"].result
    assert {"rows-data", "subjects-data"} == content.script_data.keys()

    for row, word in ((7, "yes"), (8, "no")):
        selections = (NamedSelection("a.json", RowSelection.from_lists([[7], [row], [7]])),)
        assert sections_of(survey=reading.survey, selections=selections)[0]["specific"].table.rows[0][5] == word

    plain_table = sections_of(survey=reading.survey)[0]["specific"].table
    assert plain_table.headings[-1] == "z-score"
    assert len(plain_table.rows[0]) == 5


@pytest.mark.parametrize(
    ("mean", "words"),
    [
        (
            0.96,
            "is chosen by 96.0 % of bootstrap resamples of the prompts on average: more prompts would change little.",
        ),
        (0.9, "most rows are settled, and more prompts would decide about the 2 of 4 rows below 80 %."),
        (0.5, "more prompts are needed, 2 of 4 rows are chosen by fewer than 80 %."),
    ],
)
def test_stability_says_whether_more_prompts_are_needed(mean, words):
    counts = np.ones((2, 5), dtype=int)
    shares_LD = np.array([[1.0, 0.79, 0, 0, 0], [0.8, 0.1, 0, 0, 0]])
    stability = SimpleNamespace(shares_LD=shares_LD, mean=mean)
    selection = NamedSelection("a.json", RowSelection.from_lists([[0, 1], [0, 1]]))
    survey = survey_of(counts, counts)
    sections, content = sections_of(survey=survey, selections=(selection,), stability=stability)
    assert plain(sections["stability"].result).endswith(words)
    assert [text for _, text in content.glance].count("of resamples agree on a selected row") == 1


def test_selections_are_compared_with_the_first():
    first = NamedSelection("a.json", RowSelection.from_lists([[0, 1, 2, 3], [4, 5]]), "layer_balanced, 10 %")
    second = NamedSelection("b.json", RowSelection.from_lists([[0, 1], [9]]))
    third = NamedSelection("c.json", RowSelection.from_lists([[7, 8], [4, 6]]))
    counts = np.ones((2, 10), dtype=int)
    sections, _ = sections_of(survey=survey_of(counts, counts), selections=(first, second, third))
    rows = [tuple(map(plain, row)) for row in sections["compared"].table.rows]
    # By chance: (4·2 + 2·1)/10 = 1 of 3 rows, and (4·2 + 2·2)/10 = 1.2 of 4.
    assert rows == [
        ("a.json", "layer_balanced, 10 %", "6", "", ""),
        ("b.json", "", "3", "66.7 %", "33.3 %"),
        ("c.json", "", "4", "25.0 %", "30.0 %"),
    ]
    assert plain(sections["compared"].result).startswith("a.json shares 25.0 % to 66.7 % of rows with the others")
    alone, _ = sections_of(survey=survey_of(counts, counts), selections=(first,))
    assert "compared" not in alone


def test_selection_of_another_model_is_refused_by_name():
    counts = np.ones((2, 10), dtype=int)
    selections = (NamedSelection("a.json", RowSelection.from_lists([[0], [1]])),)
    with pytest.raises(ArtefactError, match=r"positions b\.json have 1 layers, the model has 2"):
        sections_of(
            survey=survey_of(counts, counts), selections=(*selections, NamedSelection("b.json", RowSelection(((1,),))))
        )


def test_training_in_words():
    log = [{"step": 5, "loss": 2.25, "learning_rate": 1e-3}, {"step": 10, "loss": 1.5}]
    sections, _ = sections_of(training_log=log)
    assert sections["training"].result == "The loss goes from 2.25 at step 5 to 1.5 at step 10."
    assert "learning rate" in sections["training"].reading
    (section,) = sections_of(training_log=log[1:])[0].values()
    assert section.result == "The loss is 1.5 at step 10."
    assert "learning rate" not in section.reading
    assert sections_of(training_log=[{"step": 3, "loss": float("nan")}])[0] == {}


ROWS = (
    {"step": 0, "loss_rise": 0.0, "kl": 0.0, "probe_accuracy": 45.61, "probe_standard_error": 4.69},
    {"step": 5, "loss_rise": 0.0204, "kl": 0.012, "probe_accuracy": 44.74, "probe_standard_error": 4.68},
    {"step": 10, "loss_rise": -0.0312, "kl": 0.06, "probe_accuracy": 42.98, "probe_standard_error": 4.66},
)


def forgetting_words(rows=ROWS, **limits):
    sections, _ = sections_of(forgetting=Forgetting(rows, **limits))
    return plain(sections["forgetting"].result)


def test_forgetting_in_words():
    assert forgetting_words() == (
        "At step 10 the watched text’s loss has changed by -0.031 nats per token, and the KL divergence from the base "
        "is 0.06; of the probe’s questions 43.0 % are answered right, 45.6 % at step 0 (standard error 4.7). "
        "No limit was set."
    )
    text = forgetting_words([{name: row[name] for name in ("step", "loss_rise", "kl")} for row in ROWS[:2]])
    assert text.startswith("At step 5 the watched text’s loss has changed by +0.02 nats per token, and the KL")
    assert "probe" not in text


@pytest.mark.parametrize(
    ("limits", "verdict"),
    [
        ({"max_kl": 0.06}, "The budget (KL divergence 0.06) was not spent."),
        ({"max_kl": 0.05}, "The budget (KL divergence 0.05) was spent at step 10 by the KL divergence, and training"),
        (
            {"max_kl": 0.05, "max_loss_rise": 0.01, "action": "lower"},
            "was spent at step 5 by the loss rise; the learning rate was lowered 1 time.",
        ),
        (
            {"max_kl": 0.01, "max_loss_rise": 0.02},
            "(loss rise 0.02 and KL divergence 0.01) was spent at step 5 by the loss rise and KL divergence, and",
        ),
        (
            {"max_kl": 0.05, "action": "lower"},
            "was spent at step 10 by the KL divergence, the last one.",
        ),
    ],
)
def test_what_became_of_the_budget(limits, verdict):
    assert verdict in forgetting_words(**limits)


def test_a_record_of_a_budget_whose_model_broke():
    """What is not finite is null in the record, and spends the budget."""
    history = [{"step": 0, "loss_rise": 0.0, "kl": 0.0}, {"step": 5, "loss_rise": None, "kl": None}]
    record = {"history": history, "max_loss_rise": 0.1, "max_kl": None, "action": "stop", "every": 5, "spent": True}
    sections, _ = sections_of(forgetting=Forgetting.of_record(record))
    assert sections["forgetting"].result.endswith(
        "The budget (loss rise 0.1) was spent at step 5 by the loss rise, and training stopped there."
    )
    never = {**record, "history": history[1:]}
    assert sections_of(forgetting=Forgetting.of_record(never))[0] == {}


def test_order_of_the_sections(make_log):
    log, positions = make_log()
    reading = read_log(log, positions)
    sections, _ = sections_of(
        survey=reading.survey,
        selections=reading.selections,
        stability=reading.stability,
        training_log=[{"step": 1, "loss": 1.0}],
        forgetting=Forgetting(ROWS),
    )
    assert list(sections) == [
        *("votes", "magnitude", "spread", "crowding", "subjects", "specific", "stability", "compared", "training"),
        "forgetting",
    ]
    assert all(section.result.endswith(".") for section in sections.values())
    assert all(section.reading.endswith(".") for section in sections.values())
