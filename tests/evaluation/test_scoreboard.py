"""Before and after, task by task, and the forgetting score over what the base knew."""

import json
import math

import numpy as np
import pytest

from loki.errors import ArtefactError, InputError
from loki.evaluation.scoreboard import make_scoreboard, parse_percentage, read_baseline
from loki.evaluation.scores import ItemScores
from loki.results import Result


def scores(task, right, number=100, *, chance=25.0, ids=None, **changes):
    ids = ids or tuple(f"{task}-{index}" for index in range(number))
    values = {"metric": "acc", "scores": tuple(float(index < right) for index in range(number)), "chance": chance}
    return ItemScores(task=task, ids=ids, **{**values, **changes})


BEFORE = [scores("known", 80), scores("better", 50), scores("guessed", 30)]
AFTER = [scores("known", 60), scores("better", 55), scores("guessed", 10)]


def test_only_what_the_base_knew_counts():
    forgotten = make_scoreboard(AFTER, BEFORE).forgotten
    # (20/80 − 5/50)/2 with the gain, 20/80/2 without; 20 points lost and 5 won.
    assert forgotten.scores.score == pytest.approx(7.5)
    assert forgotten.scores.losses_only == pytest.approx(12.5)
    assert forgotten.points_lost == pytest.approx(7.5)
    assert (forgotten.counted, forgotten.left_out) == (("known", "better"), ("guessed",))


def test_what_is_learned_is_no_part_of_what_is_forgotten():
    learned = scores("calls", 50), scores("calls", 90)
    with_it = make_scoreboard([*AFTER, learned[1]], [*BEFORE, learned[0]], learned=["calls"])
    assert with_it.forgotten == make_scoreboard(AFTER, BEFORE).forgotten
    assert with_it.comparisons[-1].change.value == 40
    assert "chance" not in with_it.comparisons[-1].note
    assert make_scoreboard([learned[1]], [learned[0]], learned=["calls"]).forgotten is None


def test_the_interval_of_the_score_is_as_wide_as_its_error():
    """One task: relative loss 1 − ā/b̄; its standard error by the delta method, from 400 items."""
    draw = np.random.default_rng(1)
    before = (draw.random(400) < 0.7).astype(float)
    after = np.where(draw.random(400) < 0.2, 0.0, before)
    ids = tuple(map(str, range(400)))
    pair = [ItemScores("t", "acc", ids, tuple(values), chance=25.0) for values in (before, after)]
    forgotten = make_scoreboard(pair[1:], pair[:1]).forgotten
    ratio = after.mean() / before.mean()
    error = 100 * np.std(after - ratio * before, ddof=1) / math.sqrt(400) / before.mean()
    # 2,000 resamples know the ends of the interval to about 5 % of its width.
    assert forgotten.high - forgotten.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert forgotten.scores.score == pytest.approx(100 * (1 - ratio))
    assert forgotten.low < forgotten.scores.score < forgotten.high


def test_the_interval_pairs_items_by_id():
    before = scores("known", 60)
    turned = ItemScores("known", "acc", before.ids[::-1], before.scores[::-1], chance=25.0)
    forgotten = make_scoreboard([turned], [before]).forgotten
    assert (forgotten.low, forgotten.scores.score, forgotten.high) == (0, 0, 0)


def test_a_model_alone():
    board = make_scoreboard(AFTER, None)
    assert board.forgotten is None
    (known, _, guessed) = board.comparisons
    assert (known.before, known.change, known.after.value) == (None, None, 60)
    assert known.note == "acc; chance 25.0 %; model above chance"
    assert guessed.note == "acc; chance 25.0 %; model at chance"


def test_rows_of_the_table():
    losses = ItemScores("text_loss", "loss", ("a", "b"), (2.0, 4.0), "nats per token", False, weights=(1.0, 3.0))
    more = ItemScores("text_loss", "loss", ("a", "b"), (2.5, 4.5), "nats per token", False, weights=(1.0, 3.0))
    kl = ItemScores("text_kl", "kl", ("a", "b"), (0.1, 0.2), "nats per token", False)
    board = make_scoreboard([*AFTER, more, kl], [*BEFORE, losses])
    known, _, guessed, loss, divergence = board.comparisons
    assert (known.before.value, known.after.value, known.change.value, known.change.unit) == (80, 60, -20, "points")
    assert known.note.startswith("acc; chance 25.0 %; base above chance; 95 % interval of the change -28.0 … -1")
    assert "base at chance" in guessed.note
    assert (loss.before.value, loss.change.value, loss.higher_is_better) == (3.5, 0.5, False)
    assert loss.note == "loss; 95 % interval of the change +0.500 … +0.500"
    assert (divergence.before, divergence.change, divergence.note) == (None, None, "kl")
    assert board.forgotten.left_out == ("guessed",)


def test_no_task_above_chance():
    assert make_scoreboard([scores("guessed", 10)], [scores("guessed", 30)]).forgotten is None


def test_what_is_written_serves_as_a_baseline(tmp_path):
    board = make_scoreboard(AFTER, BEFORE)
    Result("evaluate", {}, board.figures(), board.comparisons).save(tmp_path / "r.json")
    assert read_baseline(tmp_path / "r.json", {}) == AFTER
    figures = json.loads((tmp_path / "r.json").read_text())["figures"]
    assert figures["forgetting"]["losses_only_percent"] == pytest.approx(12.5)
    assert figures["forgetting"]["by_benchmark_percent"] == pytest.approx({"known": 25, "better": -10})
    assert figures["intervals"]["known"]["low"] < -20 < figures["intervals"]["known"]["high"]


def test_baselines_that_do_not_fit(tmp_path):
    with pytest.raises(InputError, match="no score of task 'better', only of known: evaluate it on the same tasks"):
        make_scoreboard(AFTER, BEFORE[:1])
    with pytest.raises(InputError, match="'known' was scored on other items before than after"):
        make_scoreboard(AFTER[:1], [scores("known", 80, 90)])
    for kind, figures in (("train", {"scores": []}), ("evaluate", {"num_questions": 3})):
        Result(kind, {}, figures).save(tmp_path / "r.json")
        with pytest.raises(
            ArtefactError, match=r"r.json holds no scores of benchmarks: name what `loki evaluate MODEL"
        ):
            read_baseline(tmp_path / "r.json", {})
    Result("evaluate", {}, {"scores": [{"task": "t"}]}).save(tmp_path / "r.json")
    with pytest.raises(ArtefactError, match="no scores of single items"):
        read_baseline(tmp_path / "r.json", {})


def test_a_baseline_that_was_asked_in_another_way(tmp_path):
    figures = make_scoreboard(AFTER, None).figures()
    asked = {"tasks": ["known"], "local_data": True, "num_fewshot": None, "chat_template": False}
    Result("evaluate", {**asked, "num_fewshot": 5}, figures).save(tmp_path / "r.json")
    assert read_baseline(tmp_path / "r.json", {**asked, "num_fewshot": 5}) == AFTER
    assert read_baseline(tmp_path / "r.json", {**asked, "tasks": []}) == AFTER
    for name, value in (("num_fewshot", 0), ("num_fewshot", None), ("chat_template", True), ("local_data", False)):
        with pytest.raises(ArtefactError, match=rf"r.json was made with another .*{name} \(.*: give the same options"):
            read_baseline(tmp_path / "r.json", {**asked, "num_fewshot": 5, name: value})


@pytest.mark.parametrize(("text", "value"), [("1%", 1), ("0.5 %", 0.5), ("2", 2), (" 100%", 100), ("0", 0)])
def test_percentages(text, value):
    assert parse_percentage(text) == value


@pytest.mark.parametrize("text", ["", "%", "much", "-1%", "101%", "nan", "inf", "1%%"])
def test_no_percentages(text):
    with pytest.raises(InputError, match="is no percentage: give one from 0% to 100%, such as 1%"):
        parse_percentage(text)
