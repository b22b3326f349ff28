"""How much the selected rows change with the prompts and the settings of an analysis.

    python benchmarks/overlap.py kva.h5 --samples-per-subject 5,10,20 --data-dir data   # fewer prompts of one log
    python benchmarks/overlap.py kva.h5 other.h5 third.h5                                # other settings

The first log is the reference. Overlap is the share of its selected rows (layer-balanced, the same quota) that the
other selection has too; chance is the quota itself. Prints a Markdown table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from loki.log.reader import AttributionLog
from loki.prompts.sources import DatasetSpec, load_datasets
from loki.rows import RowSelection
from loki.selection.overlap import overlap
from loki.selection.quota import format_quota, parse_quota, rows_for_quota
from loki.selection.strategies import winners
from loki.selection.votes import Ballot, count_votes


def select(
    log: AttributionLog, quotas: Sequence[Fraction], keep: Callable[[str], bool]
) -> tuple[int, list[RowSelection]]:
    """Rows that the kept prompts of a log choose at each quota, and how many prompts these are."""
    _, ids = log.prompts()
    kept = np.array([keep(prompt_id) for prompt_id in ids])

    def chunks() -> Iterator[np.ndarray]:
        start = 0
        for scores_NLD in log.chunks():
            chosen = kept[start : start + len(scores_NLD)]
            start += len(scores_NLD)
            if chosen.any():
                yield scores_NLD[chosen]

    ballots = [Ballot("layer", "lowest", rows_for_quota(quota, log.num_rows)) for quota in quotas]
    votes = count_votes(chunks(), ballots)
    selections = [RowSelection.from_lists(winners(*pair)) for pair in zip(votes, ballots, strict=True)]
    return int(kept.sum()), selections


def shares_percent(references: Sequence[RowSelection], others: Sequence[RowSelection]) -> list[float | None]:
    """At each quota, the share of the reference's rows over all layers that the other has too."""
    return [overlap(pair).total.shares_percent[0] for pair in zip(references, others, strict=True)]


def main() -> None:
    """Compare, print the table, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", type=Path)
    parser.add_argument("--quotas", default="5,10,20,30")
    parser.add_argument("--samples-per-subject", default="")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    quotas = [parse_quota(text) for text in options.quotas.split(",")]
    names = [format_quota(quota) for quota in quotas]
    found: dict[str, dict[str, float | None]] = {}
    with AttributionLog(options.logs[0]) as log:
        num_all, reference = select(log, quotas, lambda _: True)
        cases = [int(text) for text in options.samples_per_subject.split(",") if text]
        for count in cases:
            prompts = load_datasets(
                [DatasetSpec("mmlu")],
                data_dir=options.data_dir,
                split=options.split,
                samples_per_subject=count,
                seed=options.seed,
            )
            wanted = {prompt.id for prompt in prompts}
            num_prompts, rows = select(log, quotas, wanted.__contains__)
            assert num_prompts == len(wanted), f"the log has {num_prompts} of {len(wanted)} prompts"
            found[f"{count} a subject ({num_prompts:,} prompts)"] = dict(
                zip(names, shares_percent(reference, rows), strict=True)
            )
    for path in options.logs[1:]:
        with AttributionLog(path) as other:
            num_prompts, rows = select(other, quotas, lambda _: True)
            assert num_prompts == num_all, f"{path} has {num_prompts} prompts, the reference {num_all}"
            found[path.stem] = dict(zip(names, shares_percent(reference, rows), strict=True))

    print(
        f"| against {options.logs[0].stem} ({num_all:,} prompts) | " + " | ".join(f"q={name}" for name in names) + " |"
    )
    print("| --- |" + " ---: |" * len(names))
    for case, values in found.items():
        print(f"| {case} | " + " | ".join(f"{values[name]:.1f} %" for name in names) + " |")
    print(json.dumps({"reference": options.logs[0].stem, "num_prompts": num_all, "overlap_percent": found}))


if __name__ == "__main__":
    main()
