"""Two skills on rows of their own: learned apart, merged together, and uninstalled again.

    python benchmarks/two_skills.py --data-dir data [--work-dir runs/two_skills] [--output results/two_skills.json]

Skill a is function calling (BFCL), skill b is reranking (SciFact). Each trains a tenth of the rows of every layer,
drawn at random, b none of a's. Made of the two adapters by `merge` and `uninstall` are: the base with one skill, with
both in either order and in one go, with both less either one, and with none again. What must be the same model is
compared bit for bit; a difference stops the run. Every model that is different is scored on both tasks: a task's own
score, and the loss of training-set answers that were not trained on.

The same command goes on where it was interrupted. Models take eight times the base's size in the work folder until they
are scored. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from loki.architecture import shape_of_config
from loki.evaluation.completions import completion_losses
from loki.evaluation.scores import ItemScores, compare
from loki.implanting.checkpoint import find_folder, open_checkpoint
from loki.implanting.merge import merge
from loki.implanting.uninstall import uninstall
from loki.models import load_config, load_model, load_tokenizer, model_label
from loki.progress import silent
from loki.provenance import read_json, write_json
from loki.results import Result, finite
from loki.rows import RowSelection
from loki.selection.run import Constraints, Request, select_to_files
from loki.study.settings import TaskName, TaskSection
from loki.study.tasks import Task, load_task
from loki.training.settings import TrainSettings
from loki.training.sft import load_record, train

KIND = "two-skills"
SKILLS: Mapping[str, TaskName] = {"a": "function-calling", "b": "reranking"}
MODELS = ("a", "b", "a-then-b", "b-then-a", "at-once", "both-less-a", "both-less-b", "both-less-both")
SAME_AS = {
    "b-then-a": "a-then-b",
    "at-once": "a-then-b",
    "both-less-a": "b",
    "both-less-b": "a",
    "both-less-both": "base",
}
"""Models that must be others, bit for bit."""
SCORED = ("base", "a", "b", "a-then-b")
LABELS = {
    "base": "base",
    "a": "function calling alone",
    "b": "reranking alone",
    "a-then-b": "both",
    "b-then-a": "both, merged the other way round",
    "at-once": "both, merged by one command",
    "both-less-a": "both, function calling uninstalled",
    "both-less-b": "both, reranking uninstalled",
    "both-less-both": "both, both uninstalled",
}
NOT_SETTINGS = ("data_dir", "work_dir", "output", "threads")


class Work:
    """The folder of one experiment: what is there already is not made again."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, options.work_dir
        self.settings = {name: value for name, value in vars(options).items() if name not in NOT_SETTINGS}
        known = self.folder / "settings.json"
        if known.exists() and read_json(known, what="settings") != self.settings:
            raise SystemExit(f"{self.folder} has work of other settings: remove it, or choose another --work-dir")
        write_json(known, self.settings)

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` found out, kept in a file."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            start = time.perf_counter()
            found = make()
            write_json(path, {**found, "seconds": round(time.perf_counter() - start, 1)})
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        return dict(read_json(path, what=name))

    def positions(self, skill: str) -> Path:
        """Positions file of a skill."""
        return self.folder / f"rows_{skill}.json"

    def adapter(self, skill: str) -> Path:
        """Adapter folder of a skill."""
        return self.folder / f"adapter_{skill}"

    def model(self, name: str) -> str:
        """Where a model is, or will be."""
        return str(self.options.model) if name == "base" else str(self.folder / f"model_{name}")


def draw_rows(work: Work) -> dict[str, int]:
    """Rows for each skill, the second one's without the first one's; how many there are, and how many are in both."""
    shape = shape_of_config(load_config(work.options.model))
    first, second = (work.positions(skill) for skill in SKILLS)
    for path, exclude in ((first, ()), (second, (first,))):
        constraints = Constraints(exclude=exclude, seed=work.options.seed)
        select_to_files(None, [Request(path, work.options.quota, "random")], constraints, shape=shape)
    chosen = [RowSelection.load(path) for path in (first, second)]
    shared = sum(len(set(a) & set(b)) for a, b in zip(chosen[0].rows, chosen[1].rows, strict=True))
    return {"a": chosen[0].num_selected, "b": chosen[1].num_selected, "in_both": shared}


def tasks_of(options: argparse.Namespace) -> dict[str, Task]:
    """Both tasks, ready for the model's tokenizer."""
    tokenizer = load_tokenizer(options.model)
    found = {}
    for skill, name in SKILLS.items():
        section = TaskSection(
            name=name,
            examples=options.steps * options.batch_size,
            held_out=options.held_out,
            requests=options.requests if name == "function-calling" else options.queries,
            max_tokens=options.max_tokens,
            max_new_tokens=options.max_new_tokens,
            passage_tokens=options.passage_tokens,
        )
        found[skill] = load_task(section, options.data_dir, tokenizer, batch_size=options.reply_batch_size)
    return found


def learn(work: Work, skill: str, task: Task) -> dict[str, Any]:
    """Train a skill's rows, unless its adapter is there."""
    options, adapter = work.options, work.adapter(skill)
    if not adapter.exists():
        settings = TrainSettings(
            learning_rate=options.learning_rate,
            steps=options.steps,
            batch_size=options.batch_size,
            warmup_steps=options.warmup_steps,
            seed=options.seed,
            scale_learning_rate=False,
            save_every=20,
            mixed_precision=options.mixed_precision,
        )
        torch.manual_seed(options.seed)
        model = load_model(options.model, dtype="float32", device="cpu")
        rows = RowSelection.load(work.positions(skill))
        train(model, load_tokenizer(options.model), rows, task.examples, settings, adapter)
    record = load_record(adapter)
    assert record is not None, f"{adapter} has no record"
    return {"num_trainable": record["num_trainable"], "log": record["log"]}


def make_model(work: Work, name: str) -> dict[str, Any]:
    """Write a model, and say what its bits are."""
    folder = Path(work.model(name))
    shutil.rmtree(folder, ignore_errors=True)
    a, b = (work.adapter(skill) for skill in SKILLS)
    model, both = work.model, work.model("a-then-b")
    base = model("base")
    makers: dict[str, Callable[[], object]] = {
        "a": lambda: merge(base, a, folder),
        "b": lambda: merge(base, b, folder),
        "a-then-b": lambda: merge(model("a"), b, folder),
        "b-then-a": lambda: merge(model("b"), a, folder),
        "at-once": lambda: merge(base, [a, b], folder),
        "both-less-a": lambda: uninstall(a, both, base, folder, strict=True),
        "both-less-b": lambda: uninstall(b, both, base, folder, strict=True),
        "both-less-both": lambda: uninstall(a, model("both-less-b"), base, folder, strict=True),
    }
    report = makers[name]()
    return {"bits": bits_of(work.model(name)), "report": vars(report)}


def bits_of(model: str) -> str:
    """SHA-256 of every tensor's name, dtype, shape and bytes."""
    hasher = hashlib.sha256()
    for name, stored in sorted(open_checkpoint(find_folder(model)).tensors.items()):
        hasher.update(f"{name}:{stored.dtype_name}:{stored.shape}".encode())
        for piece in stored.raw():
            hasher.update(piece)
    return hasher.hexdigest()


def score(work: Work, name: str, tasks: Mapping[str, Task]) -> dict[str, Any]:
    """Item scores of a model on both tasks: losses in float32, answers in `--dtype`."""
    tokenizer = load_tokenizer(work.options.model)
    model = load_model(work.model(name), dtype="float32", device="cpu")
    scores = []
    for skill, task in tasks.items():
        losses = completion_losses(model, tokenizer, task.held_out)
        ids = tuple(map(str, range(len(losses))))
        scores.append(ItemScores(f"{SKILLS[skill]}_loss", "loss", ids, tuple(losses), "nats per token", False))
    model = load_model(work.model(name), dtype=work.options.dtype, device="cpu")
    for task in tasks.values():
        scores += task.score(model, tokenizer, silent)
    return {"scores": [finite(found.as_dict()) for found in scores]}


def own_scores(found: Mapping[str, Any]) -> dict[str, dict[str, ItemScores]]:
    """Of each skill its loss and its task's own score."""
    scores = {values["task"]: ItemScores.from_dict(values) for values in found["scores"]}
    names = {"a": ("function-calling_loss", "bfcl_calls"), "b": ("reranking_loss", "scifact_ndcg@10")}
    return {skill: {name: scores[name] for name in chosen} for skill, chosen in names.items()}


def changes(scores: Mapping[str, Mapping[str, Mapping[str, ItemScores]]], before: str, after: str) -> dict[str, Any]:
    """Changes of both skills' scores between two models, paired by item, with 95 % intervals."""
    found = {}
    for skill, chosen in scores[before].items():
        for name, values in chosen.items():
            difference = compare(values, scores[after][skill][name])
            found[name] = {**asdict(difference.change), "low": difference.low, "high": difference.high}
    return found


def carry_out(options: argparse.Namespace) -> Result:
    """All parts, each as far as it is not done yet."""
    work = Work(options)
    rows = work.once("rows", lambda: dict(draw_rows(work)))
    assert rows["in_both"] == 0, f"{rows['in_both']} rows are in both skills"
    tasks = tasks_of(options)
    learned = {skill: work.once(f"learned_{skill}", lambda s=skill: learn(work, s, tasks[s])) for skill in SKILLS}
    found = {"base": work.once("bits_base", lambda: {"bits": bits_of(options.model)})}
    kept: dict[str, dict[str, Any]] = {}
    for name in ("base", *MODELS):
        if name != "base":
            found[name] = work.once(f"made_{name}", lambda n=name: make_model(work, n))
            same = SAME_AS.get(name)
            if same is not None and found[name]["bits"] != found[same]["bits"]:
                raise SystemExit(f"{LABELS[name]} is not bit for bit {LABELS[same]}: see {work.folder}")
    # Only now: a model is the beginning of others.
    for name in SCORED:
        kept[name] = work.once(f"scored_{name}", lambda n=name: score(work, n, tasks))
    for name in MODELS:
        shutil.rmtree(work.model(name), ignore_errors=True)
    scores = {name: own_scores(values) for name, values in kept.items()}
    figures = {
        "rows": {name: rows[name] for name in ("a", "b", "in_both")},
        "learned": learned,
        "same_bits": {LABELS[name]: LABELS[same] for name, same in SAME_AS.items()},
        "models": {name: {"bits": values["bits"], **values.get("report", {})} for name, values in found.items()},
        "scores": {
            name: {task: asdict(values.mean) for chosen in skills.values() for task, values in chosen.items()}
            for name, skills in scores.items()
        },
        "changes": {
            "learned by a": changes(scores, "base", "a"),
            "learned by b": changes(scores, "base", "b"),
            "by b on top of a": changes(scores, "a", "a-then-b"),
            "by a on top of b": changes(scores, "b", "a-then-b"),
        },
        "seconds": {name: values["seconds"] for name, values in {**learned, **kept}.items()},
    }
    return Result(KIND, work.settings, figures, seed=options.seed, model=model_label(options.model))


def print_table(figures: Mapping[str, Any]) -> None:
    """One line a model, as Markdown; models of the same bits have the same scores."""
    names = list(figures["scores"]["base"])
    print("| model | " + " | ".join(names) + " |")
    print("| --- |" + " ---: |" * len(names))
    for name in ("base", *MODELS):
        values = figures["scores"][SAME_AS.get(name, name)]
        print(f"| {LABELS[name]} | " + " | ".join(f"{values[task]['value']:.3f}" for task in names) + " |")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="holds toolcall/bfcl_… and rerank/scifact_…")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/two_skills"))
    parser.add_argument("--output", type=Path, default=Path("results/two_skills.json"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--quota", default="10", help="percent of each layer's rows, for each skill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--warmup-steps", type=int, default=4)
    parser.add_argument("--mixed-precision", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--held-out", type=int, default=30, help="examples of each task whose loss is taken")
    parser.add_argument("--requests", type=int, default=100, help="of the function-calling test")
    parser.add_argument("--queries", type=int, default=30, help="of the reranking test, 20 passages each")
    parser.add_argument("--max-tokens", type=int, default=256, help="longer requests are left out")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--passage-tokens", type=int, default=64)
    parser.add_argument("--reply-batch-size", type=int, default=50)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="in which tasks are scored"
    )
    return parser.parse_args(arguments)


def main() -> None:
    """Go through all parts, print, and end with one line of JSON."""
    options = parse()
    torch.set_num_threads(options.threads)
    transformers_logging.disable_progress_bar()
    result = carry_out(options)
    result.save(options.output)
    print_table(result.figures)
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
