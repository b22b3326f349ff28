"""Benchmarks scored by lm-eval, item by item: offline on a data folder, or the harness' own tasks from the Hub."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loki.errors import InputError
from loki.evaluation.benchmarks.checks import CHECKS, is_checkable
from loki.evaluation.benchmarks.rows import group_of, load_examples, load_rows, sample
from loki.evaluation.benchmarks.table import BENCHMARKS, Kind, expand, find, known_names
from loki.evaluation.scores import ItemScores
from loki.evaluation.stored import Store, answer_all
from loki.progress import Track, silent
from loki.prompts.parts import PartName, part_of
from loki.provenance import digest, fingerprint_model

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from loki.evaluation.language_model import LanguageModel

ITEMS_AT_ONCE: Mapping[Kind, int] = {"loglikelihood": 48, "generation": 16}
"""After so many items what is done is written down."""
MAX_NEW_TOKENS = 256
"""Of a reply where a task does not say; lm-eval's own."""
METRICS = ("acc_norm", "acc", "exact_match", "prompt_level_strict_acc", "pass@1", "em", "f1")
"""What counts in a task of the harness that is not in our table: the first of these that it scores by item."""
FLEXIBLE = "flexible-extract"
CODE_TASKS = ("humaneval",)
"""Those that run what the model wrote."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HarnessSettings:
    """Everything besides model and items that could change a score."""

    limit: int | None = None
    """Items drawn of each task; all when None."""
    seed: int = 0
    """Of that draw."""
    part: PartName | None = None
    """One half of each data set, by id; both when None."""
    max_new_tokens: int | None = None
    """At most so many tokens of a reply; each task's own number when None."""
    num_fewshot: int | None = None
    """Solved problems in front of each question; each task's own number when None."""
    chat_template: bool = False
    """Whether a question is put as a message of the model's chat template; the harness' default is plain text."""


@dataclass(frozen=True)
class _Task:
    """A task made ready: which items are asked, and how."""

    name: str
    metric: str
    kind: Kind
    ids: tuple[str, ...]
    chance: float | None
    contents: str
    """Digest of the items and of how they are put."""
    score: Callable[[LanguageModel, Sequence[str]], list[float]]
    """Model and ids to what it got on each, from 0 to 1."""


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    data_dir: str | Path | None,
    limit: int | None = None,
    seed: int = 0,
    part: PartName | None = None,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    allow_code_execution: bool = False,
    folder: Path | None = None,
    track: Track = silent,
) -> list[ItemScores]:
    """Score a model on benchmarks of `BENCHMARKS` and `GROUPS`, in the order in which they are named.

    With `data_dir` nothing is fetched; without it the harness' own tasks are taken from the Hub, any that it has.
    With `folder` each task's scores are written there as they come, and the same call goes on where it stopped.

    Raises:
        InputError: lm-eval is missing, an unknown task, data that cannot be used, a number that is not possible, or
            code to be run without `allow_code_execution`.
        ArtefactError: `folder` holds scores of another model, of other items or with other settings.
    """
    settings = HarnessSettings(limit, seed, part, max_new_tokens, num_fewshot, chat_template)
    _require_possible(batch_size, settings)
    _require_lm_eval()
    from loki.evaluation.language_model import LanguageModel, quiet

    chosen = expand(names)
    tasks = [
        _from_hub(name, settings, allow_code_execution=allow_code_execution)
        if data_dir is None
        else _from_folder(name, data_dir, settings, allow_code_execution=allow_code_execution)
        for name in chosen
    ]
    with quiet():
        harness_model = LanguageModel(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    fingerprint = None if folder is None else fingerprint_model(model).as_dict()
    results = []
    for task in tasks:
        store = None
        if folder is not None:
            identity = {
                "task": task.name,
                "metric": task.metric,
                "items": task.contents,
                "model": fingerprint,
                **asdict(settings),
                "lm_eval": metadata.version("lm_eval"),
            }
            store = Store(folder / f"{task.name}.json", identity, float)
        results.append(_score(task, harness_model, store, track=track))
    return results


def _score(task: _Task, model: LanguageModel, store: Store[float] | None, *, track: Track) -> ItemScores:
    from loki.evaluation.language_model import quiet

    def answer(ids: Sequence[str]) -> list[float]:
        with quiet():
            return task.score(model, ids)

    done = answer_all(task.name, task.ids, answer, store, at_once=ITEMS_AT_ONCE[task.kind], track=track)
    return ItemScores(task.name, task.metric, task.ids, tuple(done[id_] for id_ in task.ids), chance=task.chance)


def _from_folder(name: str, data_dir: str | Path, settings: HarnessSettings, *, allow_code_execution: bool) -> _Task:
    from loki.evaluation.language_model import quiet

    benchmark = find(name)
    if name in CODE_TASKS:
        _require_permission(name, allowed=allow_code_execution)
    all_rows = load_rows(benchmark, data_dir)
    config = benchmark.config()
    if settings.num_fewshot is not None:
        config["num_fewshot"] = settings.num_fewshot
    if settings.max_new_tokens is not None and benchmark.kind == "generation":
        replies = config["generation_kwargs"]
        replies["max_gen_toks"] = min(settings.max_new_tokens, replies.get("max_gen_toks", MAX_NEW_TOKENS))
    if name == "ifeval":
        all_rows = _only_checkable(all_rows)
    if settings.part is not None:
        all_rows = [row for row in all_rows if part_of(row["id"]) == settings.part]
        if not all_rows:
            raise InputError(f"task {name!r} has no items in the part {settings.part!r}: give more data, or no part")
    with quiet():
        chance = _chance(_make_task(config, all_rows))
    rows = {row["id"]: row for row in all_rows}
    ids = sample(name, list(rows), settings.limit, settings.seed)
    rows = {id_: rows[id_] for id_ in ids}
    examples = load_examples(benchmark, data_dir, list(rows.values()), config["num_fewshot"])
    contents = digest({"config": config, "rows": list(rows.values()), "examples": examples})

    def score_items(model: LanguageModel, ids: Sequence[str]) -> list[float]:
        from loki.evaluation.language_model import score

        # One task for all that have the same problems in front; without any, that is one for all.
        groups: dict[str, list[dict[str, Any]]] = {}
        for id_ in ids:
            group = group_of(benchmark, rows[id_]) if config["num_fewshot"] else ""
            groups.setdefault(group, []).append(rows[id_])
        found: dict[str, float] = {}
        for group, members in groups.items():
            task = _make_task(config, members, examples.get(group, ()))
            samples = score(model, task, chat_template=settings.chat_template)
            found |= {sample["doc"]["id"]: float(sample[benchmark.metric]) for sample in samples}
        return [found[id_] for id_ in ids]

    return _Task(name, benchmark.metric, benchmark.kind, tuple(ids), chance, contents, score_items)


def _from_hub(name: str, settings: HarnessSettings, *, allow_code_execution: bool) -> _Task:
    """A task, or a group of tasks, as the harness itself defines it; items are `task/number`."""
    from loki.evaluation.language_model import quiet

    if name in CODE_TASKS:
        raise InputError(f"task {name!r} is scored in a sandbox, on local data only: give --data-dir")
    with quiet():
        parts = _load_from_hub(name)
    documents = {part: task.eval_docs for part, task in parts.items()}
    for part, task in parts.items():
        if getattr(task, "UNSAFE_CODE", False):
            _require_permission(part, allowed=allow_code_execution)
        if settings.max_new_tokens is not None and task.OUTPUT_TYPE == "generate_until":
            most = min(settings.max_new_tokens, task.config.generation_kwargs.get("max_gen_toks", MAX_NEW_TOKENS))
            task.set_config("generation_kwargs", {"max_gen_toks": most}, update=True)
        if settings.num_fewshot is not None:
            task.set_config("num_fewshot", settings.num_fewshot)
    places = {f"{part}/{index}": (part, index) for part, docs in documents.items() for index in range(len(docs))}
    members = [id_ for id_ in places if settings.part is None or part_of(id_) == settings.part]
    ids = sample(name, members, settings.limit, settings.seed)
    metric = _metric_of(name, list(parts.values()))
    chances = [(_chance(task), len(documents[part])) for part, task in parts.items()]
    known = [(chance, number) for chance, number in chances if chance is not None]
    chance = sum(chance * number for chance, number in known) / len(places) if len(known) == len(chances) else None
    contents = digest([[id_, str(documents[places[id_][0]][places[id_][1]])] for id_ in ids])
    generates = any(task.OUTPUT_TYPE == "generate_until" for task in parts.values())

    def score_items(model: LanguageModel, ids: Sequence[str]) -> list[float]:
        from loki.evaluation.language_model import score

        found: dict[str, float] = {}
        for part, task in parts.items():
            indices = sorted(places[id_][1] for id_ in ids if places[id_][0] == part)
            if indices:
                samples = score(model, task, indices=indices, chat_template=settings.chat_template)
                chosen = _one_filter(samples)
                found |= {f"{part}/{index}": float(value[metric]) for index, value in zip(indices, chosen, strict=True)}
        return [found[id_] for id_ in ids]

    return _Task(
        name, metric, "generation" if generates else "loglikelihood", tuple(ids), chance, contents, score_items
    )


def _load_from_hub(name: str) -> dict[str, ConfigurableTask]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    if name not in manager.all_tasks:
        raise InputError(f"task {name!r} is unknown: choose from {known_names()}, or what `lm_eval ls tasks` lists")
    try:
        return dict(manager.load([name])["tasks"])
    except Exception as error:
        # Four libraries between here and the network raise what they like; --debug shows which did.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"task {name!r} cannot be had from the Hub ({reason}): give --data-dir with a folder that holds its data"
        ) from error


def _metric_of(name: str, parts: Sequence[ConfigurableTask]) -> str:
    wanted = [BENCHMARKS[name].metric] if name in BENCHMARKS else []
    offered = [{str(entry["metric"]) for entry in task.config.metric_list or ()} for task in parts]
    for metric in (*wanted, *METRICS):
        if all(metric in names for names in offered):
            return metric
    raise InputError(
        f"task {name!r} is not scored item by item in a way known here ({', '.join(METRICS)}): choose another"
    )


def _one_filter(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The samples of one way of reading the reply, where a task has several: the more generous, or the first."""
    names = [sample["filter"] for sample in samples]
    chosen = FLEXIBLE if FLEXIBLE in names else names[0]
    return [sample for sample in samples if sample["filter"] == chosen]


def _make_task(
    config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], examples: Sequence[Mapping[str, Any]] = ()
) -> ConfigurableTask:
    """A task of lm-eval over rows in memory, with examples in front of each or without."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    check = CHECKS.get(config["task"])
    changes: dict[str, Any] = {}
    if check is not None:
        by_id = {row["id"]: row for row in rows}
        (metric,) = (entry["metric"] for entry in config["metric_list"])
        changes["process_results"] = lambda doc, replies: {metric: check(by_id[doc["id"]], replies[0])}
        # Instructions differ in their settings, which a table of columns does not hold.
        rows = [{"id": row["id"], "prompt": row["prompt"]} for row in rows]
    splits = {"test": Dataset.from_list(list(rows))}
    definition = copy.deepcopy(dict(config))
    if examples:
        splits["train"] = Dataset.from_list(list(examples))
    else:
        definition = {name: value for name, value in definition.items() if not name.startswith("fewshot_")}
        definition["num_fewshot"] = 0
    return ConfigurableTask(config={**definition, "custom_dataset": lambda: splits, **changes})


def _chance(task: ConfigurableTask) -> float | None:
    """Percent that guessing gets: one of the options at random, or always the same answer where that is better.

    The latter only where every question has the same options (letters, yes and no): elsewhere there is no such answer.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    shares, answers, options = [], Counter[str](), set()
    for doc in task.eval_docs:
        choices = task.doc_to_choice(doc)
        shares.append(1 / len(choices))
        answers[str(task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc))] += 1
        options.add(tuple(choices))
    at_random = sum(shares) / len(shares)
    constant = answers.most_common(1)[0][1] / len(shares) if len(options) == 1 else 0.0
    return 100 * max(at_random, constant)


def _only_checkable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = [row for row in rows if is_checkable(row)]
    if len(kept) < len(rows):
        logger.warning(
            "ifeval: %d of %d prompts are left out because checking them needs nltk's sentence model: "
            "run `python -m nltk.downloader punkt_tab` once",
            len(rows) - len(kept),
            len(rows),
        )
    if not kept:
        raise InputError(
            "task 'ifeval' has no prompt that can be checked without nltk's sentence model: "
            "run `python -m nltk.downloader punkt_tab` once"
        )
    return kept


def _require_permission(name: str, *, allowed: bool) -> None:
    if not allowed:
        raise InputError(
            f"task {name!r} runs programs that the model writes: give --allow-code-execution, best in a container, "
            "or leave it out"
        )


def _require_lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("benchmarks need lm-eval: run `pip install 'loki-peft[eval]'`")


def _require_possible(batch_size: int, settings: HarnessSettings) -> None:
    for name, value in (
        ("batch size", batch_size),
        ("limit", settings.limit),
        ("max_new_tokens", settings.max_new_tokens),
    ):
        if value is not None and value < 1:
            raise InputError(f"{name} {value} is not possible: give 1 or more")
    if settings.num_fewshot is not None and settings.num_fewshot < 0:
        raise InputError(f"num_fewshot {settings.num_fewshot} is not possible: give 0 or more")
