"""MMLU in all its forms: JSON Lines, the original CSV files, the Hub."""

import csv
import gzip
import json
import subprocess
import sys
from collections import Counter

import pytest

from loki.errors import InputError
from loki.prompts.mmlu import PUBLIC_SUBJECTS, SUBJECTS, load_mmlu
from loki.prompts.prompt import Prompt, question_prompt
from loki.prompts.questions import Question, load_probe
from loki.prompts.sources import DatasetSpec, load_datasets

SPLITS = {"dev": "dev", "validation": "val", "test": "test"}


def rows_of(subject, count=2):
    return [
        {
            "subject": subject,
            "question": f'In {subject}, "{number}",\nwhich?',
            "choices": [f"{number}{letter}, é" for letter in "abcd"],
            "answer": number % 4,
        }
        for number in range(count)
    ]


ROWS = [row for subject in reversed(SUBJECTS) for row in rows_of(subject)]


def write_json_lines(path, rows=ROWS):
    path.parent.mkdir(exist_ok=True, parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def write_csv(root, short, rows=ROWS):
    folder = root / short
    folder.mkdir(parents=True)
    for subject in {row["subject"] for row in rows}:
        with (folder / f"{subject}_{short}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            for row in rows:
                if row["subject"] == subject:
                    writer.writerow([row["question"], *row["choices"], "ABCD"[row["answer"]]])


def expected(split, subjects=SUBJECTS):
    return [
        Question(
            id=f"mmlu_{split}_{subject}_{number}",
            subject=subject,
            split=split,
            question=row["question"],
            choices=tuple(row["choices"]),
            answer=row["answer"],
        )
        for subject in sorted(subjects)
        for number, row in enumerate(rows_of(subject))
    ]


def test_there_are_57_subjects_and_the_public_implementation_has_56():
    assert len(set(SUBJECTS)) == len(SUBJECTS) == 57
    assert list(SUBJECTS) == sorted(SUBJECTS)
    assert set(SUBJECTS) == {question.subject for question in load_probe()}
    assert len(PUBLIC_SUBJECTS) == 56
    assert set(SUBJECTS) - set(PUBLIC_SUBJECTS) == {"high_school_mathematics"}


@pytest.mark.parametrize("folder", ["", "mmlu"])
@pytest.mark.parametrize(
    ("split", "name"),
    [
        ("dev", "mmlu_dev.jsonl"),
        ("validation", "mmlu_val.jsonl"),
        ("validation", "mmlu_validation.jsonl"),
        ("validation", "mmlu_validation.jsonl.gz"),
        ("test", "mmlu_test.jsonl.gz"),
    ],
)
def test_json_lines(tmp_path, folder, split, name):
    write_json_lines(tmp_path / folder / name)
    assert load_mmlu(split, data_dir=tmp_path) == expected(split)


@pytest.mark.parametrize("folder", ["", "mmlu", "data", "mmlu/data"])
@pytest.mark.parametrize(("split", "short"), SPLITS.items())
def test_the_original_csv_files(tmp_path, folder, split, short):
    write_csv(tmp_path / folder, short)
    assert load_mmlu(split, data_dir=str(tmp_path)) == expected(split)


def test_splits_stand_side_by_side(tmp_path):
    for short, count in (("dev", 1), ("val", 2), ("test", 3)):
        write_json_lines(tmp_path / f"mmlu_{short}.jsonl", [row for name in SUBJECTS for row in rows_of(name, count)])
    assert [len(load_mmlu(split, data_dir=tmp_path)) for split in SPLITS] == [57, 114, 171]


def test_the_hub(tmp_path, monkeypatch):
    """The call that reaches the Hub takes a folder of the same name first: `datasets` itself is at work here."""
    from datasets import Dataset

    folder = tmp_path / "cais" / "mmlu" / "all"
    folder.mkdir(parents=True)
    for split in SPLITS:
        Dataset.from_list(ROWS if split == "validation" else ROWS[:4]).to_parquet(folder / f"{split}-0.parquet")
    files = "".join(f"  - split: {split}\n    path: all/{split}-*\n" for split in SPLITS)
    (tmp_path / "cais" / "mmlu" / "README.md").write_text(
        f"---\nconfigs:\n- config_name: all\n  data_files:\n{files}---\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert load_mmlu("validation") == expected("validation")


def test_without_network_the_hub_error_names_the_way_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(InputError) as raised:
        load_mmlu("test")
    text = str(raised.value)
    assert text.startswith("MMLU cannot be had from the Hub (")
    assert "cais/mmlu" in text
    assert text.endswith("): give --data-dir with a folder that holds MMLU as JSON Lines or as the original CSV files")
    assert "\n" not in text


def test_without_the_package_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="needs the package datasets: pip install datasets, or give --data-dir with"):
        load_mmlu("test")


def test_loading_from_a_folder_imports_neither_torch_nor_datasets(tmp_path):
    write_json_lines(tmp_path / "mmlu_test.jsonl")
    program = (
        "import sys; from pathlib import Path; import loki.prompts.sources, loki.prompts.encoding\n"
        "specs = [loki.prompts.sources.parse_dataset('mmlu'), loki.prompts.sources.parse_dataset('probe')]\n"
        f"print(len(loki.prompts.sources.load_datasets(specs, data_dir=Path({str(tmp_path)!r}))))\n"
        "print(sorted({'torch', 'datasets', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["228", "[]"]


def test_some_subjects_by_name(tmp_path):
    write_json_lines(tmp_path / "mmlu_test.jsonl")
    assert load_mmlu("test", data_dir=tmp_path, subjects=["virology", "anatomy"]) == expected(
        "test", ["anatomy", "virology"]
    )
    assert load_mmlu("test", data_dir=tmp_path, subjects=PUBLIC_SUBJECTS) == expected("test", PUBLIC_SUBJECTS)


def test_names_do_not_depend_on_the_order_of_subjects_in_the_file(tmp_path):
    """Rows of a subject may stand apart; their numbers count within the subject."""
    write_json_lines(
        tmp_path / "mmlu_test.jsonl", [row for n in (0, 1) for name in SUBJECTS for row in [rows_of(name)[n]]]
    )
    assert load_mmlu("test", data_dir=tmp_path) == expected("test")


def test_rows_keep_an_id_of_their_own(tmp_path):
    rows = [{**row, "id": f"row {number}"} for number, row in enumerate(rows_of("anatomy"))]
    write_json_lines(tmp_path / "mmlu_test.jsonl", [*rows, *rows_of("virology")])
    questions = load_mmlu("test", data_dir=tmp_path, subjects=["anatomy", "virology"])
    assert [q.id for q in questions] == ["row 0", "row 1", "mmlu_test_virology_0", "mmlu_test_virology_1"]


def test_a_question_becomes_a_prompt(tmp_path):
    write_json_lines(tmp_path / "mmlu_dev.jsonl")
    prompts = load_datasets([DatasetSpec("mmlu")], data_dir=tmp_path, split="dev", subjects=["us_foreign_policy"])
    message = (
        "There is a single choice question about us foreign policy. "
        "Answer the question by replying A, B, C or D.\n"
        'Question: In us_foreign_policy, "1",\nwhich?\nChoices:\nA. 1a, é\nB. 1b, é\nC. 1c, é\nD. 1d, é\nAnswer:'
    )
    assert prompts[1] == Prompt(
        "mmlu_dev_us_foreign_policy_1",
        messages=({"role": "user", "content": message},),
        answer="B",
        subject="us_foreign_policy",
    )
    assert prompts == [question_prompt(question) for question in expected("dev", ["us_foreign_policy"])]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subject": "astrology"}, "'astrology' is none of MMLU's 57 subjects"),
        ({"subject": None}, "'subject' must be a text that is not blank, not nothing"),
        ({"question": 5}, "'question' must be a text that is not blank, not 5"),
        ({"choices": ["a", "b", "c"]}, "'choices' must be a list of 4 texts, not 3 of them"),
        ({"choices": ["a", "b", "c", ""]}, "choice D must be a text that is not blank, not ''"),
        ({"answer": 4}, "'answer' must be an index from 0 to 3 or a letter from A to D, not 4"),
        ({"answer": None}, "'answer' must be an index from 0 to 3 or a letter from A to D, not nothing"),
        ({"id": ""}, "'id' must be a text that is not blank, not ''"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path, change, message):
    path = tmp_path / "mmlu_test.jsonl"
    write_json_lines(path, [*ROWS[:2], {**ROWS[2], **change}, *ROWS[3:]])
    with pytest.raises(InputError) as raised:
        load_mmlu("test", data_dir=tmp_path)
    assert str(raised.value) == f"{path}, line 3: {message}"


def test_an_id_given_twice(tmp_path):
    path = tmp_path / "mmlu_test.jsonl"
    write_json_lines(path, [{**ROWS[0], "id": "x"}, ROWS[1], {**ROWS[2], "id": "x"}])
    with pytest.raises(InputError, match=f"{path}, line 3 has the id 'x' of {path}, line 1: ids must be unique"):
        load_mmlu("test", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"q,a,b,c,d,A\nq,a,b,c,A\n", ", line 2 has 5 columns: question, 4 options and letter are expected"),
        (b"q,a,b,c,d,E\n", ", line 1: 'answer' must be an index from 0 to 3 or a letter from A to D, not 'E'"),
        (b"q,a,b,c,d,\n", ", line 1: 'answer' must be an index from 0 to 3 or a letter from A to D, not ''"),
        (b"question,A,B,C,D,answer\n", ", line 1: 'answer' must be an index from 0 to 3 or a letter from A to D, not"),
        (b'\n"q\nr",a,b,c,,A\n', ", line 3: choice D must be a text that is not blank, not ''"),
        (b"caf\xe9,a,b,c,d,A\n", " is no CSV file in UTF-8 ('utf-8' codec can't decode byte 0xe9"),
        (b'"' + b"x" * 200_000, " is no CSV file in UTF-8 (field larger than field limit (131072))"),
    ],
)
def test_a_bad_csv_file(tmp_path, content, message):
    write_csv(tmp_path, "test")
    path = tmp_path / "test" / "anatomy_test.csv"
    path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        load_mmlu("test", data_dir=tmp_path)
    assert str(raised.value).startswith(f"{path}{message}")


def test_a_csv_file_may_begin_with_a_byte_order_mark_and_have_blank_lines(tmp_path):
    write_csv(tmp_path, "test", rows_of("anatomy"))
    path = tmp_path / "test" / "anatomy_test.csv"
    path.write_bytes(b'\xef\xbb\xbf"a, b",1,2,3,4,D\r\n\r\nc,1,2,3,4,A\r\n')
    questions = load_mmlu("test", data_dir=tmp_path, subjects=["anatomy"])
    assert [(q.question, q.answer) for q in questions] == [("a, b", 3), ("c", 0)]


def test_a_csv_that_cannot_be_opened(tmp_path, monkeypatch):
    write_csv(tmp_path, "test", rows_of("anatomy"))
    path = tmp_path / "test" / "anatomy_test.csv"

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(InputError) as raised:
        load_mmlu("test", data_dir=tmp_path, subjects=["anatomy"])
    assert str(raised.value) == f"{path} cannot be read (Permission denied): make it readable"


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_subjects_without_questions_are_an_error(tmp_path, kind):
    absent = {"anatomy", "virology", "sociology", "marketing"}
    rows = [row for row in ROWS if row["subject"] not in absent]
    if kind == "json":
        write_json_lines(tmp_path / "mmlu_test.jsonl", rows)
    else:
        write_csv(tmp_path, "test", rows)
    place = tmp_path / ("mmlu_test.jsonl" if kind == "json" else "test")
    with pytest.raises(InputError) as raised:
        load_mmlu("test", data_dir=tmp_path)
    assert str(raised.value) == (
        f"{place} has no test questions of anatomy, marketing, sociology and 1 more: "
        "complete it, or name only subjects it has"
    )
    with pytest.raises(InputError, match="has no test questions of virology: complete it"):
        load_mmlu("test", data_dir=tmp_path, subjects=["virology", "astronomy"])


def test_a_folder_without_mmlu(tmp_path):
    with pytest.raises(InputError) as raised:
        load_mmlu("validation", data_dir=tmp_path)
    assert str(raised.value) == (
        f"{tmp_path} holds no MMLU validation questions: they are expected in mmlu_val.jsonl, mmlu_val.jsonl.gz "
        "or val/<subject>_val.csv, there or in its folder mmlu"
    )
    with pytest.raises(InputError, match="absent does not exist: name the folder that holds MMLU"):
        load_mmlu("validation", data_dir=tmp_path / "absent")


@pytest.mark.parametrize(
    ("subjects", "message"),
    [
        (["high_school_maths"], "MMLU has no subject 'high_school_maths': do you mean 'high_school_mathematics'?"),
        (["qqq"], "MMLU has no subject 'qqq': subjects are 'abstract_algebra' to 'world_religions'"),
        ([], "no MMLU subject is chosen: name at least one"),
    ],
)
def test_unknown_subjects(tmp_path, subjects, message):
    with pytest.raises(InputError) as raised:
        load_mmlu("test", data_dir=tmp_path, subjects=subjects)
    assert str(raised.value) == message


def test_an_unknown_split(tmp_path):
    with pytest.raises(InputError, match="MMLU split 'val' is unknown: choose dev, validation, test"):
        load_mmlu("val", data_dir=tmp_path)


@pytest.mark.data
@pytest.mark.parametrize(("split", "count"), [("dev", 285), ("validation", 1531), ("test", 14042)])
def test_the_real_questions(data_dir, split, count):
    questions = load_mmlu(split, data_dir=data_dir)
    assert len(questions) == len({question.id for question in questions}) == count
    assert {question.subject for question in questions} == set(SUBJECTS)
    assert load_mmlu(split, data_dir=data_dir / "mmlu") == questions
    sampled = load_datasets([DatasetSpec("mmlu")], data_dir=data_dir, split=split, samples_per_subject=5)
    assert set(Counter(prompt.subject for prompt in sampled).values()) == {5}
    if split == "test":
        # 270 of them are on high school mathematics.
        assert len(load_mmlu(split, data_dir=data_dir, subjects=PUBLIC_SUBJECTS)) == 14042 - 270
