"""What selecting rows costs: reading the log, one selection, all strategies at once, and the straightforward way.

    python benchmarks/selection.py [--scale 1] [--work-dir DIR] [--parts read,select,quotas,plain,stability]
                                   [--plain-prompts 200] [--rounds 3] [--output FILE]

The log is made up, of the size of Llama-3.1-8B on full MMLU (14,042 prompts x 32 layers x 4,096 rows in half
precision, 3.4 GiB) and in the form that `loki analyse` writes; `--scale 0.1` makes a tenth of the prompts. It is read
once before anything is timed, so that all parts find it in the system's file cache as far as memory allows.

Every case runs in a process of its own, whose peak resident memory is its own; times are the best of the rounds, and
without the start of Python and imports. The time on the clock is what to compare; that of the processors, summed over
threads, tells whether other work on the machine was in the way. The straightforward way takes one prompt and layer
after the other: convert to float32, sort all rows, count a vote for the first k. It is timed on some prompts and
scaled up, and its votes are compared with ours on the same prompts. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from loki.choices import StrategyName
from loki.cli.kept_memory import keep_freed_memory
from loki.log import schema
from loki.log.assembly import Piece, write_log
from loki.log.reader import AttributionLog
from loki.log.schema import LogHeader
from loki.provenance import versions
from loki.selection.stability import stability
from loki.selection.strategies import STRATEGIES, Election, select, select_all
from loki.selection.votes import Ballot, count_votes

NUM_PROMPTS, NUM_LAYERS, NUM_ROWS = 14_042, 32, 4_096
QUOTAS = ("5", "10", "20", "30")
QUOTA = "10"
RESAMPLES = 10
WRITTEN_AT_ONCE = 64
VOTING: tuple[StrategyName, ...] = tuple(name for name in STRATEGIES if name != "random")


def make_log(path: Path, num_prompts: int, seed: int) -> None:
    """A log whose rows have scales of their own, over four orders of magnitude, and a leaning up or down."""
    header = LogHeader({}, "synthetic", "synthetic", {}, NUM_LAYERS, NUM_ROWS, dtype="float16", num_prompts=num_prompts)
    generator = np.random.default_rng(seed)
    scales_LD = np.exp(1.5 * generator.standard_normal((NUM_LAYERS, NUM_ROWS), np.float32)) * 1e-3
    leanings_LD = generator.standard_normal((NUM_LAYERS, NUM_ROWS), np.float32)

    def pieces() -> Iterator[Piece]:
        for start in range(0, num_prompts, WRITTEN_AT_ONCE):
            places = np.arange(start, min(start + WRITTEN_AT_ONCE, num_prompts))
            noise_NLD = generator.standard_normal((len(places), NUM_LAYERS, NUM_ROWS), np.float32)
            columns = {column.name: np.zeros(column.shape_in(header, len(places))) for column in schema.COLUMNS[1:]}
            yield places, {schema.SCORES: ((noise_NLD + leanings_LD) * scales_LD).astype(np.float16), **columns}

    unfinished = path.with_suffix(".part")
    ids = [f"prompt-{n}" for n in range(num_prompts)]
    write_log(unfinished, header, ids, np.arange(num_prompts), pieces())
    unfinished.rename(path)


def read_with_h5py(path: Path) -> None:
    """Nothing but reading, in pieces as large as ours."""
    with h5py.File(path) as file:
        scores = file[schema.SCORES]
        for start in range(0, len(scores), 128):
            scores[start : start + 128]


def read_chunks(path: Path) -> None:
    """Reading as `AttributionLog` does it for selections: every score checked."""
    with AttributionLog(path) as log:
        for _ in log.stored_chunks():
            pass


def select_one(path: Path) -> None:
    """One selection."""
    with AttributionLog(path) as log:
        select(log, QUOTA)


def select_many(path: Path) -> None:
    """All strategies that need a log, at all quotas, in one pass."""
    candidates_LD = np.ones((NUM_LAYERS, NUM_ROWS), dtype=bool)
    with AttributionLog(path) as log:
        select_all(log, [Election.of(name, quota, candidates_LD) for name in VOTING for quota in QUOTAS])


def resample(path: Path) -> None:
    """One selection, and how stable it is."""
    with AttributionLog(path) as log:
        stability(log, select(log, QUOTA), resamples=RESAMPLES)


def plain_votes(path: Path, num_prompts: int, kind: str | None) -> np.ndarray:
    """Votes (L, D) of the first prompts, each layer sorted by itself."""
    count = NUM_ROWS * int(QUOTA) // 100
    votes_LD = np.zeros((NUM_LAYERS, NUM_ROWS), dtype=np.int64)
    with h5py.File(path) as file:
        dataset = file[schema.SCORES]
        for n in range(num_prompts):
            scores_LD = dataset[n].astype(np.float32)
            for layer in range(NUM_LAYERS):
                votes_LD[layer, np.argsort(scores_LD[layer], kind=kind)[:count]] += 1
    return votes_LD


def our_votes(path: Path, num_prompts: int) -> np.ndarray:
    """Votes (L, D) of the first prompts as selections count them."""
    with h5py.File(path) as file:
        scores_NLD = file[schema.SCORES][:num_prompts].astype(np.float32)
    return count_votes([scores_NLD], [Ballot("layer", "lowest", NUM_ROWS * int(QUOTA) // 100)])[0].counts_LD


CASES: Mapping[str, Callable[[Path], None]] = {
    "read, h5py": read_with_h5py,
    "read, AttributionLog": read_chunks,
    "select": select_one,
    "select, one processor": select_one,
    "quotas": select_many,
    "stability": resample,
}
PLAIN: Mapping[str, str | None] = {"plain, stable": "stable", "plain, default": None}
PARTS = {
    "read": ("read, h5py", "read, AttributionLog"),
    "select": ("select", "select, one processor"),
    "quotas": ("quotas",),
    "plain": tuple(PLAIN),
    "stability": ("stability",),
}
LABELS = {
    "read, h5py": "reading only, h5py",
    "read, AttributionLog": "reading only, AttributionLog",
    "select": f"layer_balanced, q={QUOTA}",
    "select, one processor": f"layer_balanced, q={QUOTA}, one processor",
    "quotas": f"{len(VOTING)} strategies, q={','.join(QUOTAS)}",
    "plain, stable": "plain: stable argsort of each layer",
    "plain, default": "plain: numpy's default argsort",
    "stability": f"layer_balanced, q={QUOTA}, {RESAMPLES} resamples",
}


def measure(case: str, path: Path, rounds: int, plain_prompts: int) -> dict[str, Any]:
    """What one process finds out: best time and peak memory."""
    keep_freed_memory()  # as the command line does
    import torch  # the reader loads it when it meets half precision, which is not what is timed here

    if case.endswith("one processor"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
    with AttributionLog(path) as log:
        num_prompts = log.num_prompts
    found: dict[str, Any] = {}
    seconds, processor_seconds = [], []
    for _ in range(rounds):
        start, processor_start = time.perf_counter(), time.process_time()
        if case in PLAIN:
            votes_LD = plain_votes(path, plain_prompts, PLAIN[case])
        else:
            CASES[case](path)
        seconds.append(time.perf_counter() - start)
        processor_seconds.append(time.process_time() - processor_start)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    timed_prompts = plain_prompts if case in PLAIN else num_prompts
    found["timed_prompts"] = timed_prompts
    found["seconds"] = min(seconds) * num_prompts / timed_prompts
    found["ms_per_prompt"] = min(seconds) * 1e3 / timed_prompts
    found["processor_ms_per_prompt"] = min(processor_seconds) * 1e3 / timed_prompts
    found["peak_mib"] = int(status["VmHWM"].split()[0]) / 2**10
    if case in PLAIN:
        found["same_votes"] = bool((votes_LD == our_votes(path, plain_prompts)).all())
    return found


def in_a_process(case: str, path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a fresh process."""
    arguments = ("--rounds", options.rounds, "--plain-prompts", options.plain_prompts, "--case", case, "--log", path)
    command = [sys.executable, __file__, *map(str, arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(output)
    return found


def processor() -> str:
    """The processor's name as Linux tells it."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    """Make the log, measure, print, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the prompts")
    parser.add_argument("--work-dir", type=Path, default=Path("selection_benchmark"), help="folder of the log")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--plain-prompts", type=int, default=200, help="prompts that the plain way is timed on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the JSON into this file")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.log, options.rounds, options.plain_prompts)))
        return
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    num_prompts = max(1, round(options.scale * NUM_PROMPTS))
    options.plain_prompts = min(options.plain_prompts, num_prompts)

    options.work_dir.mkdir(parents=True, exist_ok=True)
    path = options.work_dir / f"synthetic_{num_prompts}x{NUM_LAYERS}x{NUM_ROWS}_seed{options.seed}.h5"
    if not path.exists():
        print(f"making {path} ...", flush=True)
        make_log(path, num_prompts, options.seed)
    with path.open("rb") as file:
        while file.read(2**24):
            pass

    found: dict[str, Any] = {
        "shape": [num_prompts, NUM_LAYERS, NUM_ROWS],
        "dtype": "float16",
        "quota": QUOTA,
        "processor": processor(),
        "num_processors": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "versions": {**versions(), "numpy": np.__version__, "h5py": h5py.__version__},
        "command": " ".join(["python", *sys.argv]),
        "cases": {},
    }
    print(f"{num_prompts:,} prompts x {NUM_LAYERS} layers x {NUM_ROWS:,} rows, {found['num_processors']} processors")
    print(f"{'':40} {'seconds':>9} {'ms/prompt':>10} {'processor':>10} {'x select':>9} {'peak MiB':>9}")
    cases: dict[str, dict[str, Any]] = found["cases"]
    for part in PARTS:
        for case in PARTS[part] if part in parts else ():
            cases[case] = in_a_process(case, path, options)
    for case, values in cases.items():
        ratio = f"{values['seconds'] / cases['select']['seconds']:9.2f}" if "select" in cases else ""
        print(
            f"{LABELS[case]:40} {values['seconds']:9.2f} {values['ms_per_prompt']:10.3f} "
            f"{values['processor_ms_per_prompt']:10.3f} {ratio:>9} {values['peak_mib']:9.0f}"
        )
    for case in PLAIN:
        if case in cases:
            same = "the same votes as ours" if cases[case]["same_votes"] else "other votes than ours"
            print(f"{LABELS[case]}: scaled up from {cases[case]['timed_prompts']} prompts; {same}")
    if "plain, stable" in cases and "select" in cases:
        found["times_faster"] = cases["plain, stable"]["seconds"] / cases["select"]["seconds"]
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
