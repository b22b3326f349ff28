"""What a page says of scores other than attribution: nothing that holds for attribution alone."""

import re
from typing import get_args

import numpy as np
import pytest

from loki.choices import RowScoreName, ScoreName
from loki.reporting.html import write_report
from loki.reporting.reading import report_of_log
from loki.reporting.wording import KVA, UNKNOWN, WORDINGS, wording_of
from loki.selection.run import select_to_file

TITLES = {
    "damage": "What a change of each row would cost Tiny",
    "fisher": "What a change of each row would cost Tiny",
    "first_order": "How much the loss of Tiny leans on each row",
    "activation_norm": "How large the output of each row of Tiny is",
}


def text_of(page):
    """What can be read on a page, drawings included, without its provenance."""
    for tag in ("script", "style", "details"):
        page = re.sub(rf"<{tag}\b.*?</{tag}>", " ", page, flags=re.DOTALL)
    words = re.sub(r"<[^>]*>", " ", page).replace("\u2212", "-")
    return re.sub(r"\s+([.,;:)])", r"\1", " ".join(words.split()))


@pytest.fixture(name="page_of")
def make_page_of(tmp_path):
    """Draws a log with the selections of some strategies; returns the page's words and the names of its figures."""

    def page_of(log, *strategies):
        paths = [tmp_path / f"{strategy}.json" for strategy in strategies]
        for path in paths:
            select_to_file(log, path, quota=20, strategy=path.stem)
        figures = write_report(tmp_path / "page.html", report_of_log(log, paths), figures_dir=tmp_path / "figures")
        return text_of((tmp_path / "page.html").read_text()), [path.stem for path in figures[::2]]

    return page_of


def test_every_score_has_words():
    assert list(WORDINGS) == list(get_args(ScoreName))
    assert [name for name, wording in WORDINGS.items() if wording.argues or wording.entry == "prompt"] == ["kva"]
    assert {name: wording_of(name) for name in WORDINGS} == WORDINGS
    assert wording_of("best") is UNKNOWN


@pytest.mark.parametrize("score", get_args(RowScoreName))
def test_a_page_of_scores_without_a_sign(write_damage_log, tmp_path, page_of, score):
    noun = WORDINGS[score].noun
    text, figures = page_of(write_damage_log(tmp_path / "log.h5", score), "capped", "layer_balanced")
    assert text.startswith(TITLES[score])
    for false in (
        "attribut",
        "prompt",
        "answer",
        "magnitude",
        "negative and",
        "serve",
        "paper",
        "signed",
        "on average n",
    ):
        assert false not in text.lower(), false
    for true in (
        f"here by its {WORDINGS[score].definition}. It then trains a selection of these rows and leaves",
        "windows of text analysed 60",
        f"Where {noun} is high, and where it is low Votes for the highest {noun} fall most often on layers",
        f"For every window of text (all of it, if it is short), the 5 % of the model’s rows with the highest {noun} ",
        "share of windows",
        f"How {noun} spreads in each layer",
        f"of them have a mean {noun} of ",
        f"by their mean {noun}, which is never negative, over all windows. The axis is logarithmic, and linear near",
        f"mean {noun} of a row",
        f"all votes for the 5 % of highest {noun}, downwards",
        "crowd into the same layers. Chance deals",
        f"How {noun} differs between subjects The largest departure is",
        f"Each cell is the mean {noun} over a layer’s rows and a subject’s windows, relative",
        f"how far a row’s mean {noun} over a subject’s windows lies from its mean over all windows",
        "of bootstrap resamples of the windows on average",
        f"capped.json capped, 20 %, by {noun} 24 layer_balanced.json layer_balanced, 20 %, by {noun} 24",
    ):
        assert true in text, true
    assert figures == ["votes_high", "votes_low", f"{score}_by_layer", "crowding", "subjects", "stability"]


def test_crowding_has_no_second_figure_where_no_score_is_negative(write_damage_log, tmp_path, page_of):
    text, _ = page_of(write_damage_log(tmp_path / "log.h5", "damage"))
    assert re.search(r"\(\d+\.\d+ times chance\)\.", text)


def test_a_page_of_attribution_keeps_its_words(write_log, tmp_path, page_of, scores_NLD):
    text, figures = page_of(write_log(tmp_path / "log.h5", scores_NLD), "layer_balanced")
    for true in (
        "Where Tiny keeps what it knows",
        "(LoKI) measures how much each row of a model’s feed-forward output projections, a knowledge vector, "
        "contributes to the model’s answers; it then trains a selection",
        "prompts analysed 60",
        "For every prompt, the 5 % of the model’s rows with the highest attribution get a vote",
        "The lowest attribution is not the smallest: it is large and negative. So votes on the signed score, as in the "
        "paper, and votes on its magnitude choose different rows.",
        "to the left rows that on average argue against the answer, to the right rows that argue for it",
        "on average against the answer",
        "crowd into the same layers, which is the paper’s observation. Chance deals",
        "Which layers serve which subjects",
        "Each cell is the mean magnitude of attribution over a layer’s rows and a subject’s prompts",
        "of bootstrap resamples of the prompts on average",
    ):
        assert true in text, true
    assert re.search(r"times chance; by magnitude it is \d+\.\d+ times\)", text)
    assert "attribution_by_layer" in figures


@pytest.mark.parametrize(
    ("strategy", "start"),
    [
        (
            "adaptive",
            "The rows shown (adaptive, 20 %) are those with most votes for the smallest magnitude in each lay",
        ),
        (
            "layer_highest",
            "The rows shown (layer_highest, 20 %) are those with most votes for the highest signed attri",
        ),
        (
            "layer_highest_magnitude",
            "The rows shown (layer_highest_magnitude, 20 %) are those with most votes for the largest magnitude in e",
        ),
        ("global_highest", "those with most votes for the highest signed attribution in the whole model; the two"),
        ("capped", r"Of the 24 rows shown (capped, 20 %), "),
    ],
)
def test_how_attributed_rows_were_chosen(write_log, tmp_path, page_of, scores_NLD, strategy, start):
    text, _ = page_of(write_log(tmp_path / "log.h5", scores_NLD), strategy)
    assert start in text
    assert ("in the whole model;" in text) == (strategy == "global_highest")


def test_rows_of_attention_are_no_knowledge_vectors(write_damage_log, tmp_path, page_of):
    text, _ = page_of(write_damage_log(tmp_path / "log.h5", "damage", site_module="o_proj"))
    assert "scores each row of a model’s attention output projections here by its damage" in text
    assert "knowledge vector" not in text


def test_a_signed_score_from_elsewhere_has_its_section_on_magnitude_and_no_answer(
    write_log, tmp_path, page_of, scores_NLD
):
    text, _ = page_of(write_log(tmp_path / "log.h5", scores_NLD, settings={"score": "influence"}))
    assert "The lowest score is not the smallest: it is large and negative. So votes on the signed score and" in text
    assert "on average negative" in text
    assert "answer" not in text
    assert "by their mean score over all windows. The axis is logarithmic on both sides" in text


def test_attribution_that_is_never_negative_is_drawn_on_one_side(write_log, tmp_path, page_of, scores_NLD):
    text, _ = page_of(write_log(tmp_path / "log.h5", np.abs(scores_NLD)))
    assert "by their mean attribution, which is never negative, over all prompts" in text
    assert "The same by magnitude" not in text
    assert KVA.noun in text
