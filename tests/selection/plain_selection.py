"""Votes and strategies in nothing but sorting of Python lists and exact fractions: the oracle of the tests here."""

from fractions import Fraction

LAYER_STRATEGIES = (
    *("layer_balanced", "layer_balanced_magnitude", "adaptive", "capped"),
    *("layer_highest", "layer_highest_magnitude"),
)
MODEL_STRATEGIES = ("global_lowest", "global_highest")
VOTING_STRATEGIES = LAYER_STRATEGIES + MODEL_STRATEGIES


def plain_groups(candidates, scope):
    """Places (layer, row) that compete with each other; layers without candidates make no group."""
    layers = [[(layer, row) for row, stands in enumerate(rows) if stands] for layer, rows in enumerate(candidates)]
    if scope == "model":
        return [[place for places in layers for place in places]]
    return [places for places in layers if places]


def plain_ballot(prompt, group, count, *, highest=False, magnitude=False):
    """The places of a group that one prompt votes for; none if all its scores there are equal."""
    score = {place: abs(prompt[place[0]][place[1]]) if magnitude else prompt[place[0]][place[1]] for place in group}
    if len(set(score.values())) == 1:
        return []
    ascending = sorted(group, key=lambda place: (score[place], place))
    if highest:
        ascending = sorted(group, key=lambda place: (-score[place], -place[0], -place[1]))
    return ascending[:count]


def plain_count(quota, strategy, candidates):
    """Rows of each layer with candidates, or of all of them together."""
    num_rows = len(candidates[0])
    num_layers = sum(map(any, candidates))
    return Fraction(quota) * (num_rows if strategy in LAYER_STRATEGIES else num_layers * num_rows) // 100


def plain_adaptive_counts(mean_magnitudes, candidates, count):
    """One row at a time to the layer that it puts the smallest share of its sum at risk in.

    Every layer begins with half of `count`, rounded up, and ends at twice `count` or when it has no more candidates;
    where shares are equal, the layer that has fewer is served first, then the lower one.
    """
    layers = [layer for layer, rows in enumerate(candidates) if any(rows)]
    ascending = {
        layer: sorted(value for value, stands in zip(mean_magnitudes[layer], candidates[layer], strict=True) if stands)
        for layer in layers
    }
    counts = [0] * len(candidates)
    for layer in layers:
        counts[layer] = -(-count // 2)

    def risk_of_one_more(layer):
        total = sum(mean_magnitudes[layer])
        return sum(ascending[layer][: counts[layer] + 1]) / total if total else Fraction(0)

    while sum(counts) < count * len(layers):
        open_layers = [layer for layer in layers if counts[layer] < min(2 * count, len(ascending[layer]))]
        counts[min(open_layers, key=lambda layer: (risk_of_one_more(layer), counts[layer], layer))] += 1
    return counts


def plain_capped(means, candidates, count):
    """One row at a time, the lowest mean of all layers that have given fewer than twice `count`."""
    selected = [[] for _ in candidates]
    for _ in range(count * sum(map(any, candidates))):
        open_places = [
            (layer, row)
            for layer, row in plain_groups(candidates, "model")[0]
            if row not in selected[layer] and len(selected[layer]) < 2 * count
        ]
        layer, row = min(open_places, key=lambda place: (means[place[0]][place[1]], place))
        selected[layer].append(row)
    return [sorted(rows) for rows in selected]


def plain_selection(scores_NLD, quota, strategy, candidates=None):
    """The rows of each layer, from scores and candidates as nested lists."""
    num_layers, num_rows = len(scores_NLD[0]), len(scores_NLD[0][0])
    candidates = candidates or [[True] * num_rows] * num_layers
    highest = strategy in ("layer_highest", "layer_highest_magnitude", "global_highest")
    magnitude = strategy in ("layer_balanced_magnitude", "adaptive", "layer_highest_magnitude")
    sign = -1 if highest else 1
    num_prompts = len(scores_NLD)
    means = [
        [
            sum(Fraction(abs(p[layer][row]) if magnitude else p[layer][row]) for p in scores_NLD) / num_prompts
            for row in range(num_rows)
        ]
        for layer in range(num_layers)
    ]
    count = plain_count(quota, strategy, candidates)
    if strategy == "capped":
        return plain_capped(means, candidates, count)
    counts = plain_adaptive_counts(means, candidates, count) if strategy == "adaptive" else [count] * num_layers
    selected = [[] for _ in range(num_layers)]
    for group in plain_groups(candidates, "layer" if strategy in LAYER_STRATEGIES else "model"):
        votes = dict.fromkeys(group, 0)
        for prompt in scores_NLD:
            for place in plain_ballot(prompt, group, count, highest=highest, magnitude=magnitude):
                votes[place] += 1
        best = sorted(group, key=lambda p: (-votes[p], sign * means[p[0]][p[1]], sign * p[0], sign * p[1]))
        for layer, row in best[: counts[group[0][0]]]:
            selected[layer].append(row)
    return [sorted(rows) for rows in selected]
