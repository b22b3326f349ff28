import json
import math

import numpy as np
import pytest
from tiny import make_model

from loki.dialling.adapter import DialledAdapter
from loki.dialling.budget import Budget, parse_budget
from loki.dialling.measure import Measured, Yardstick, perplexity_rise
from loki.dialling.run import Progress, dial
from loki.errors import ArtefactError, InputError

WAYS = ("scale", "layers", "rows")
WIDE = Budget(1e9, "kl")


@pytest.mark.parametrize("kind", ["rows", "product", "lora"])
def test_the_best_point_within_the_budget_is_set(dialled, yardstick, kind):
    adapter = dialled(kind)
    yard = yardstick(adapter)
    whole = yard.measure().kl
    budget = Budget(whole / 2, "kl")
    ways = WAYS if adapter.has_rows else WAYS[:2]
    found = dial(adapter, yard, budget, ways, num_points=3)
    within = [point for point in found.points if point.measured.kl <= whole / 2]
    assert found.chosen in within
    assert found.chosen.measured.task_loss == min(point.measured.task_loss for point in within)
    assert found.chosen.measured.task_loss < found.base.task_loss
    # What is set is what was measured.
    assert yard.measure() == found.chosen.measured
    # Four halvings of a gap of a third, on each curve that leaves the budget.
    for by in ways:
        positions = [point.position for point in found.points if point.by == by]
        assert positions == sorted(positions)
        assert len(positions) in (3, 7)
    assert found.gap_percent.keys() == {"gain", "damage"}


def test_points_are_what_their_settings_give(dialled, yardstick):
    adapter = dialled("rows")
    yard = yardstick(adapter)
    found = dial(adapter, yard, WIDE, ["scale"], num_points=2)
    assert [point.position for point in found.points] == [0.5, 1.0]
    adapter.set(np.full(adapter.num_units, 0.5))
    assert yard.measure() == found.points[0].measured
    assert found.points[1].measured == found.whole
    assert (found.kept(found.whole), found.kept(found.base)) == (100, 0)


def test_a_wide_budget_takes_nothing_back_and_a_narrow_one_everything(dialled, yardstick):
    adapter = dialled("rows")
    yard = yardstick(adapter)
    assert dial(adapter, yard, WIDE, ["scale"], num_points=1).scales_U.tolist() == [1] * 6
    found = dial(adapter, yard, Budget(1e-12, "kl"), ["scale", "rows"], num_points=1)
    assert found.scales_U.tolist() == [0] * 6
    assert found.figures()["chosen"]["gain_kept_percent"] == 0


def test_an_interrupted_dial_goes_on(dialled, yardstick, tmp_path, monkeypatch):
    adapter = dialled("rows")
    yard = yardstick(adapter)
    plain = dial(adapter, yard, Budget(0.05, "kl"), WAYS, num_points=2)
    calls = []
    real = Yardstick.measure

    def count(self, **options):
        calls.append(options["what"])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, **options)

    monkeypatch.setattr(Yardstick, "measure", count)
    path = tmp_path / "out.unfinished/points.json"
    with pytest.raises(KeyboardInterrupt):
        dial(adapter, yard, Budget(0.05, "kl"), WAYS, num_points=2, progress=Progress(path, {"a": 1}))
    again = dial(adapter, yard, Budget(0.05, "kl"), WAYS, num_points=2, progress=Progress(path, {"a": 1}))
    assert again.figures() == plain.figures()
    # Only the one that was interrupted is measured twice.
    assert len(calls) == len(set(calls)) + 1
    with pytest.raises(ArtefactError, match="is of a dial with other settings: give the same ones to go on, or remove"):
        Progress(path, {"a": 2})
    path.write_text("{")
    with pytest.raises(ArtefactError, match="is not JSON"):
        Progress(path, {"a": 1})


def test_an_adapter_that_does_not_help_is_refused(dialled, yardstick, tmp_path):
    adapter = dialled("rows")
    yard = yardstick(adapter)
    adapter.set(np.full(6, -1.0))
    adapter.save(tmp_path / "backwards")
    worse = DialledAdapter.load(make_model(), tmp_path / "backwards")
    with pytest.raises(InputError, match="the adapter does not help with these examples"):
        dial(worse, yardstick(worse), WIDE, ["scale"])
    with pytest.raises(InputError, match="--points 0 is not possible"):
        dial(adapter, yard, WIDE, ["scale"], num_points=0)


def test_figures_are_json(dialled, yardstick):
    adapter = dialled("lora")
    found = dial(adapter, yardstick(adapter), WIDE, ["scale", "layers"], num_points=1).figures()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["units"] == 6
    assert found["whole"]["gain_kept_percent"] == 100


def point(text_loss=3.0, kl=0.1):
    return Measured(1.0, text_loss, kl)


def test_a_budget_of_perplexity_and_one_of_divergence():
    base = point(3.0, 0.0)
    assert perplexity_rise(point(3.0 + math.log(1.02)), base) == pytest.approx(2)
    one = parse_budget("1%")
    assert one == Budget(1.0, "perplexity")
    assert one.allows(point(3.0 + math.log(1.0099), kl=9), base)
    assert not one.allows(point(3.0 + math.log(1.0101), kl=0), base)
    assert not one.allows(point(math.nan), base)
    nats = parse_budget(" .02 ")
    assert nats == Budget(0.02, "kl")
    assert nats.allows(point(9, kl=0.02), base)
    assert not nats.allows(point(3, kl=0.021), base)
    assert str(one) == "1 % of perplexity"


@pytest.mark.parametrize("text", ["", "0", "0%", "-1%", "much", "1%%", "inf", "nan", "1 percent"])
def test_budgets_that_are_not_possible(text):
    with pytest.raises(InputError, match="give a rise of the text's perplexity such as 1%, or a divergence"):
        parse_budget(text)
