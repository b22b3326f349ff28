"""Overlap of selections, and chance: against every possible draw, the distribution, and random draws."""

import json
import random
from fractions import Fraction
from itertools import combinations, product
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loki.architecture import Shape
from loki.errors import ArtefactError, InputError
from loki.rows import RowSelection
from loki.selection.overlap import load_comparable, moments_by_chance, overlap

SHAPE = Shape("llama", 2, 20, 24)


def chosen(*layers):
    return RowSelection.from_lists([list(layer) for layer in layers])


def drawn(num_rows, num_layers):
    """Selections of some of `num_rows` rows in each layer, at least one in all."""
    layer = st.sets(st.integers(0, num_rows - 1))
    return st.lists(layer, min_size=num_layers, max_size=num_layers).filter(any).map(lambda sets: chosen(*sets))


def enumerated(counts, num_rows):
    """Mean and variance over every possible draw, each as likely as the other."""
    draws = [list(combinations(range(num_rows), count)) for count in counts]
    sizes = [len(set.intersection(*map(set, sets))) for sets in product(*draws)]
    mean = Fraction(sum(sizes), len(sizes))
    return mean, Fraction(sum(size**2 for size in sizes), len(sizes)) - mean**2


def test_by_hand():
    """Layer 0: {0, 1, 2} and {1, 2, 5, 7} have 1, 2; layer 1: {4} and {3} nothing. D = 8.

    Chance: 3·4/8 + 1·1/8 = 1.625; variances 3·4·5·4/(8²·7) = 240/448 and 1·1·7·7/(8²·7) = 49/448, in all 289/448.
    """
    found = overlap([chosen([2, 0, 1], [4]), chosen([7, 5, 1, 2], [3])], 8)
    assert (found.total.counts, found.total.num_common, found.total.num_union) == ((4, 5), 2, 7)
    assert found.total.shares_percent == (50.0, 40.0)
    assert found.total.jaccard == pytest.approx(2 / 7)
    assert found.total.chance.expected == pytest.approx(1.625)
    assert found.total.chance.standard_deviation == pytest.approx((289 / 448) ** 0.5)
    assert found.total.z_score == pytest.approx(0.375 / (289 / 448) ** 0.5)
    first, second = found.layers
    assert (first.counts, first.num_common, first.num_union) == ((3, 4), 2, 5)
    assert first.shares_percent == pytest.approx((200 / 3, 50))
    assert first.chance.expected == pytest.approx(1.5)
    assert first.chance.standard_deviation == pytest.approx((240 / 448) ** 0.5)
    assert (second.num_common, second.jaccard, second.z_score) == (0, 0.0, pytest.approx(-0.125 / (49 / 448) ** 0.5))


def test_three_selections_by_hand():
    """Rows 1 and 3 are in all three; with D = 5 chance is 3·4·2/25 = 0.96 rows."""
    found = overlap([chosen([0, 1, 3]), chosen([1, 2, 3, 4]), chosen([1, 3])], 5).total
    assert (found.counts, found.num_common, found.num_union) == ((3, 4, 2), 2, 5)
    assert found.shares_percent == pytest.approx((200 / 3, 50, 100))
    assert found.chance.expected == pytest.approx(0.96)


@given(drawn(8, 3), drawn(8, 3))
def test_order_of_selections_does_not_matter(first, second):
    one, other = overlap([first, second], 8), overlap([second, first], 8)
    for there, back in zip((one.total, *one.layers), (other.total, *other.layers), strict=True):
        assert (there.num_common, there.num_union, there.chance) == (back.num_common, back.num_union, back.chance)
        assert there.jaccard == back.jaccard
        assert there.z_score == back.z_score
        assert there.shares_percent == back.shares_percent[::-1]


@given(st.lists(drawn(9, 2), min_size=3, max_size=3))
def test_counts_are_those_of_plain_sets(selections):
    pairs = [{(layer, row) for layer, rows in enumerate(s.rows) for row in rows} for s in selections]
    found = overlap(selections).total
    assert found.num_common == len(pairs[0] & pairs[1] & pairs[2])
    assert found.num_union == len(pairs[0] | pairs[1] | pairs[2])
    assert found.counts == tuple(map(len, pairs))
    assert found.chance is None
    assert found.z_score is None


@given(drawn(6, 2))
def test_a_selection_with_itself(selection):
    found = overlap([selection, selection], 6).total
    assert found.shares_percent == (100.0, 100.0)
    assert found.jaccard == 1.0


@pytest.mark.parametrize("counts", list(product(range(6), repeat=2)))
def test_chance_of_two_is_every_possible_draw(counts):
    assert moments_by_chance(counts, 5) == enumerated(counts, 5)


@pytest.mark.parametrize(
    ("counts", "num_rows"), [((2, 3, 1), 4), ((3, 3, 2), 4), ((1, 1), 1), ((1, 0), 1), ((1, 1, 2), 2)]
)
def test_chance_of_three_and_of_tiny_layers_is_every_possible_draw(counts, num_rows):
    assert moments_by_chance(counts, num_rows) == enumerated(counts, num_rows)


@given(st.integers(2, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.integers(0, n), st.just(n))))
def test_chance_of_two_is_hypergeometric(case):
    """Moments of the distribution itself: C(a, i)·C(D−a, b−i)/C(D, b)."""
    a, b, num_rows = case
    probabilities = [Fraction(comb(a, i) * comb(num_rows - a, b - i), comb(num_rows, b)) for i in range(min(a, b) + 1)]
    assert sum(probabilities) == 1
    mean = sum(i * p for i, p in enumerate(probabilities))
    assert moments_by_chance((a, b), num_rows) == (mean, sum(i * i * p for i, p in enumerate(probabilities)) - mean**2)


def test_chance_of_all_layers_is_that_of_random_draws():
    """4,000 draws of 3 selections; the tolerances are 4 standard errors."""
    generator, draws = random.Random(0), 4000
    counts = [(5, 8, 9), (2, 7, 6), (10, 1, 4)]
    sizes = []
    for _ in range(draws):
        selections = [chosen(*(generator.sample(range(12), layer[i]) for layer in counts)) for i in range(3)]
        found = overlap(selections, 12).total
        sizes.append(found.num_common)
    mean = sum(sizes) / draws
    variance = sum((size - mean) ** 2 for size in sizes) / (draws - 1)
    deviation = found.chance.standard_deviation
    assert mean == pytest.approx(found.chance.expected, abs=4 * deviation / draws**0.5)
    assert variance == pytest.approx(deviation**2, rel=4 * (2 / draws) ** 0.5)


def test_layers_without_rows_have_no_shares():
    empty, full = overlap([chosen([], [0, 1]), chosen([], [2, 3])], 4).layers
    assert (empty.counts, empty.shares_percent, empty.jaccard, empty.z_score) == ((0, 0), (None, None), None, None)
    assert full.shares_percent == (0.0, 0.0)


def test_where_chance_leaves_no_choice_there_is_no_z_score():
    found = overlap([chosen([0, 1, 2]), chosen([1, 2])], 3).total
    assert found.chance.expected == 2
    assert found.chance.standard_deviation == 0
    assert found.z_score is None


def test_as_json():
    found = overlap([chosen([0, 1], []), chosen([1, 2], [])], 4).as_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["total"] == {
        "counts": [2, 2],
        "num_common": 1,
        "shares_percent": [50.0, 50.0],
        "jaccard": 1 / 3,
        "chance": {"expected": 1.0, "standard_deviation": pytest.approx((1 / 3) ** 0.5), "z_score": 0.0},
    }
    assert [layer["counts"] for layer in found["layers"]] == [[2, 2], [0, 0]]
    assert overlap([chosen([0]), chosen([1])]).as_dict()["total"]["chance"] is None


def test_selections_that_cannot_be_compared():
    with pytest.raises(InputError, match="needs two selections or more, not 1"):
        overlap([chosen([0])])
    with pytest.raises(InputError, match="of 1 and 2 layers cannot be compared: give selections for one model"):
        overlap([chosen([0]), chosen([0], [1])])
    with pytest.raises(ArtefactError, match="layer 0 names row 4, but the model's rows are 0 to 3"):
        overlap([chosen([0]), chosen([4])], 4)


@pytest.fixture
def save(tmp_path):
    def write(name, layers=([0, 1], [2]), **log):
        path = tmp_path / name
        meta = {"log": {"model": {"architecture": "llama-2x20x24"}, "num_rows": 20} | log} if log else None
        chosen(*layers).save(path, meta=meta)
        return path

    return write


def test_rows_of_a_layer_come_from_provenance(save):
    plain, known = save("a.json"), save("b.json", num_rows=20)
    selections, num_rows = load_comparable([plain, known])
    assert selections == [RowSelection.load(plain), RowSelection.load(known)]
    assert num_rows == 20
    assert load_comparable([plain, plain])[1] is None
    assert load_comparable([plain, plain], num_rows=30)[1] == 30
    assert load_comparable([plain, plain], shape=SHAPE)[1] == 20
    assert load_comparable([plain, known], shape=SHAPE)[1] == 20


def test_provenance_of_a_log_without_header_tells_nothing(save, tmp_path):
    path = save("a.json")
    chosen([0, 1], [2]).save(path, meta={"strategy": "layer_balanced", "log": None})
    assert load_comparable([path, path])[1] is None


def test_files_of_different_models(save):
    known = save("a.json", num_rows=20)
    other = save("b.json", num_rows=24)
    family = save("c.json", model={"architecture": "qwen2-2x20x24"})
    plain = save("d.json")
    with pytest.raises(
        ArtefactError,
        match=r"different models cannot be compared: positions file .*a\.json says llama-2x20x24, 20 rows a layer; "
        r"positions file .*b\.json says llama-2x20x24, 24 rows a layer",
    ):
        load_comparable([known, plain, other])
    with pytest.raises(ArtefactError, match=r"llama-2x20x24, 20 rows a layer; .* says qwen2-2x20x24, 20 rows a layer"):
        load_comparable([plain, known, family])
    # `--num-rows` has no architecture; the files' own still have to agree.
    with pytest.raises(ArtefactError, match=r"llama-2x20x24, 20 rows a layer; .* says qwen2-2x20x24, 20 rows a layer"):
        load_comparable([known, family], num_rows=20)
    with pytest.raises(ArtefactError, match=r"--num-rows says 30 rows a layer; positions file .* says llama"):
        load_comparable([known, plain], num_rows=30)
    with pytest.raises(ArtefactError, match=r"--model says qwen2-2x20x24, 20 rows a layer; positions file .* says lla"):
        load_comparable([known, plain], shape=Shape("qwen2", 2, 20, 24))


def test_rows_of_different_projections_have_nothing_in_common(save):
    kva, old = save("a.json", settings={"rule": "riemann_left"}), save("b.json", num_rows=20)
    block, attention = (save(f"{name}.json", settings={"site_module": name}) for name in ("down_proj", "o_proj"))
    plain = save("c.json")
    assert load_comparable([kva, old, block, plain])[1] == 20
    assert load_comparable([attention, plain], shape=SHAPE)[1] == 20
    with pytest.raises(
        ArtefactError,
        match=r"^selections of different projections have no rows in common: positions file .*a\.json is of down_proj, "
        r"positions file .*o_proj\.json of o_proj; compare selections for one of them$",
    ):
        load_comparable([kva, plain, attention])


def test_files_that_do_not_fit(save, tmp_path):
    plain, longer = save("a.json"), save("b.json", ([0], [1], [2]))
    with pytest.raises(ArtefactError, match=r"a\.json has 2 layers, .*b\.json has 3: compare selections for one model"):
        load_comparable([plain, longer])
    with pytest.raises(ArtefactError, match=r"positions file .*a\.json: layer 1 names row 2, .* rows are 0 to 1"):
        load_comparable([plain, plain], num_rows=2)
    with pytest.raises(ArtefactError, match=r"positions file .*a\.json have 2 layers, the model has 3"):
        load_comparable([plain, plain], shape=Shape("llama", 3, 20, 24))
    with pytest.raises(InputError, match="1 positions file given: name two or more to compare"):
        load_comparable([plain])
    with pytest.raises(InputError, match="num-rows 0 is not possible: give the rows of one layer"):
        load_comparable([plain, plain], num_rows=0)
    with pytest.raises(InputError, match="--num-rows 20 and --model exclude each other"):
        load_comparable([plain, plain], num_rows=20, shape=SHAPE)
    with pytest.raises(ArtefactError, match=r"none\.json does not exist"):
        load_comparable([plain, tmp_path / "none.json"])


@pytest.mark.parametrize(
    "log", [{"num_rows": 20}, {"model": {}}, {"model": {}, "num_rows": None}, ["log"], {"model": 3}]
)
def test_damaged_provenance(save, log):
    path = save("a.json")
    chosen([0, 1], [2]).save(path, meta={"log": log})
    with pytest.raises(ArtefactError, match=r"a\.meta\.json does not say how many rows a layer has: select again"):
        load_comparable([path, path])
