"""What is attributed is never what is scored."""

import gzip
import json

import pytest

from loki.evaluation.text import load_texts
from loki.prompts.mmlu import SUBJECTS, load_mmlu
from loki.prompts.parts import part_of
from loki.study.corpora import LAMBADA, load_corpora
from loki.study.settings import AnalysisSection


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def question(split, subject):
    return {
        "id": f"{split}_{subject}",
        "subject": subject,
        "question": f"what {split} {subject}",
        "choices": ["a", "b", "c", "d"],
        "answer": 0,
    }


@pytest.fixture
def data(tmp_path):
    for split, name in (("dev", "mmlu_dev.jsonl"), ("val", "mmlu_val.jsonl"), ("test", "mmlu_test.jsonl.gz")):
        write_rows(tmp_path / "mmlu" / name, [question(split, subject) for subject in SUBJECTS])
    passages = [{"id": f"l{number}", "context": f"word {number} and", "target": "more"} for number in range(40)]
    write_rows(tmp_path / LAMBADA, passages)
    for name, folder in (("c4", "c4_demo.jsonl"), ("wikitext2", "wikitext2_test.jsonl.gz")):
        rows = [{"id": f"{name}{n}", "text": " ".join(f"w{i}" for i in range(230))} for n in range(40)]
        write_rows(tmp_path / "text" / folder, rows)
    return tmp_path


def prompts(data, *corpora, **changes):
    return load_corpora(AnalysisSection(corpora=corpora, **changes), data)


def test_of_mmlu_the_test_questions_are_left_for_scoring(data):
    found = {prompt.id for prompt in prompts(data, "mmlu")}
    assert found == {f"{split}_{subject}" for split in ("dev", "val") for subject in SUBJECTS}
    assert not found & {question.id for question in load_mmlu("test", data_dir=data)}


def test_of_lambada_one_half_is_attributed(data):
    found = prompts(data, "lambada")
    assert found
    assert {part_of(prompt.id) for prompt in found} == {"analysis"}
    assert (found[0].text, found[0].answer) == (f"word {found[0].id[1:]} and", "more")


@pytest.mark.parametrize("name", ["c4", "wikitext2"])
def test_of_texts_one_half_is_attributed_and_the_other_scored(data, name):
    attributed = {prompt.id.split("/")[0] for prompt in prompts(data, name)}
    scored = {text.id for text in load_texts(name, data, part="evaluation")}
    assert attributed
    assert scored
    assert not attributed & scored
    assert attributed | scored == {text.id for text in load_texts(name, data)}


def test_running_text_is_cut_into_prompts_of_a_hundred_words(data):
    first, second, third = prompts(data, "c4")[:3]
    assert [prompt.id.split("/")[1] for prompt in (first, second, third)] == ["0", "1", "2"]
    assert first.text == " ".join(f"w{i}" for i in range(99))
    assert (first.answer, second.answer, third.answer) == ("w99", "w199", "w229")


def test_corpora_share_the_prompts_alike(data):
    found = prompts(data, "mmlu", "lambada", num_prompts=8)
    assert len(found) == 8
    assert sum(prompt.subject is None for prompt in found) == 4
    # Never more than the smallest corpus allows.
    smallest = len(prompts(data, "lambada"))
    assert len(prompts(data, "mmlu", "lambada", num_prompts=1000)) - 2 * smallest in (0, 1)


@pytest.mark.data
def test_the_real_files_are_disjoint_too(data_dir):
    scored = {question.id for question in load_mmlu("test", data_dir=data_dir)}
    assert len(scored) == 14_042
    attributed = {prompt.id for prompt in prompts(data_dir, "mmlu")}
    assert len(attributed) == 285 + 1_531
    assert not attributed & scored
    texts = {prompt.text for prompt in prompts(data_dir, "lambada", "wikitext2", "c4")}
    for name in ("wikitext2", "c4"):
        for text in load_texts(name, data_dir, part="evaluation"):
            assert " ".join(text.text.split()[:99]) not in texts
