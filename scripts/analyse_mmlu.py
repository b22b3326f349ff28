"""Attribute MMLU with the flags of the paper's public implementation, as a few lines over `loki analyse`.

Flags and defaults are those of `scripts/analyse_mmlu.py` in https://github.com/Nexround/LoKI: batches of 4, 50
questions of each of 56 subjects, seed 42, 7 steps of the trapezoid. `--steps` and `--ig_method` are flags of its
earlier releases; later it keeps the two as constants. Ours are `--force`, `--num_processes`, `--dataset`,
`--data_dir`, `--split` and `--subjects`, the draw of the 50 questions (there the first 50), scores in float32 (there
float16) and the dtype: float32 on a CPU, bfloat16 elsewhere (there always bfloat16). Any other option goes to
`loki analyse` as it is. docs/migrating.md says what differs, and why.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, get_args

from loki.choices import Rule, SplitName
from loki.cli.main import BAD_INPUT, INTERRUPTED, run

RULES = {rule: rule for rule in get_args(Rule)} | {"trapezoid": "riemann_trapezoid"}
CPU_PROCESSES = 2
"""Processes of `--parallel_mode data` where there is no GPU."""
NO_EFFECT = "accepted, has no effect: "


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as everywhere here."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with 2."""
        self.exit(BAD_INPUT, f"{self.prog}: {' '.join(message.split())}\n")


def main() -> None:
    """Translate the flags, then run `loki analyse` here or in several processes."""
    parser = make_parser()
    options, others = parser.parse_known_args()
    log = Path(options.output_dir) / options.result_file
    if options.force and options.write_mode == "a":
        parser.error("--force makes a log anew, --write_mode a goes on with it: give only one of them")
    if options.write_mode == "w" and log.exists() and not options.force:
        parser.error(
            f"{log} is there already: give --force to make it anew, --write_mode a to keep it, or another --result_file"
        )
    if options.parallel_mode == "model" and int(os.environ.get("WORLD_SIZE") or 1) > 1:
        parser.error(
            "--parallel_mode model spreads the model over the devices of one process: "
            "leave the launcher out, or give --parallel_mode data"
        )
    arguments = [*translate(options, log), *others]
    num_processes = processes_to_start(options)
    if num_processes > 1:
        launch(parser, arguments, num_processes)
    else:
        sys.argv = ["loki", *arguments]
        run()


def make_parser() -> Parser:
    """The flags of the public implementation, then ours."""
    parser = Parser(
        description="Attribute MMLU with the flags of the paper's public implementation.",
        epilog="Any other option goes to `loki analyse`, which has a --help of its own.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model_path", required=True, help="Hugging Face model folder, Hub id, or `embedded`")
    add("--model_type", help=f"{NO_EFFECT}the model's config.json says what it is")
    add("--output_dir", required=True, help="folder for the attribution log")
    add("--result_file", required=True, help="name of the attribution log, such as kva_mmlu.h5")
    add(
        "--write_mode",
        choices=("w", "a"),
        default="w",
        help="w: go on with an unfinished log, and replace a finished one with --force only; "
        "a: go on with an unfinished log, and keep a finished one (default: w)",
    )
    add(
        "--max_samples_per_subset",
        type=samples,
        default=50,
        help="at most so many questions of each subject, or all (default: 50)",
    )
    add("--batch_size", type=positive, default=4, help="prompts that go through the model together (default: 4)")
    add(
        "--parallel_mode",
        choices=("none", "data", "model"),
        default="none",
        help="data: share the prompts among processes, unless a launcher has started them already; "
        "model: spread the model over all devices (default: none)",
    )
    add("--steps", type=positive, default=7, help="nodes of the quadrature rule (default: 7)")
    add("--ig_method", choices=RULES, default="riemann_trapezoid", help="quadrature rule (default: riemann_trapezoid)")
    add("--use_flash_attention", action="store_true", help="flash attention for the prompt")
    add("--num_workers", type=int, help=f"{NO_EFFECT}prompts are read once, before the first is attributed")
    add("--log_interval", type=int, help=f"{NO_EFFECT}a progress bar shows speed and time left")
    add("--seed", type=int, default=42, help="seed of the drawn questions (default: 42)")
    ours = parser.add_argument_group("not in the public implementation")
    add = ours.add_argument
    add("--force", action="store_true", help="replace a finished log")
    add(
        "--num_processes",
        type=positive,
        help=f"processes of --parallel_mode data; as many as GPUs, {CPU_PROCESSES} without one, when left out",
    )
    add("--dataset", action="append", help="other prompts than mmlu; as in `loki analyse`")
    add("--data_dir", help="folder with MMLU as JSON Lines or CSV; the Hub when left out")
    add("--split", choices=get_args(SplitName), default="test", help="split of MMLU (default: test)")
    add("--subjects", default="56", help="56, all (57), or names with commas (default: 56)")
    return parser


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not possible: give a whole number from 1")
    return int(text)


def samples(text: str) -> int | None:
    """A whole number from 1, or None for `all`."""
    if text == "all":
        return None
    try:
        return positive(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or all") from None


def translate(options: argparse.Namespace, log: Path) -> list[str]:
    """The arguments of `loki` that do what the flags ask for."""
    values = {
        "--output": log,
        "--data-dir": options.data_dir,
        "--split": options.split,
        "--subjects": options.subjects,
        "--samples-per-subject": options.max_samples_per_subset,
        "--seed": options.seed,
        "--rule": RULES[options.ig_method],
        "--steps": options.steps,
        "--batch-size": options.batch_size,
        "--device-map": "auto" if options.parallel_mode == "model" else None,
    }
    switches = {
        "--use-flash-attention": options.use_flash_attention,
        # Only over a finished log: a replacement that was interrupted goes on when the same command is given again.
        "--force": options.force and log.exists(),
    }
    return [
        "analyse",
        options.model_path,
        *(part for name in options.dataset or ["mmlu"] for part in ("--dataset", name)),
        *(part for name, value in values.items() if value is not None for part in (name, str(value))),
        *(name for name, is_on in switches.items() if is_on),
    ]


def processes_to_start(options: argparse.Namespace) -> int:
    """1 where this process does the work: alone, or as one of those that `accelerate launch` or `torchrun` started."""
    launched = "WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if options.parallel_mode != "data" or launched:
        return 1
    if options.num_processes is not None:
        return int(options.num_processes)
    import torch

    return torch.accelerator.device_count() or CPU_PROCESSES


def launch(parser: Parser, arguments: Sequence[str], num_processes: int) -> None:
    """Run `loki` in several processes of this machine, as `torchrun --standalone` does, and exit with their code."""
    import torch
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The processes themselves say in one line what went wrong; the launcher would add a page.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // num_processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id="analyse_mmlu",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "loki", *arguments)
    except ChildFailedError as error:
        # When one fails the launcher ends the others by a signal, whose code is below 0.
        code = max(failure.exitcode for failure in error.failures.values())
        if code < 0:
            parser.exit(
                1,
                f"{parser.prog}: a process was killed by signal {-code} (9: often for want of memory); "
                "the same command goes on where it stopped\n",
            )
        sys.exit(code)
    except SignalException:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
