"""Benchmarks through lm-eval, against plain computations of the same scores."""

import gzip
import json
import logging
import socket
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from plain_scoring import continuation, likeliest

from loki.errors import ArtefactError, InputError
from loki.evaluation import harness
from loki.evaluation.benchmarks import checks
from loki.evaluation.benchmarks.table import BENCHMARKS, GROUPS
from loki.evaluation.harness import evaluate_tasks

WORDS = (
    *("sun", "moon", "tree", "river", "stone", "cloud", "bird", "fish"),
    *("road", "house", "lamp", "door", "salt", "snow", "iron", "gold"),
)
LENGTHS = "x", "a longer thing", "of middle size", "short"


def question_rows(task: str, num_choices: int = 4, number: int = 6) -> list[dict]:
    """Questions whose options differ in length; `answer` is set by `mark`."""
    rows = []
    for index in range(number):
        choices = [f"{WORDS[(index + 3 * i) % 16]} {LENGTHS[i % 4]}" for i in range(num_choices)]
        question = f"What is a {WORDS[index]}?"
        rows.append({"id": f"{task}-{index}", "question": question, "choices": choices})
        if task == "boolq":
            rows[-1] |= {"passage": f"A {WORDS[-index]} is no {WORDS[index]}.", "choices": ["no", "yes"]}
        elif task == "mmlu":
            rows[-1]["subject"] = "high_school_biology"
    return rows


def schema_rows(task: str) -> list[dict]:
    return [
        {
            "id": f"{task}-{index}",
            "prefixes": [
                f"The {WORDS[index]} met the {WORDS[-index]} and the {name}" for name in (WORDS[index], "rest")
            ],
            "suffix": f"was {WORDS[index + 5]}.",
        }
        for index in range(6)
    ]


def lettered(row: dict) -> str:
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCDE", row["choices"], strict=False))
    return f"{row['question']}\n{options}\nAnswer:"


def asked(text: str, row: dict) -> list[tuple[str, str]]:
    return [(text, f" {choice}") for choice in row["choices"]]


def by_letter(text: str, row: dict) -> list[tuple[str, str]]:
    return [(text, f" {letter}") for letter in "ABCDE"[: len(row["choices"])]]


PROMPTS = {
    "hellaswag": lambda row: asked(row["question"], row),
    "openbookqa": lambda row: asked(row["question"], row),
    "copa": lambda row: asked(row["question"], row),
    "arc_easy": lambda row: asked(f"Question: {row['question']}\nAnswer:", row),
    "arc_challenge": lambda row: asked(f"Question: {row['question']}\nAnswer:", row),
    "piqa": lambda row: asked(f"Question: {row['question']}\nAnswer:", row),
    "sciq": lambda row: asked(f"Question: {row['question']}\nAnswer:", row),
    "boolq": lambda row: asked(f"{row['passage']}\nQuestion: {row['question']}\nAnswer:", row),
    "commonsense_qa": lambda row: by_letter(f"Question: {lettered(row)}", row),
    "mmlu": lambda row: by_letter(
        "The following are multiple choice questions (with answers) about high school biology.\n\n" + lettered(row), row
    ),
    "winogrande": lambda row: [(prefix, f" {row['suffix']}") for prefix in row["prefixes"]],
    "winograd_wsc273": lambda row: [(prefix, f" {row['suffix']}") for prefix in row["prefixes"]],
}
NORMED = {"hellaswag", "openbookqa", "arc_easy", "arc_challenge", "piqa", "sciq"}


def pick(model, tokenizer, task: str, row: dict) -> int:
    divisors = [len(choice) for choice in row["choices"]] if task in NORMED else None
    return likeliest(model, tokenizer, PROMPTS[task](row), divisors=divisors)


def make_rows(task: str) -> list[dict]:
    if "prefixes" in BENCHMARKS[task].fields:
        return schema_rows(task)
    return question_rows(task, num_choices=5 if task == "commonsense_qa" else 4)


def write_rows(data_dir, task: str, rows: list[dict], *, zipped: bool = False):
    path = data_dir / BENCHMARKS[task].path
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if zipped:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)


def mark(model, tokenizer, task: str, rows: list[dict]) -> tuple[float, ...]:
    """Give every second row the answer that the model picks, the others another one; what it should get on each."""
    for index, row in enumerate(rows):
        right = pick(model, tokenizer, task, row)
        row["answer"] = right if index % 2 else (right + 1) % len(row.get("choices") or row["prefixes"])
    return tuple(float(index % 2) for index in range(len(rows)))


@pytest.fixture
def model(make_model):
    return make_model(0)


@pytest.fixture
def arc(model, tokenizer, tmp_path):
    """A data folder with ARC-Easy: 6 questions of which the model gets every second one."""
    rows = make_rows("arc_easy")
    mark(model, tokenizer, "arc_easy", rows)
    write_rows(tmp_path, "arc_easy", rows)
    return tmp_path


@pytest.mark.parametrize("task", PROMPTS)
def test_choices_as_a_plain_computation_ranks_them(model, tokenizer, tmp_path, task):
    rows = make_rows(task)
    expected = mark(model, tokenizer, task, rows)
    write_rows(tmp_path, task, rows, zipped=task == "hellaswag")
    (scores,) = evaluate_tasks(model, tokenizer, [task], data_dir=tmp_path, batch_size=3)
    assert (scores.task, scores.metric) == (task, "acc_norm" if task in NORMED else "acc")
    assert dict(zip(scores.ids, scores.scores, strict=True)) == {
        row["id"]: score for row, score in zip(rows, expected, strict=True)
    }


@pytest.fixture
def contexts(monkeypatch):
    """What stands in front of each option that is scored, in order."""
    from loki.evaluation.language_model import LanguageModel

    found: list[str] = []

    def score(_self, requests, disable_tqdm=True):
        found.extend(request.args[0] for request in requests)
        return [(0.0, False) for _ in requests]

    monkeypatch.setattr(LanguageModel, "loglikelihood", score)
    return found


def mmlu_rows(subject: str, number: int) -> list[dict]:
    rows = question_rows(f"{subject}-", number=number)
    return [row | {"subject": subject, "answer": index % 4} for index, row in enumerate(rows)]


def as_lm_eval_puts_it(rows: list[dict], solved: list[dict], number: int) -> list[str]:
    """Prompts of one subject by the definition of MMLU that lm-eval itself has."""
    import lm_eval.tasks
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    folder = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    definition = yaml.safe_load((folder / "_default_template_yaml").read_text())
    definition |= yaml.safe_load((folder / f"mmlu_{rows[0]['subject']}.yaml").read_text())
    splits = {"test": Dataset.from_list(rows), "dev": Dataset.from_list(solved)}
    config = {name: definition[name] for name in set(definition) - {"include", "tag", "dataset_path", "dataset_name"}}
    task = ConfigurableTask(config={**config, "custom_dataset": lambda **_: splits})
    return [task.fewshot_context(row, number) for row in rows]


@pytest.mark.parametrize("number", [0, 1, 3])
def test_examples_of_a_subject_stand_in_front_as_lm_eval_puts_them(model, tokenizer, tmp_path, contexts, number):
    rows = {subject: mmlu_rows(subject, 3) for subject in ("anatomy", "high_school_biology")}
    solved = {subject: mmlu_rows(subject, 4) for subject in ("high_school_biology", "anatomy")}
    mixed = [row for pair in zip(*rows.values(), strict=True) for row in pair]
    write_rows(tmp_path, "mmlu", mixed)
    (tmp_path / "mmlu/mmlu_dev.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for pair in zip(*solved.values(), strict=True) for row in pair)
    )
    (scores,) = evaluate_tasks(model, tokenizer, ["mmlu"], data_dir=tmp_path, num_fewshot=number)
    assert scores.ids == tuple(row["id"] for row in mixed)
    expected = [text for subject in rows for text in as_lm_eval_puts_it(rows[subject], solved[subject], number)]
    assert len(expected) == 6
    # Four options each; without examples the questions are asked in their order, with them subject by subject.
    assert sorted(contexts) == sorted(4 * expected)
    (tmp_path / "mmlu/mmlu_dev.jsonl").write_text(json.dumps(solved["anatomy"][0]))
    with pytest.raises(InputError, match=r"0 solved problems of subject 'high_school_biology': .* is to show 1 "):
        evaluate_tasks(model, tokenizer, ["mmlu"], data_dir=tmp_path, num_fewshot=1)


def test_length_decides_in_some_of_these_questions(model, tokenizer):
    rows = make_rows("arc_easy")
    plain = [likeliest(model, tokenizer, PROMPTS["arc_easy"](row)) for row in rows]
    assert plain != [pick(model, tokenizer, "arc_easy", row) for row in rows]


def test_every_choice_task_is_in_this_comparison():
    assert {name for name, task in BENCHMARKS.items() if "answer" in task.fields} - set(PROMPTS) == {"gsm8k"}
    assert set(GROUPS["likelihood"]) == {*PROMPTS, "lambada_openai"}
    assert GROUPS["loki-paper"] == ("triviaqa", "gsm8k", "hellaswag", "winogrande", "humaneval", "ifeval")


def test_last_words_are_right_where_greedy_decoding_writes_them(model, tokenizer, tmp_path):
    contexts = [f"{first} and the {second}," for first, second in zip(WORDS[:4], WORDS[4:], strict=False)]
    rows = [{"id": str(index), "context": text, "target": "s"} for index, text in enumerate(contexts)]
    greedy = []
    for row in rows[:2]:
        # What the model writes after a space, so that the target is right.
        ids = tokenizer(f"{row['context']} ").input_ids
        with torch.no_grad():
            row["target"] = tokenizer.decode([int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())])
    for row in rows:
        greedy.append(float(continuation(model, tokenizer, row["context"], f" {row['target']}")[1]))
    write_rows(tmp_path, "lambada_openai", rows)
    (scores,) = evaluate_tasks(model, tokenizer, ["lambada_openai"], data_dir=tmp_path)
    assert scores.scores == tuple(greedy)
    assert scores.chance is None


def test_guessing_is_counted_on_the_file(model, tokenizer, tmp_path):
    arc = make_rows("arc_easy")[:3]
    arc[0]["choices"] = arc[0]["choices"][:2]
    mmlu = make_rows("mmlu")[:4]
    for row in [*arc, *mmlu]:
        row["answer"] = 0
    mmlu[3]["answer"] = 1
    schemas = [row | {"answer": 0} for row in schema_rows("winogrande")]
    for task, rows in (("arc_easy", arc), ("mmlu", mmlu), ("winogrande", schemas)):
        write_rows(tmp_path, task, rows)
    scores = evaluate_tasks(model, tokenizer, ["arc_easy", "mmlu", "winogrande"], data_dir=tmp_path, limit=2)
    # A third of 1/2 + 1/4 + 1/4; always A in three of four; one of two, because "always the first" is no answer there.
    assert [score.chance for score in scores] == pytest.approx([100 / 3, 75, 50])
    assert [len(score.ids) for score in scores] == [2, 2, 2]


def test_a_limit_draws_the_same_items_for_every_model_and_a_smaller_one_a_part_of_them(make_model, tokenizer, arc):
    def ids(seed=0, model_seed=0, **options):
        (scores,) = evaluate_tasks(make_model(model_seed), tokenizer, ["arc_easy"], data_dir=arc, seed=seed, **options)
        return list(scores.ids)

    assert ids(limit=4) == ids(limit=4, model_seed=1)
    assert set(ids(limit=2)) < set(ids(limit=4))
    assert ids(limit=4) == sorted(ids(limit=4))
    assert len({tuple(ids(seed=seed, limit=2)) for seed in range(6)}) > 1
    assert ids(limit=100) == ids()


def test_a_half_of_the_items(model, tokenizer, arc):
    halves = [
        evaluate_tasks(model, tokenizer, ["arc_easy"], data_dir=arc, part=part)[0].ids
        for part in ("analysis", "evaluation")
    ]
    assert sorted([*halves[0], *halves[1]]) == [f"arc_easy-{index}" for index in range(6)]


def test_nothing_is_said_or_fetched(model, tokenizer, arc, capfd, caplog, monkeypatch):
    def refuse(*_):
        raise AssertionError("reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    levels = {name: logging.getLogger(name).level for name in ("lm_eval", "transformers", "datasets")}
    streams = sys.stdout, sys.stderr
    evaluate_tasks(model, tokenizer, ["arc_easy"], data_dir=arc)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert levels == {name: logging.getLogger(name).level for name in levels}
    assert (sys.stdout, sys.stderr) == streams


def test_progress_is_told_by_items(model, tokenizer, arc, monkeypatch):
    monkeypatch.setitem(harness.ITEMS_AT_ONCE, "loglikelihood", 4)
    told = []

    def track(items, what, *, sizes=None, unit=""):
        told.append((what, list(sizes), unit))
        return items

    evaluate_tasks(model, tokenizer, ["arc_easy"], data_dir=arc, track=track)
    assert told == [("arc_easy", [4, 2], "items")]


def interrupted(items, what, **_):
    """Goes on for one step and is stopped in the second."""
    yield items[0]
    raise KeyboardInterrupt


def test_the_same_call_goes_on_where_it_stopped(model, tokenizer, arc, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(harness.ITEMS_AT_ONCE, "loglikelihood", 2)
    evaluate = partial(evaluate_tasks, model, tokenizer, ["arc_easy"], data_dir=arc)
    folder = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder=folder, track=interrupted)
    done = json.loads((folder / "arc_easy.json").read_text())["scores"]
    assert len(done) == 2
    seen = []

    def track(items, what, *, sizes=None, unit=""):
        seen.append(sizes)
        return items

    with caplog.at_level(logging.INFO, logger="loki"):
        assert evaluate(folder=folder, track=track) == evaluate()
    assert seen[0] == [2, 2]
    assert "arc_easy: 2 of 6 items were scored already" in caplog.text
    assert evaluate(folder=folder, track=track) == evaluate()
    assert seen[1] == []


def test_scores_of_something_else_are_not_taken_for_ours(model, make_model, tokenizer, arc, tmp_path):
    folder = tmp_path / "parts"
    evaluate_tasks(model, tokenizer, ["arc_easy"], data_dir=arc, folder=folder)
    for other, options, difference in (
        (make_model(1), {}, "other model"),
        (model, {"limit": 2}, "other items, limit"),
        (model, {"chat_template": False, "seed": 1}, "other seed"),
    ):
        with pytest.raises(ArtefactError, match=rf"another evaluation \({difference}\): remove it or choose another"):
            evaluate_tasks(other, tokenizer, ["arc_easy"], data_dir=arc, folder=folder, **options)
    ours = (arc / BENCHMARKS["arc_easy"].path).read_text()
    write_rows(arc, "arc_easy", [row | {"answer": 0} for row in make_rows("arc_easy")])
    with pytest.raises(ArtefactError, match="other items"):
        evaluate_tasks(model, tokenizer, ["arc_easy"], data_dir=arc, folder=folder)
    (arc / BENCHMARKS["arc_easy"].path).write_text(ours)
    stored = json.loads((folder / "arc_easy.json").read_text())
    for spoilt in ("[]", json.dumps(stored | {"scores": dict.fromkeys(stored["scores"], "much")})):
        (folder / "arc_easy.json").write_text(spoilt)
        with pytest.raises(ArtefactError, match="holds no scores: remove it"):
            evaluate_tasks(model, tokenizer, ["arc_easy"], data_dir=arc, folder=folder)


@pytest.fixture
def replies(monkeypatch):
    """Replies by the end of the prompt, instead of what the model would write; the prompts, in order."""
    from loki.evaluation.language_model import LanguageModel

    script: dict[str, str] = {}
    asked: list[tuple[str, dict]] = []

    def generate(_self, requests, disable_tqdm=True):
        asked.extend(request.args for request in requests)
        return [next(reply for end, reply in script.items() if request.args[0].endswith(end)) for request in requests]

    monkeypatch.setattr(LanguageModel, "generate_until", generate)
    return script, asked


def scores_of(model, tokenizer, task, data_dir, **options):
    (scores,) = evaluate_tasks(model, tokenizer, [task], data_dir=data_dir, **options)
    assert scores.chance is None
    return dict(zip(scores.ids, scores.scores, strict=True))


def test_names_are_compared_without_case_and_punctuation(model, tokenizer, tmp_path, replies):
    script, asked = replies
    rows = [
        {"id": str(index), "question": f"Which {word}", "aliases": ["The Sun", "Sol"]}
        for index, word in enumerate(WORDS[:4])
    ]
    script |= {"sun?\nAnswer:": " the sun!", "moon?\nAnswer:": " SOL ", "tree?\nAnswer:": " sun", "river?\nAnswer:": ""}
    write_rows(tmp_path, "triviaqa", rows)
    assert scores_of(model, tokenizer, "triviaqa", tmp_path) == {"0": 1, "1": 1, "2": 0, "3": 0}
    assert asked[0][0] == "Question: Which sun?\nAnswer:"
    assert asked[0][1]["until"] == ["\n", ".", ","]


def test_replies_are_what_greedy_decoding_writes(model, tokenizer, tmp_path):
    prompts = [f"Which {word}" for word in WORDS[:3]]
    written = []
    for prompt in prompts:
        inputs = tokenizer(f"Question: {prompt}?\nAnswer:", return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs.input_ids.shape[1] :]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        written.append(min((text.split(stop)[0] for stop in ("\n", ".", ",")), key=len).strip())
    assert any(any(character.isalnum() for character in text) for text in written)
    rows = [{"id": str(i), "question": prompt, "aliases": [written[i] or "-"]} for i, prompt in enumerate(prompts)]
    rows += [row | {"id": f"{row['id']} wrong", "aliases": [f"{row['aliases'][0]}x"]} for row in rows]
    write_rows(tmp_path, "triviaqa", rows)
    scores = scores_of(model, tokenizer, "triviaqa", tmp_path, max_new_tokens=5, batch_size=4)
    assert scores == {row["id"]: float("wrong" not in row["id"]) for row in rows}


def test_the_last_number_of_a_reply_is_its_result(model, tokenizer, tmp_path, replies):
    script, asked = replies
    examples = [
        {"id": f"t{i}", "question": f"{i} plus {i}?", "answer": f"{i}+{i}={2 * i}\n#### {2 * i}"} for i in range(7)
    ]
    (tmp_path / "generation").mkdir()
    (tmp_path / "generation/gsm8k_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
    rows = [
        {"id": word, "question": f"How many {word}?", "answer": "Three and four are seven.\n#### 1,007"}
        for word in WORDS[:4]
    ]
    ends = {
        "sun": " It is 3.\n#### 1,007",
        "moon": " so there are $1007.",
        "tree": " 1007 less 1 is 1006",
        "river": " none",
    }
    script |= {f"How many {word}?\nAnswer:": text for word, text in ends.items()}
    write_rows(tmp_path, "gsm8k", rows)
    assert scores_of(model, tokenizer, "gsm8k", tmp_path) == {"sun": 1, "moon": 1, "tree": 0, "river": 0}
    solved = "\n\n".join(f"Question: {i} plus {i}?\nAnswer: {i}+{i}={2 * i}\n#### {2 * i}" for i in range(5))
    assert asked[0][0] == f"{solved}\n\nQuestion: How many sun?\nAnswer:"
    (tmp_path / "generation/gsm8k_train.jsonl").write_text(json.dumps(examples[0]))
    with pytest.raises(InputError, match=r"has 1 solved problems: task 'gsm8k' is to show 5 \(--num-fewshot\)"):
        evaluate_tasks(model, tokenizer, ["gsm8k"], data_dir=tmp_path)
    for number, front in ((1, "Question: 0 plus 0?\nAnswer: 0+0=0\n#### 0\n\n"), (0, "")):
        asked.clear()
        scores_of(model, tokenizer, "gsm8k", tmp_path, num_fewshot=number)
        assert asked[0][0] == f"{front}Question: How many sun?\nAnswer:"


def program_row(name: str) -> dict:
    head = f'def {name}(x):\n    """Twice x."""\n'
    return {"id": name, "prompt": head, "entry_point": name, "test": "def check(f):\n    assert f(2) == 4\n"}


def test_programs_must_pass_their_tests(model, tokenizer, tmp_path, replies, monkeypatch):
    script, asked = replies
    monkeypatch.setattr(checks, "runs_to_its_end", partial(checks.runs_to_its_end, timeout=1.5))
    bodies = {"right": "    return 2 * x\n", "wrong": "    return x + 3\n", "endless": "    while x:\n        pass\n"}
    bodies |= {"leaves": "    raise SystemExit(0)\n", "broken": "    return ((\n"}
    script |= {f'def {name}(x):\n    """Twice x."""\n': body for name, body in bodies.items()}
    write_rows(tmp_path, "humaneval", [program_row(name) for name in bodies])
    with pytest.raises(
        InputError, match="'humaneval' runs programs that the model writes: give --allow-code-execution"
    ):
        evaluate_tasks(model, tokenizer, ["humaneval"], data_dir=tmp_path)
    scores = scores_of(model, tokenizer, "humaneval", tmp_path, allow_code_execution=True, max_new_tokens=7)
    assert scores == {name: float(name == "right") for name in bodies}
    assert asked[0][1]["max_gen_toks"] == 7
    assert asked[0][1]["until"] == ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]


def instruction_rows() -> list[dict]:
    many = {"num_sentences": 2, "relation": "at least"}
    return [
        {"id": "comma", "prompt": "No commas", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {
            "id": "two",
            "prompt": "Low, with a word",
            "instruction_id_list": ["change_case:english_lowercase", "keywords:existence"],
            "kwargs": [{}, {"keywords": ["moon"]}],
        },
        {
            "id": "many",
            "prompt": "Sentences",
            "instruction_id_list": ["length_constraints:number_sentences"],
            "kwargs": [many],
        },
    ]


@pytest.mark.parametrize(
    ("comma", "two", "expected"),
    [
        ("None here", "the moon is up", {"comma": 1, "two": 1}),
        ("None, here", "The moon is up", {"comma": 0, "two": 0}),
        ("", "all is lower case here", {"comma": 0, "two": 0}),
    ],
)
def test_all_instructions_must_be_followed(
    model, tokenizer, tmp_path, replies, monkeypatch, caplog, comma, two, expected
):
    script, _ = replies
    monkeypatch.setattr(checks, "has_sentences", lambda: False)
    script |= {"No commas": comma, "Low, with a word": two}
    write_rows(tmp_path, "ifeval", instruction_rows())
    assert scores_of(model, tokenizer, "ifeval", tmp_path) == expected
    assert "ifeval: 1 of 3 prompts are left out because checking them needs nltk's sentence model" in caplog.text


def test_instructions_that_cannot_be_checked_at_all(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "has_sentences", lambda: False)
    write_rows(tmp_path, "ifeval", instruction_rows()[2:])
    with pytest.raises(
        InputError, match=r"no prompt that can be checked .*: run `python -m nltk.downloader punkt_tab`"
    ):
        evaluate_tasks(model, tokenizer, ["ifeval"], data_dir=tmp_path)


def test_a_chat_template_wraps_the_question(model, tokenizer, tmp_path, replies, monkeypatch):
    script, asked = replies
    template = (
        "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    script |= {"<assistant>": "Sol"}
    write_rows(tmp_path, "triviaqa", [{"id": "0", "question": "Which sun", "aliases": ["Sol"]}])
    assert scores_of(model, tokenizer, "triviaqa", tmp_path, chat_template=True) == {"0": 1}
    assert asked[0][0] == "<user>Question: Which sun?\nAnswer:</><assistant>"


@pytest.fixture
def online(tmp_path, monkeypatch):
    """lm-eval's own tasks: two of questions in one group, one that is scored by a metric of its own only."""
    import lm_eval.tasks

    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"q": f"Is it a {word}?", "gold": index % 2}) + "\n" for index, word in enumerate(WORDS[:5]))
    )
    for name, metric in (("one", "acc"), ("two", "acc"), ("odd", "brier_score")):
        config = {
            **{"task": name, "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"},
            **{"doc_to_text": "{{q}}", "doc_to_choice": ["no", "yes"], "doc_to_target": "gold"},
            "dataset_kwargs": {
                "data_files": {"test": str(tmp_path / "rows.jsonl")},
                "cache_dir": str(tmp_path / "cache"),
            },
            "metric_list": [{"metric": metric, "aggregation": metric.replace("acc", "mean"), "higher_is_better": True}],
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps(config))
    (tmp_path / "both.yaml").write_text(json.dumps({"group": "both", "task": ["one", "two"]}))
    make = partial(lm_eval.tasks.TaskManager, include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", make)
    return make


def test_the_harness_own_tasks(model, tokenizer, online):
    (scores,) = evaluate_tasks(model, tokenizer, ["both"], data_dir=None, limit=6, num_fewshot=0)
    assert (scores.metric, len(scores.ids)) == ("acc", 6)
    # Of five answers three are "no".
    assert scores.chance == pytest.approx(60)
    for id_, score in zip(scores.ids, scores.scores, strict=True):
        part, index = id_.split("/")
        assert part in ("one", "two")
        prompt = f"Is it a {WORDS[int(index)]}?"
        picked = likeliest(model, tokenizer, [(prompt, " no"), (prompt, " yes")])
        assert score == float(picked == int(index) % 2)
    assert {0.0, 1.0} == set(scores.scores)


def test_examples_of_the_harness_own_tasks(model, tokenizer, online, contexts):
    evaluate_tasks(model, tokenizer, ["one"], data_dir=None, limit=1, num_fewshot=2)
    assert {context.count("Is it a ") for context in contexts} == {3}


def test_the_harness_own_tasks_that_cannot_be_had(model, tokenizer, online, monkeypatch):
    evaluate = partial(evaluate_tasks, model, tokenizer, data_dir=None)
    with pytest.raises(InputError, match=r"task 'arc_hard' is unknown: choose from hellaswag, .*`lm_eval ls tasks`"):
        evaluate(["arc_hard"])
    with pytest.raises(InputError, match=r"task 'odd' is not scored item by item in a way known here"):
        evaluate(["odd"])
    with pytest.raises(InputError, match="'humaneval' is scored in a sandbox, on local data only: give --data-dir"):
        evaluate(["humaneval"])

    def fail(*_):
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(online.func, "load", fail)
    with pytest.raises(InputError, match=r"'one' cannot be had from the Hub \(no route to host\): give --data-dir"):
        evaluate(["one"])


def test_what_is_refused(model, tokenizer, arc, monkeypatch):
    evaluate = partial(evaluate_tasks, model, tokenizer, data_dir=arc)
    for options, message in (
        ({"names": ["arc_hard"]}, r"task 'arc_hard' is unknown: choose from hellaswag, .*loki-paper, likelihood"),
        ({"names": []}, "no task is named: give one or more of hellaswag"),
        ({"names": ["piqa"]}, r"no data for task 'piqa': it is expected in forgetting/piqa.jsonl or"),
        ({"names": ["arc_easy"], "limit": 0}, "limit 0 is not possible: give 1 or more"),
        ({"names": ["arc_easy"], "batch_size": 0}, "batch size 0 is not possible"),
        ({"names": ["arc_easy"], "num_fewshot": -1}, "num_fewshot -1 is not possible: give 0 or more"),
        (
            {"names": ["arc_easy"], "num_fewshot": 3},
            r"'arc_easy' has no solved problems .* --num-fewshot is 3: leave it out, or name tasks .*\(mmlu, gsm8k\)",
        ),
        ({"names": ["arc_easy"], "data_dir": arc / "none"}, r"data folder '.*none' does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(**options)
    find = harness.importlib.util.find_spec
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    with pytest.raises(InputError, match=r"benchmarks need lm-eval: run `pip install 'loki-peft\[eval\]'`"):
        evaluate(["arc_easy"])


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("arc_easy", {"question": "?", "choices": ["a", "b"], "answer": 2}, "'answer' must be an index from 0 to 1"),
        ("arc_easy", {"question": "?", "choices": ["a"], "answer": 0}, "'choices' must be a list of 2"),
        (
            "mmlu",
            {"subject": "s", "question": "?", "choices": ["a", "b"], "answer": 0},
            "'choices' must be a list of 4 texts",
        ),
        ("boolq", {"question": "?", "choices": ["no", "yes"], "answer": 0}, "'passage' must be a text"),
        ("winogrande", {"prefixes": ["a", "b", "c"], "suffix": "d", "answer": 0}, "'prefixes' must be 2 texts, not 3"),
        ("triviaqa", {"question": "?", "aliases": []}, r"'aliases' must be a list of texts, not \[\]"),
        ("ifeval", {"prompt": "p", "instruction_id_list": ["a", "b"], "kwargs": [{}]}, "'kwargs' must be 2 objects"),
    ],
)
def test_rows_that_cannot_be_used(model, tokenizer, tmp_path, task, row, message):
    write_rows(tmp_path, task, [{"id": "0", **row}])
    with pytest.raises(InputError, match=f"jsonl, line 1: {message}"):
        evaluate_tasks(model, tokenizer, [task], data_dir=tmp_path)


def test_ids_are_unique(model, tokenizer, tmp_path):
    write_rows(tmp_path, "arc_easy", [row | {"id": "same", "answer": "B"} for row in make_rows("arc_easy")[:2]])
    with pytest.raises(InputError, match=r"line 2 has the id 'same' of .*line 1: ids must be unique"):
        evaluate_tasks(model, tokenizer, ["arc_easy"], data_dir=tmp_path)


@pytest.mark.data
def test_the_embedded_model_on_arc_easy_as_a_plain_computation_ranks_it(data_dir):
    from loki.models import load_model, load_tokenizer

    model, tokenizer = load_model("embedded", dtype="float32"), load_tokenizer("embedded")
    (scores,) = evaluate_tasks(model, tokenizer, ["arc_easy"], data_dir=data_dir, limit=20)
    with (data_dir / BENCHMARKS["arc_easy"].path).open() as file:
        rows = {row["id"]: row for row in map(json.loads, file)}
    for id_, score in zip(scores.ids, scores.scores, strict=True):
        assert score == float(pick(model, tokenizer, "arc_easy", rows[id_]) == rows[id_]["answer"])
    assert len(scores.ids) == 20


@pytest.mark.data
@pytest.mark.parametrize("task", BENCHMARKS)
def test_every_file_of_the_data_folder_is_read(data_dir, task):
    from loki.evaluation.benchmarks.rows import load_examples, load_rows

    rows = load_rows(BENCHMARKS[task], data_dir)
    assert len(rows) > 50
    examples = load_examples(BENCHMARKS[task], data_dir, rows, 0 if BENCHMARKS[task].examples_path is None else 5)
    assert len(examples) == (57 if task == "mmlu" else 1)
