import numpy as np
import pytest

from loki.errors import ArtefactError
from loki.log.reader import AttributionLog
from loki.prompts.questions import load_probe
from loki.reporting.statistics import NO_SUBJECT
from loki.reporting.survey import subjects_of, survey_log
from loki.reporting.wording import KVA, WORDINGS
from loki.rows import RowSelection
from loki.selection.strategies import Election, select


def survey(path, *arguments):
    with AttributionLog(path) as log:
        return survey_log(log, *arguments)


def plain_votes(scores_NLD, count, *, highest):
    """One prompt after the other, by a full sort of the whole model."""
    votes = np.zeros(scores_NLD[0].size, dtype=int)
    for scores_LD in scores_NLD:
        order = np.lexsort((np.arange(votes.size), scores_LD.reshape(-1)))
        votes[order[-count:] if highest else order[:count]] += 1
    return votes.reshape(scores_NLD.shape[1:])


def test_votes_and_means_against_a_plain_count(write_log, tmp_path, scores_NLD):
    found = survey(write_log(tmp_path / "kva.h5", scores_NLD))
    count = scores_NLD[0].size * 5 // 100
    assert count == 6

    for votes, values_NLD, highest in (
        (found.high, scores_NLD, True),
        (found.low, scores_NLD, False),
        (found.high_magnitude, np.abs(scores_NLD), True),
        (found.low_magnitude, np.abs(scores_NLD), False),
    ):
        np.testing.assert_array_equal(votes.counts_LD, plain_votes(values_NLD, count, highest=highest))
    np.testing.assert_allclose(found.mean_scores_LD, scores_NLD.mean(axis=0, dtype=np.float64))
    np.testing.assert_allclose(found.mean_magnitudes_LD, np.abs(scores_NLD).mean(axis=0, dtype=np.float64))
    assert found.num_prompts == len(scores_NLD)
    assert found.rivals is None
    assert found.votes_again is None


def test_a_tiny_model_has_at_least_one_extreme_row(write_log, tmp_path):
    assert survey(write_log(tmp_path / "kva.h5", np.arange(6.0).reshape(1, 2, 3))).high.counts_LD.sum() == 1


def most_voted(scores_NLD, count, places=None):
    """Per layer, the rows most often among the `count` lowest; as many as `places` has for it."""
    chosen = []
    for layer in range(scores_NLD.shape[1]):
        votes, means = np.zeros(scores_NLD.shape[2]), scores_NLD[:, layer].mean(axis=0, dtype=np.float64)
        for scores_D in scores_NLD[:, layer]:
            votes[np.argsort(scores_D)[:count]] += 1
        chosen.append(
            sorted(
                sorted(range(len(votes)), key=lambda row: (-votes[row], means[row]))[
                    : places[layer] if places else count
                ]
            )
        )
    return chosen


def test_rivals_have_as_many_rows_in_each_layer(write_log, tmp_path, scores_NLD):
    shown = RowSelection.from_lists([[0, 1, 2], [4, 5, 6], [7, 8, 9]])
    rivals = survey(write_log(tmp_path / "kva.h5", scores_NLD), shown).rivals
    assert rivals.scope == "layer"
    assert rivals.signed.as_lists() == most_voted(scores_NLD, 3)
    assert rivals.magnitude.as_lists() == most_voted(np.abs(scores_NLD), 3)


def test_rivals_of_a_selection_in_some_layers_only(write_log, tmp_path, scores_NLD):
    rivals = survey(write_log(tmp_path / "kva.h5", scores_NLD), RowSelection.from_lists([[], [1, 2], [3, 4]])).rivals
    assert rivals.signed.as_lists() == [[], *most_voted(scores_NLD, 2)[1:]]


def test_rivals_of_a_selection_of_unequal_layers_compete_in_the_whole_model(write_log, tmp_path, scores_NLD):
    rivals = survey(write_log(tmp_path / "kva.h5", scores_NLD), RowSelection.from_lists([[0], [1, 2], [3, 4]])).rivals
    assert rivals.scope == "model"
    whole = most_voted(scores_NLD.reshape(len(scores_NLD), 1, -1), 5)[0]
    assert rivals.signed.as_lists() == [[cell % 40 for cell in whole if cell // 40 == layer] for layer in range(3)]


@pytest.mark.parametrize("strategy", ["adaptive", "capped"])
def test_rivals_of_unequal_layers_that_are_known_to_compete_in_each(write_log, tmp_path, scores_NLD, strategy):
    path = write_log(tmp_path / "kva.h5", scores_NLD)
    with AttributionLog(path) as log:
        chosen = select(log, 20, strategy)
    places = [len(rows) for rows in chosen.rows.rows]
    assert len(set(places)) > 1
    rivals = survey(path, chosen.rows, chosen.election).rivals
    assert (rivals.scope, rivals.direction) == ("layer", "lowest")
    assert rivals.signed.as_lists() == most_voted(scores_NLD, 8, places)
    assert rivals.magnitude.as_lists() == most_voted(np.abs(scores_NLD), 8, places)
    assert (rivals.magnitude == chosen.rows) == (strategy == "adaptive")


def test_rivals_are_taken_from_the_end_that_the_rows_were(write_log, tmp_path, scores_NLD):
    path = write_log(tmp_path / "kva.h5", scores_NLD)
    with AttributionLog(path) as log:
        chosen = select(log, 10, "layer_highest_magnitude")
    rivals = survey(path, chosen.rows, chosen.election).rivals
    assert rivals.direction == "highest"
    assert rivals.signed.as_lists() == most_voted(-scores_NLD, 4)
    assert rivals.magnitude.as_lists() == most_voted(-np.abs(scores_NLD), 4) == chosen.rows.as_lists()


def test_whether_any_score_is_negative(write_log, tmp_path, scores_NLD):
    assert survey(write_log(tmp_path / "kva.h5", scores_NLD)).is_signed
    magnitudes_NLD = np.abs(scores_NLD)
    assert not survey(write_log(tmp_path / "none.h5", magnitudes_NLD)).is_signed
    magnitudes_NLD[17, 2, 5] *= -1
    assert survey(write_log(tmp_path / "one.h5", magnitudes_NLD)).is_signed


def test_what_the_scores_are_and_of_which_rows_comes_from_the_header(write_log, write_damage_log, tmp_path, scores_NLD):
    found = survey(write_damage_log(tmp_path / "a.h5", "fisher", site_module="o_proj"))
    assert (found.wording, found.site_module) == (WORDINGS["fisher"], "o_proj")
    assert found.subject_names == ("anatomy", "astronomy", "virology")
    for options in ({}, {"header": False}):
        found = survey(write_log(tmp_path / "b.h5", scores_NLD, **options))
        assert (found.wording, found.site_module) == (KVA, "down_proj")


def test_votes_of_an_election_are_counted_beside_the_rest(write_log, tmp_path, scores_NLD):
    path = write_log(tmp_path / "kva.h5", scores_NLD)
    candidates_LD = np.ones(scores_NLD.shape[1:], dtype=bool)
    for selection in (None, RowSelection.from_lists([[0], [1], [2]])):
        again = survey(path, selection, Election.of("global_highest", 5, candidates_LD)).votes_again
        np.testing.assert_array_equal(again.counts_LD, plain_votes(scores_NLD, 6, highest=True))
    # Rows that do not stand get no votes there, and keep theirs in the maps.
    candidates_LD[:, ::2] = False
    found = survey(path, None, Election.of("global_highest", 5, candidates_LD))
    expected = plain_votes(scores_NLD[:, :, 1::2], 6, highest=True)
    np.testing.assert_array_equal(found.votes_again.counts_LD[:, 1::2], expected)
    assert found.high.counts_LD[:, ::2].any()


def test_selection_of_another_model_is_refused(write_log, tmp_path, scores_NLD):
    with pytest.raises(ArtefactError, match="have 1 layers, the model has 3"):
        survey(write_log(tmp_path / "kva.h5", scores_NLD), RowSelection(((0,),)))


def test_subjects_come_from_the_prompt_ids(write_log, tmp_path, scores_NLD):
    found = survey(write_log(tmp_path / "kva.h5", scores_NLD))
    assert found.subject_names == ("anatomy", "astronomy", "virology")
    assert found.subjects.counts_S.tolist() == [20, 20, 20]
    means_L = np.abs(scores_NLD[2::3]).mean(axis=(0, 2), dtype=np.float64)
    np.testing.assert_allclose(found.subjects.layer_means_SL[2], means_L)
    best = found.subjects.best[0]
    assert (found.subject_names[best.subject], best.layer, best.row) == ("virology", 1, 7)


def test_logs_without_subjects_or_without_a_header_have_none(write_log, tmp_path, scores_NLD):
    ids = [f"own/{n}" for n in range(len(scores_NLD))]
    assert survey(write_log(tmp_path / "a.h5", scores_NLD, ids)).subjects is None
    found = survey(write_log(tmp_path / "b.h5", scores_NLD, header=False))
    assert found.subjects is None
    assert found.high.counts_LD.sum() > 0


def test_known_forms_of_ids():
    ids = [
        "high_school_us_history/test/17",
        "mmlu_test_high_school_us_history_3",
        "mmlu_validation_anatomy_0",
        "anatomy-1",
        "mmlu:anatomy/dev/4",
        "own question 7",
        "anatomy",
        "us_history-3",
        "anatomyx-3",
    ]
    names, subject_N = subjects_of(ids)
    assert names == ("anatomy", "high_school_us_history")
    assert subject_N.tolist() == [1, 1, 0, 0, 0, *[NO_SUBJECT] * 4]
    assert subjects_of(["anatomy-1", "anatomy-2"]) is None


def test_ids_of_the_probe_carry_their_subjects():
    questions = load_probe()
    names, subject_N = subjects_of([question.id for question in questions])
    assert [names[subject] for subject in subject_N] == [question.subject for question in questions]
