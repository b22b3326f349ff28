"""What Knowledge Vector Attribution costs, in plain forward passes of the same prompt, and in memory.

    python benchmarks/kva.py [--model embedded] [--parts speed,oracles,length,steps,memory] [--rounds 7] [--plot FILE]

All times of a part come from one process and are taken in turns, so that whatever else the machine does falls on
all of them; medians are reported, and their ratios are what to read. A plain forward pass is
`model(input_ids, logits_to_keep=1)` under `torch.no_grad()` with the same dtype and threads. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from loki.analysis import recompute
from loki.analysis.attribution import attribute
from loki.analysis.path import Path as Nodes
from loki.analysis.settings import KVASettings
from loki.architecture import attribution_sites
from loki.cli.kept_memory import keep_compiled_kernels, keep_freed_memory
from loki.models import load_model, load_tokenizer, model_label
from loki.prompts.encoding import encode_prompt
from loki.prompts.prompt import question_prompt
from loki.prompts.questions import load_probe
from loki.provenance import versions

NUM_TOKENS, STEPS = 150, 7
LENGTHS = (64, 128, 256, 512, 1024, 2048)
STEP_COUNTS = (1, 3, 5, 7, 14, 28)
BATCH_SIZES = (1, 2, 4, 8)
MAX_BRANCHES = (16, 32, 64, 128, 211)
PARTS = ("speed", "oracles", "length", "steps", "memory")


def token_source(name: str) -> torch.Tensor:
    """Token ids of all questions of the built-in probe, one after the other."""
    tokenizer = load_tokenizer(name)
    return torch.cat([encode_prompt(tokenizer, question_prompt(question)).ids_T for question in load_probe()])


def prompts_of(tokens: torch.Tensor, num_prompts: int, num_tokens: int) -> torch.Tensor:
    """Different prompts (N, T) of one length."""
    starts = [(97 * n) % (len(tokens) - num_tokens) for n in range(num_prompts)]
    return torch.stack([tokens[start : start + num_tokens] for start in starts])


def in_turns(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each piece of work, after two runs to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for done in range(-2, rounds):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if done >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def plain(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """The unit of all costs."""
    with torch.no_grad():
        model(ids, logits_to_keep=1)


def speed(model: torch.nn.Module, tokens: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Seconds a prompt, alone and in batches, in float32 and bfloat16."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        works: dict[str, Callable[[], object]] = {
            "plain": lambda: plain(model, prompts_of(tokens, 1, NUM_TOKENS)),
        }
        for size in BATCH_SIZES:
            ids = prompts_of(tokens, size, NUM_TOKENS)
            works[f"batch of {size}"] = lambda ids=ids: attribute(model, ids, steps=STEPS, batch_size=len(ids))
        seconds = in_turns(works, rounds)
        unit = seconds.pop("plain")
        each = {name: value / size for (name, value), size in zip(seconds.items(), BATCH_SIZES, strict=True)}
        name = str(dtype).removeprefix("torch.")
        found[name] = {
            "plain_seconds": unit,
            "seconds_per_prompt": each,
            "forward_passes_per_prompt": {size: value / unit for size, value in each.items()},
        }
        for size, value in each.items():
            print(f"{name:>9}, {size:<10} {value:7.3f} s a prompt = {value / unit:5.2f} plain passes of {unit:.3f} s")
    model.float()
    return found


def oracles(model: torch.nn.Module, tokens: torch.Tensor, num_layers: int) -> dict[str, Any]:
    """How much faster than the plain definition and than Captum, and how equal; both on evenly spaced layers."""
    from captum.attr import LayerIntegratedGradients

    ids = prompts_of(tokens, 1, NUM_TOKENS)
    _, sites = attribution_sites(model, "auto")
    chosen = sorted({round(n * (len(sites) - 1) / max(1, num_layers - 1)) for n in range(num_layers)})
    scale = len(sites) / len(chosen)
    settings = KVASettings(steps=STEPS)
    for _ in range(2):
        result = attribute(model, ids, steps=STEPS)
    branch_seconds = in_turns({"branch": lambda: attribute(model, ids, steps=STEPS)}, 5)["branch"]
    target = int(result.target_ids[0])

    model.requires_grad_(False)
    start = time.perf_counter()
    some = [sites[layer] for layer in chosen]
    by_recompute = recompute.attribute_prompt(
        model, ids[0], some, Nodes.of(settings, completeness=False), settings, target
    ).scores_LD
    recompute_seconds = (time.perf_counter() - start) * scale

    class LastPosition(torch.nn.Module):
        """The target's probability as a function of one site's output at the last position only."""

        def __init__(self, site: torch.nn.Module) -> None:
            super().__init__()
            self.site, self.value = site, torch.nn.Identity()

        def forward(self, z_BD: torch.Tensor) -> torch.Tensor:
            value_BD = self.value(z_BD)
            handle = self.site.register_forward_hook(
                lambda _m, _i, out: torch.cat([out[:, :-1], value_BD[:, None]], dim=1)
            )
            try:
                logits_BV = model(ids.expand(len(z_BD), -1), logits_to_keep=1).logits[:, -1]
            finally:
                handle.remove()
            # In float32 the gradient of a softmax holds 1 − p, without digits where p is near 1.
            return logits_BV.double().softmax(-1)[:, target]

    activations: list[torch.Tensor] = []
    handles = [site.register_forward_hook(lambda _m, _i, out: activations.append(out[:, -1])) for site in some]
    plain(model, ids)
    for handle in handles:
        handle.remove()
    start = time.perf_counter()
    by_captum = []
    for site, z_1D in zip(some, activations, strict=True):
        wrapper = LastPosition(site)
        captum = LayerIntegratedGradients(wrapper, wrapper.value)
        scores = captum.attribute(z_1D, n_steps=STEPS, method="riemann_left", internal_batch_size=1)
        by_captum.append(scores[0].detach())
    captum_seconds = (time.perf_counter() - start) * scale
    model.requires_grad_(True)

    def distance(other_LD: torch.Tensor) -> float:
        ours_LD = result.scores[0, chosen]
        return float(((ours_LD - other_LD).norm(dim=-1) / other_LD.norm(dim=-1)).max())

    found = {
        "branch_seconds": branch_seconds,
        "timed_layers": chosen,
        "recompute_seconds": recompute_seconds,
        "captum_seconds": captum_seconds,
        "times_faster_than_recompute": recompute_seconds / branch_seconds,
        "times_faster_than_captum": captum_seconds / branch_seconds,
        "distance_to_recompute": distance(by_recompute),
        "distance_to_captum": distance(torch.stack(by_captum)),
    }
    for name in ("recompute", "captum"):
        print(
            f"{name:>9}: {found[f'{name}_seconds']:7.1f} s a prompt (from {len(chosen)} of {len(sites)} layers), "
            f"{found[f'times_faster_than_{name}']:.0f} times the branches'; "
            f"scores differ by {found[f'distance_to_{name}']:.1e}"
        )
    return found


def length(model: torch.nn.Module, tokens: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Cost over the prompt's length T."""
    return over(model, {t: (prompts_of(tokens, 1, t), STEPS) for t in LENGTHS}, rounds, "tokens")


def steps(model: torch.nn.Module, tokens: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Cost over the number of branches L·m."""
    ids, num_layers = prompts_of(tokens, 1, NUM_TOKENS), len(attribution_sites(model, "auto")[1])
    return over(model, {num_layers * m: (ids, m) for m in STEP_COUNTS}, rounds, "branches")


def over(model: torch.nn.Module, cases: dict[int, tuple[torch.Tensor, int]], rounds: int, what: str) -> dict[str, Any]:
    """Seconds and plain passes for each case."""
    found: dict[str, list[float]] = {what: list(cases), "seconds": [], "plain_seconds": []}
    for size, (ids, num_steps) in cases.items():
        works = {
            "plain": lambda ids=ids: plain(model, ids),
            "branch": lambda ids=ids, num_steps=num_steps: attribute(model, ids, steps=num_steps),
        }
        seconds = in_turns(works, rounds)
        found["seconds"].append(seconds["branch"])
        found["plain_seconds"].append(seconds["plain"])
        print(
            f"{size:>5} {what}: {seconds['branch']:7.3f} s = {seconds['branch'] / seconds['plain']:5.2f} "
            f"plain passes of {seconds['plain']:.3f} s"
        )
    return found


def memory(model_name: str) -> dict[str, Any]:
    """Peak memory of a process of its own for each case, in MiB."""

    def peak(*arguments: object) -> float:
        command = [sys.executable, __file__, "--model", model_name, "--peak", *map(str, arguments)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return float(output.split()[-1])

    found = {
        "plain": peak("plain"),
        "default": peak("default"),
        "batch of 4": peak("batch"),
        "max_branches": {str(count): peak(count) for count in MAX_BRANCHES},
    }
    print(
        f"peak memory: plain {found['plain']:.0f} MiB, default {found['default']:.0f} MiB, "
        f"in batches of 4 {found['batch of 4']:.0f} MiB"
    )
    for count, value in found["max_branches"].items():
        print(f"  --max-branches {count:>4}: {value:.0f} MiB")
    return found


def print_peak(model: torch.nn.Module, tokens: torch.Tensor, case: str) -> None:
    """What `memory` asks of each of its processes."""
    ids = prompts_of(tokens, 4 if case == "batch" else 1, NUM_TOKENS)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading the model; Linux only
    for _ in range(2):
        if case == "plain":
            plain(model, ids)
        else:
            count = int(case) if case.isdigit() else None
            attribute(model, ids, steps=STEPS, batch_size=len(ids), max_branches=count)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) / 2**10)


def plot(found: dict[str, Any], path: Path) -> None:
    """Cost over T and over L·m."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, part, what in ((axes[0], "length", "tokens"), (axes[1], "steps", "branches")):
        if part not in found:
            continue
        sizes: Sequence[float] = found[part][what]
        axis.plot(sizes, found[part]["seconds"], marker="o", label="attribution")
        axis.plot(sizes, found[part]["plain_seconds"], marker="o", label="plain forward pass")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("prompt length T in tokens" if part == "length" else f"branches L·m at T = {NUM_TOKENS}")
        axis.set_ylabel("seconds a prompt")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"{model_label(found['model'])}, float32, {found['threads']} threads", fontsize=10)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=3, help="how many layers the oracles are timed on")
    parser.add_argument("--plot", type=Path, help="draw cost over T and over L·m into this file")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")

    keep_freed_memory()
    keep_compiled_kernels()
    model, tokens = load_model(options.model, dtype="float32"), token_source(options.model)
    if options.peak:
        print_peak(model, tokens, options.peak)
        return
    found: dict[str, Any] = {
        "model": options.model,
        "num_tokens": NUM_TOKENS,
        "num_steps": STEPS,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "versions": versions(),
        "command": " ".join(["python", *sys.argv]),
    }
    works = {
        "speed": lambda: speed(model, tokens, options.rounds),
        "oracles": lambda: oracles(model, tokens, options.layers),
        "length": lambda: length(model, tokens, max(3, options.rounds // 2)),
        "steps": lambda: steps(model, tokens, max(3, options.rounds // 2)),
        "memory": lambda: memory(options.model),
    }
    for part in PARTS:
        if part in parts:
            found[part] = works[part]()
    if options.plot:
        plot(found, options.plot)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
