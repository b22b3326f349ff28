"""Is what a selection holds the work of a few rows? Loss of WikiText-2 with single rows at zero, and with all but them.

    loki study experiments/forgetting.yaml --data-dir data --only zero-highest-1 --only damage-q10
    python benchmarks/few_rows.py runs/forgetting/analyses/mmlu.h5 runs/forgetting/analyses/damage.h5 --data-dir data

The rows of greatest mean size in each log are set to zero one at a time. Those that alone cost more than `--least`
nats a token are then left out of what each strategy selects.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from loki.architecture import projections, shape_of
from loki.choices import StrategyName
from loki.evaluation.text import load_texts, measure, text_windows
from loki.log.reader import AttributionLog
from loki.models import load_model, load_tokenizer
from loki.selection.candidates import candidate_rows
from loki.selection.strategies import Election, select_all

STRATEGIES: tuple[StrategyName, ...] = (
    "global_highest",
    "global_lowest",
    "layer_balanced",
    "layer_highest_magnitude",
    "layer_balanced_magnitude",
    "random",
)
Row = tuple[int, int]
"""Layer and row."""


class Knockout:
    """A model whose rows can be set to zero and put back."""

    def __init__(self, windows: Sequence[torch.Tensor]) -> None:
        self.model = load_model("embedded", dtype="float32")
        weights = [projection.get_parameter("weight") for projection in projections(self.model).values()]
        self._weights_LDF = torch.stack([weight.detach() for weight in weights])
        for weight, held in zip(weights, self._weights_LDF, strict=True):
            weight.data = held
        self._windows = windows
        self.base = self._loss()

    def cost(self, rows: Sequence[Row]) -> float:
        """Nats a token that the text's loss rises by without these rows."""
        layers, places = map(list, zip(*rows, strict=True))
        before = self._weights_LDF[layers, places]
        self._weights_LDF[layers, places] = 0
        try:
            return self._loss() - self.base
        finally:
            self._weights_LDF[layers, places] = before

    def _loss(self) -> float:
        moved = [measure(self.model, ids_T) for ids_T in self._windows]
        return sum(part.loss for part in moved) / sum(part.num_tokens for part in moved)


def greatest(log_path: Path, count: int) -> list[Row]:
    """Rows of the greatest mean score, by size."""
    with AttributionLog(log_path) as log:
        size_LD = np.abs(log.mean_scores())
    return [divmod(int(place), size_LD.shape[1]) for place in np.argsort(-size_LD, axis=None)[:count]]


def main() -> None:
    """Single rows, then selections with and without the costly ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path, nargs="+", help="the first one is selected from")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=14, help="of each log")
    parser.add_argument("--quota", type=float, default=1)
    parser.add_argument("--least", type=float, default=0.05)
    parser.add_argument("--max-tokens", type=int, default=1000)
    chosen = parser.parse_args()
    tokenizer = load_tokenizer("embedded")
    texts = load_texts("wikitext2", chosen.data_dir, part="evaluation")
    windows = text_windows(tokenizer, "wikitext2", texts, 256, max_tokens=chosen.max_tokens)
    model = Knockout([ids_T for _, ids_T in windows])
    costs = {}
    for row in dict.fromkeys(row for path in chosen.logs for row in greatest(path, chosen.rows)):
        costs[row] = model.cost([row])
        print(f"layer {row[0]}, row {row[1]}: {costs[row]:+.3f} nats", flush=True)
    costly = {row for row, cost in costs.items() if cost > chosen.least}
    print(f"{len(costly)} of {len(costs)} cost more than {chosen.least:g} nats alone")
    shape = shape_of(model.model)
    elections = [
        Election.of(strategy, chosen.quota, candidate_rows(shape.num_layers, shape.num_rows)) for strategy in STRATEGIES
    ]
    with AttributionLog(chosen.logs[0]) as log:
        selections = select_all(log, elections)
    for strategy, selected in zip(STRATEGIES, selections, strict=True):
        rows = [(layer, row) for layer, held in enumerate(selected.rows.rows) for row in held]
        others = [row for row in rows if row not in costly]
        print(
            f"{strategy}, {chosen.quota:g} %: {len(rows)} rows {model.cost(rows):+.3f} nats, "
            f"without {len(rows) - len(others)} costly ones {model.cost(others):+.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
