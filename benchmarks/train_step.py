"""What a training step costs, in seconds and memory: LoKI, other PEFT methods, and full fine-tuning.

    python benchmarks/train_step.py [--methods loki-q10,lora,…] [--parts time,memory,size] [--rounds 5] [--output FILE]

A step is forward, backward and AdamW on a batch of 4 x 256 tokens, all of them labelled, in float32. Times come from
one process that holds all methods and lets them take a step in turns, so that whatever else the machine does falls on
all of them; medians are compared. Methods that leave the base alone share it. Where other work takes the processors,
threads that wait for each other can make a step many times as long: there `--threads 1` compares better. Peak memory
is that of a process of its own for each method, without the peak of loading. Rows are drawn at random: which rows they
are changes no cost. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, OSFConfig, PeftConfig, PeftModel, ShiraConfig, get_peft_model
from torch import nn

from loki import LokiConfig
from loki.architecture import projections, shape_of
from loki.cli.kept_memory import keep_freed_memory
from loki.models import load_model, load_tokenizer, model_label
from loki.prompts.encoding import encode_prompt
from loki.prompts.prompt import question_prompt
from loki.prompts.questions import load_probe
from loki.provenance import versions
from loki.selection.quota import rows_for_quota

BATCH_SIZE, NUM_TOKENS = 4, 256
WARM_UP_STEPS, MEMORY_STEPS = 2, 2
LEARNING_RATE = 1e-5
BYTES_PER_WEIGHT = 4
SAME_LOSS = 1e-4
"""Relative; float32 products in another order differ less, and so do OSF's factors."""
FFN = ["gate_proj", "up_proj", "down_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", *FFN]
PARTS = ("time", "memory", "size")


class SplitLinear(nn.Module):
    """Active and frozen rows as two linear layers whose outputs are put in order: LoKI's other known form."""

    def __init__(self, linear: nn.Linear, rows: list[int]) -> None:
        super().__init__()
        frozen = sorted(set(range(linear.out_features)) - set(rows))
        self.active = nn.Parameter(linear.weight.detach()[rows].clone())
        self.frozen = nn.Parameter(linear.weight.detach()[frozen].clone(), requires_grad=False)
        self.register_buffer("order", torch.tensor([*rows, *frozen]).argsort())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs (…, D) of inputs (…, F)."""
        parts = torch.cat([nn.functional.linear(x, self.active), nn.functional.linear(x, self.frozen)], dim=-1)
        return parts.gather(-1, self.order.expand_as(parts))


def random_rows(model: nn.Module, quota: str) -> list[list[int]]:
    """As many rows of each layer as the quota gives."""
    shape, generator = shape_of(model), torch.Generator().manual_seed(0)
    count = rows_for_quota(quota, shape.num_rows)
    return [
        sorted(torch.randperm(shape.num_rows, generator=generator)[:count].tolist()) for _ in range(shape.num_layers)
    ]


def loki(model: nn.Module, quota: str, rank: int = 0) -> nn.Module:
    """Rows, or with a rank LoKI*."""
    return get_peft_model(model, LokiConfig(positions=random_rows(model, quota), r=rank, task_type="CAUSAL_LM"))


def split(model: nn.Module, quota: str) -> nn.Module:
    """Two linear layers for each down-projection."""
    model.requires_grad_(False)
    for (name, linear), rows in zip(projections(model).items(), random_rows(model, quota), strict=True):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, SplitLinear(linear, rows))
    return model


def full(model: nn.Module) -> nn.Module:
    """Everything."""
    return model.requires_grad_(True)


def by_peft(config: Callable[[], PeftConfig]) -> Callable[[nn.Module], nn.Module]:
    """One of PEFT's own methods."""
    return lambda model: get_peft_model(model, config())


def lora(targets: list[str], **options: Any) -> Callable[[nn.Module], nn.Module]:
    """LoRA of rank 16."""
    return by_peft(lambda: LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM", **options))


METHODS: Mapping[str, Callable[[nn.Module], nn.Module]] = {
    "loki-q10": lambda model: loki(model, "10"),
    "loki-q30": lambda model: loki(model, "30"),
    "loki-star": lambda model: loki(model, "30", rank=32),
    "full": full,
    "lora": lora(LINEAR),
    "lora-ffn": lora(FFN),
    "dora": lora(LINEAR, use_dora=True),
    "shira": by_peft(lambda: ShiraConfig(r=16, target_modules=LINEAR, random_seed=0, task_type="CAUSAL_LM")),
    "osf": by_peft(lambda: OSFConfig(target_modules=LINEAR, task_type="CAUSAL_LM")),
    "split-q10": lambda model: split(model, "10"),
    "split-q30": lambda model: split(model, "30"),
}
LABELS = {
    "loki-q10": "LoKI, q=10",
    "loki-q30": "LoKI, q=30",
    "loki-star": "LoKI*, q=30, r=32",
    "full": "full fine-tuning",
    "lora": "LoRA r=16, all linear layers",
    "lora-ffn": "LoRA r=16, FFN only",
    "dora": "DoRA r=16, all linear layers",
    "shira": "SHiRA r=16, all linear layers",
    "osf": "OSF, all linear layers",
    "split-q10": "two linear layers, q=10",
    "split-q30": "two linear layers, q=30",
}
LOKI = ("loki-q10", "loki-q30", "loki-star")
OWN_BASE = ("full", "osf", "split-q10", "split-q30")
"""Methods that change the base they are given, or its modules' weights."""


def batch(name: str) -> torch.Tensor:
    """Token ids (4, 256) from the questions of the built-in probe, one after the other."""
    tokenizer = load_tokenizer(name)
    ids_T = torch.cat([encode_prompt(tokenizer, question_prompt(question)).ids_T for question in load_probe()])
    return ids_T[: BATCH_SIZE * NUM_TOKENS].reshape(BATCH_SIZE, NUM_TOKENS)


def sharing_copy(model: nn.Module) -> nn.Module:
    """Modules of their own, but the same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


class Training:
    """A model and its optimiser."""

    def __init__(self, model: nn.Module, input_ids: torch.Tensor) -> None:
        self.model, self.input_ids = model.train(), input_ids
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE)

    @property
    def num_trained(self) -> int:
        """Trained weights."""
        return sum(parameter.numel() for parameter in self.trained)

    def step(self) -> float:
        """As every trainer does it; the loss before the step."""
        loss = self.model(input_ids=self.input_ids, labels=self.input_ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def times(base: nn.Module, methods: list[str], input_ids: torch.Tensor, rounds: int) -> dict[str, dict[str, Any]]:
    """Median, least and all seconds of a step, the processors' seconds, and the loss before the first step."""
    trainings: dict[str, Training] = {}
    found: dict[str, dict[str, Any]] = {}
    first_loss: dict[str, float] = {}
    for method in methods:
        try:
            own = copy.deepcopy(base) if method in OWN_BASE else sharing_copy(base)
            trainings[method] = Training(METHODS[method](own), input_ids)
            first_loss[method] = trainings[method].step()
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:  # another method's, not ours to mend
            trainings.pop(method, None)
            found[method] = {"failed": f"{type(error).__name__}: {error}"}
            print(f"{LABELS[method]}: cannot run: {type(error).__name__}: {error}", flush=True)
    # All methods start from the same function, or they are not set up as meant.
    for method, loss in first_loss.items():
        if abs(loss / statistics.median(first_loss.values()) - 1) > SAME_LOSS:
            print(f"{LABELS[method]}: starts from another loss, {loss:.4f}", flush=True)
    seconds: dict[str, list[float]] = {method: [] for method in trainings}
    processor_seconds: dict[str, list[float]] = {method: [] for method in trainings}
    for done in range(1 - WARM_UP_STEPS, rounds):
        for method, training in trainings.items():
            start, processor_start = time.perf_counter(), time.process_time()
            training.step()
            if done >= 0:
                seconds[method].append(time.perf_counter() - start)
                processor_seconds[method].append(time.process_time() - processor_start)
    for method, training in trainings.items():
        found[method] = {
            "num_trained": training.num_trained,
            "first_loss": first_loss[method],
            "seconds": statistics.median(seconds[method]),
            "least_seconds": min(seconds[method]),
            "processor_seconds": statistics.median(processor_seconds[method]),
            "all_seconds": [round(value, 3) for value in seconds[method]],
        }
    return found


def print_peak(model_name: str, method: str) -> None:
    """What `peak` asks of its process: MiB while training, without the peak of loading."""
    training = Training(METHODS[method](load_model(model_name, dtype="float32")), batch(model_name))
    Path("/proc/self/clear_refs").write_text("5")  # Linux only
    for _ in range(MEMORY_STEPS):
        training.step()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) / 2**10)


def peak(options: argparse.Namespace, method: str) -> float:
    """Peak resident memory of a process that trains, in MiB."""
    arguments = ["--model", options.model, "--threads", str(options.threads), "--peak", method]
    if options.keep_memory:
        arguments.append("--keep-memory")
    output = subprocess.run(
        [sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return float(output.split()[-1])


def adapter_bytes(base: nn.Module, method: str) -> dict[str, int]:
    """Size of the adapter's file, and that of its numbers alone."""
    model: PeftModel = METHODS[method](sharing_copy(base))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
    num_rows, num_columns = sum(map(len, model.peft_config["default"].positions)), shape_of(base).num_columns
    rank, num_layers = model.peft_config["default"].r, shape_of(base).num_layers
    weights = rank * (num_rows + num_layers * num_columns) if rank else num_rows * num_columns
    return {"adapter_bytes": size, "weights_bytes": weights * BYTES_PER_WEIGHT}


def judged(cases: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What LoKI should reach, as far as it was measured."""
    found = []

    def add(what: str, value: float, bound: float, *, at_least: bool) -> None:
        reached = value >= bound if at_least else value <= bound
        found.append({"what": what, "value": value, "bound": bound, "at_least": at_least, "reached": reached})

    def seconds(method: str) -> float | None:
        return cases.get(method, {}).get("seconds")

    for ours, other, bound in (
        ("loki-q10", "full", 1.6),
        ("loki-q30", "full", 1.6),
        ("loki-q10", "lora", 1.2),
        ("loki-q30", "lora", 1.15),
        ("loki-q10", "split-q10", 1.0),
        ("loki-q30", "split-q30", 1 / 1.1),
    ):
        ours_seconds, other_seconds = seconds(ours), seconds(other)
        if ours_seconds is not None and other_seconds is not None:
            what = f"{LABELS[ours]}: times faster than {LABELS[other]}"
            add(what, other_seconds / ours_seconds, bound, at_least=True)
    peaks = {method: values["peak_mib"] for method, values in cases.items() if "peak_mib" in values}
    others = [value for method, value in peaks.items() if method not in LOKI]
    for ours in LOKI:
        if ours in peaks and others:
            add(f"{LABELS[ours]}: peak memory by the least of the others", peaks[ours] / min(others), 1, at_least=False)
    for ours in LOKI:
        if "adapter_bytes" in cases.get(ours, {}):
            ratio = cases[ours]["adapter_bytes"] / cases[ours]["weights_bytes"]
            add(f"{LABELS[ours]}: adapter file by its weights alone", ratio, 1.01, at_least=False)
    return found


def processor() -> str:
    """The processor's name as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def print_table(cases: Mapping[str, Mapping[str, Any]]) -> None:
    """One line a method."""
    print(f"{'':30} {'weights':>12} {'s/step':>8} {'least':>8} {'CPU s':>8} {'MiB':>7} {'adapter MB':>11}")
    columns = (
        ("num_trained", "12,.0f", 1),
        ("seconds", "8.2f", 1),
        ("least_seconds", "8.2f", 1),
        ("processor_seconds", "8.2f", 1),
        ("peak_mib", "7.0f", 1),
        ("adapter_bytes", "11.2f", 1e6),
    )
    for method, values in cases.items():
        cells = [
            f"{values[name] / unit:{form}}" if name in values else " " * int(form.split(".")[0].rstrip(","))
            for name, form, unit in columns
        ]
        print(f"{LABELS[method]:30} {' '.join(cells)}")


def main() -> None:
    """Measure, print, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each method")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep-memory", action="store_true", help="tell the allocator to keep what is freed")
    parser.add_argument("--output", type=Path, help="also write the JSON into this file")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.keep_memory:
        keep_freed_memory()
    if options.peak:
        print_peak(options.model, options.peak)
        return
    methods, parts = options.methods.split(","), options.parts.split(",")
    for given, known, what in ((methods, METHODS, "methods"), (parts, PARTS, "parts")):
        if unknown := set(given) - set(known):
            parser.error(f"unknown {what} {', '.join(sorted(unknown))}: choose from {', '.join(known)}")

    found: dict[str, Any] = {
        "model": options.model,
        "label": model_label(options.model),
        "batch": [BATCH_SIZE, NUM_TOKENS],
        "dtype": "float32",
        "threads": options.threads,
        "processor": processor(),
        "num_processors": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "keep_memory": options.keep_memory,
        "versions": versions(),
        "command": " ".join(["python", *sys.argv]),
    }
    cases: dict[str, dict[str, Any]] = {method: {} for method in methods}
    if "memory" in parts:
        for method in methods:
            try:
                cases[method]["peak_mib"] = peak(options, method)
                print(f"{LABELS[method]}: peak {cases[method]['peak_mib']:.0f} MiB", flush=True)
            except subprocess.CalledProcessError:
                print(f"{LABELS[method]}: its process failed", flush=True)
    base = load_model(options.model, dtype="float32")
    if "size" in parts:
        for method in set(methods) & set(LOKI):
            cases[method] |= adapter_bytes(base, method)
    if "time" in parts:
        for method, values in times(base, methods, batch(options.model), options.rounds).items():
            cases[method] |= values
    found["cases"], found["targets"] = cases, judged(cases)
    print(f"{found['label']}, {BATCH_SIZE} x {NUM_TOKENS} tokens, float32, AdamW, threads: {options.threads}")
    print_table(cases)
    for target in found["targets"]:
        verdict = "reached" if target["reached"] else "NOT reached"
        sign = "at least" if target["at_least"] else "at most"
        print(f"{target['what']}: {target['value']:.3f} ({sign} {target['bound']:.3f}: {verdict})")
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
