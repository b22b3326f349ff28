"""Several sources of prompts, whole, drawn or in proportions."""

import json
from itertools import permutations

import pytest

from loki.errors import InputError
from loki.prompts.prompt import question_prompt
from loki.prompts.questions import load_probe
from loki.prompts.sources import DatasetSpec, describe_datasets, load_datasets, parse_dataset


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """Work in an empty folder, and write files of so many prompts there."""
    monkeypatch.chdir(tmp_path)

    def write(name, count, **fields):
        rows = [{"prompt": f"{name} {number}", **fields} for number in range(count)]
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    return write


def contents(prompts):
    return [prompt.messages[0]["content"] for prompt in prompts]


def load(*specs, **options):
    return load_datasets([parse_dataset(spec) for spec in specs], **options)


@pytest.mark.parametrize(
    ("spec", "name", "share"),
    [
        ("probe", "probe", None),
        ("mmlu", "mmlu", None),
        ("dir/own.jsonl.gz", "dir/own.jsonl.gz", None),
        ("mmlu=0.7", "mmlu", 0.7),
        ("mmlu=70%", "mmlu", 0.7),
        ("mmlu=12.3%", "mmlu", 0.123),
        ("mmlu=3", "mmlu", 3.0),
        ("a=b.jsonl=1e-2", "a=b.jsonl", 0.01),
    ],
)
def test_names_and_shares(spec, name, share):
    assert parse_dataset(spec) == DatasetSpec(name, share)


def test_a_file_that_exists_is_a_path_whatever_it_holds(in_folder):
    in_folder("a=0.5", 1)
    in_folder("a=b.jsonl", 1)
    assert parse_dataset("a=0.5") == DatasetSpec("a=0.5")
    assert parse_dataset("a=b.jsonl") == DatasetSpec("a=b.jsonl")
    assert parse_dataset("a=0.5=0.5") == DatasetSpec("a=0.5", 0.5)


@pytest.mark.parametrize("share", ["0", "0%", "-1", "x", "nan", "inf", "1e999", "b.jsonl", "%", "50 % x"])
def test_what_is_no_share(share):
    with pytest.raises(InputError) as raised:
        parse_dataset(f"mmlu={share}")
    assert str(raised.value) == (
        f"dataset 'mmlu={share}' is no file, and {share!r} is no share: write a number above 0, such as =0.7 or =70%"
    )


def test_a_name_or_a_share_left_out():
    with pytest.raises(InputError, match=r"dataset 'mmlu=' has no share after '=': write it as mmlu=0.7 or =70%"):
        parse_dataset("mmlu=")
    for spec in ("", "=0.5"):
        with pytest.raises(InputError, match=f"dataset '{spec}' has no name: choose probe, mmlu or a JSON Lines file"):
            parse_dataset(spec)


def test_the_probe_is_its_half_for_analysis():
    prompts = load("probe")
    assert prompts == [question_prompt(question) for question in load_probe("analysis")]
    assert len(prompts) == 114
    assert not {prompt.id for prompt in prompts} & {question.id for question in load_probe("evaluation")}
    assert {prompt.answer for prompt in prompts} == set("ABCD")


def test_without_shares_everything_is_taken_in_the_order_given(in_folder):
    in_folder("b.jsonl", 3)
    in_folder("a.jsonl", 2)
    prompts = load("b.jsonl", "probe", "a.jsonl")
    assert contents(prompts)[:3] == ["b.jsonl 0", "b.jsonl 1", "b.jsonl 2"]
    assert contents(prompts)[-2:] == ["a.jsonl 0", "a.jsonl 1"]
    assert len(prompts) == 3 + 114 + 2
    assert [prompt.id for prompt in prompts[:3]] == ["b:1", "b:2", "b:3"]


def test_a_number_without_shares_is_drawn_from_all_together(in_folder):
    in_folder("b.jsonl", 30)
    in_folder("a.jsonl", 20)
    everything = load("b.jsonl", "a.jsonl")
    drawn = load("b.jsonl", "a.jsonl", num_prompts=25)
    assert len(drawn) == 25
    assert drawn == [prompt for prompt in everything if prompt in drawn]
    assert {content.split()[0] for content in contents(drawn)} == {"a.jsonl", "b.jsonl"}
    assert drawn == load("b.jsonl", "a.jsonl", num_prompts=25)
    assert drawn != load("b.jsonl", "a.jsonl", num_prompts=25, seed=1)
    assert load("b.jsonl", "a.jsonl", num_prompts=50) == everything


def counts_of(prompts):
    found = [content.split()[0] for content in contents(prompts)]
    return {name: found.count(name) for name in dict.fromkeys(found)}


def test_shares_give_exact_proportions(in_folder):
    in_folder("a.jsonl", 30)
    in_folder("b.jsonl", 50)
    in_folder("c.jsonl", 9)
    assert counts_of(load("a.jsonl=0.7", "b.jsonl=0.3")) == {"a.jsonl": 30, "b.jsonl": 13}
    assert counts_of(load("a.jsonl=70%", "b.jsonl=30%", num_prompts=10)) == {"a.jsonl": 7, "b.jsonl": 3}
    assert counts_of(load("b.jsonl=2", "a.jsonl=2", "c.jsonl=1", num_prompts=24)) == {
        "b.jsonl": 10,
        "a.jsonl": 9,
        "c.jsonl": 5,
    }
    assert counts_of(load("b.jsonl=0.2")) == {"b.jsonl": 50}


def test_drawing_by_shares_is_seeded_and_keeps_the_order_of_a_source(in_folder):
    in_folder("a.jsonl", 30)
    in_folder("b.jsonl", 30)
    whole = {name: contents(load(name)) for name in ("a.jsonl", "b.jsonl")}
    found = contents(load("a.jsonl=0.5", "b.jsonl=0.5", num_prompts=20))
    assert found == [text for name in whole for text in whole[name] if text in found]
    assert found == contents(load("a.jsonl=1", "b.jsonl=1", num_prompts=20))
    assert found != contents(load("a.jsonl=1", "b.jsonl=1", num_prompts=20, seed=1))
    assert {text.split()[1] for text in found[:10]} != {text.split()[1] for text in found[10:]}
    assert set(found) < set(contents(load("a.jsonl=1", "b.jsonl=1", num_prompts=40)))


def test_the_order_of_sources_changes_no_draw(in_folder):
    names = ("a.jsonl", "b.jsonl", "probe")
    in_folder("a.jsonl", 30)
    in_folder("b.jsonl", 30)
    drawn = [set(contents(load(*(f"{name}=1" for name in order), num_prompts=30))) for order in permutations(names)]
    assert all(found == drawn[0] for found in drawn)


def test_samples_per_subject_are_taken_before_the_proportions(in_folder):
    in_folder("a.jsonl", 30, subject="anatomy")
    in_folder("b.jsonl", 30)
    assert counts_of(load("a.jsonl", "b.jsonl", samples_per_subject=5)) == {"a.jsonl": 5, "b.jsonl": 30}
    assert counts_of(load("a.jsonl=1", "b.jsonl=3", samples_per_subject=5)) == {"a.jsonl": 5, "b.jsonl": 16}
    assert len(load("probe", samples_per_subject=1)) == 57


def test_an_id_of_several_sources_gets_their_names_in_each(in_folder, tmp_path):
    in_folder("a.jsonl", 1, id="same")
    in_folder("b.jsonl", 1, id="same")
    in_folder("c.jsonl", 1, id="other")
    assert [prompt.id for prompt in load("b.jsonl", "c.jsonl", "a.jsonl")] == ["b:same", "other", "a:same"]
    assert [prompt.id for prompt in load("b.jsonl", "c.jsonl")] == ["same", "other"]


def test_files_of_one_name_are_told_apart_by_their_paths(in_folder):
    in_folder("x/a.jsonl", 1)
    in_folder("y/a.jsonl", 2)
    in_folder("probe.jsonl", 1, id=load_probe("analysis")[0].id)
    assert [prompt.id for prompt in load("x/a.jsonl", "y/a.jsonl")] == ["x/a.jsonl:a:1", "y/a.jsonl:a:1", "a:2"]
    first = load("probe", "probe.jsonl")
    assert (first[0].id, first[-1].id) == ("probe:abstract_algebra-1", "probe.jsonl:abstract_algebra-1")


def test_ids_that_no_prefix_sets_apart(in_folder, tmp_path):
    rows = [{"id": "x", "prompt": "1"}, {"id": "b:x", "prompt": "2"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    in_folder("b.jsonl", 1, id="x")
    with pytest.raises(InputError, match="several datasets have a prompt of the id 'b:x': give them other ids"):
        load("a.jsonl", "b.jsonl")


def test_whether_ids_clash_does_not_depend_on_the_draw(in_folder):
    in_folder("x/a.jsonl", 40)
    in_folder("y/a.jsonl", 40)
    drawn = load("x/a.jsonl=1", "y/a.jsonl=1", num_prompts=4)
    assert all(prompt.id.startswith(("x/a.jsonl:", "y/a.jsonl:")) for prompt in drawn)


@pytest.mark.parametrize(
    ("specs", "options", "message"),
    [
        ((), {}, "no dataset is given: choose probe, mmlu or a JSON Lines file"),
        (("prob",), {}, "dataset 'prob' is unknown: choose probe, mmlu or a JSON Lines file that exists"),
        (("x" * 5000,), {}, f"dataset '{'x' * 5000}' is unknown: choose probe"),
        (("a.jsonl", "./a.jsonl"), {}, "dataset 'a.jsonl' is given twice: name each dataset once"),
        (("x/../a.jsonl", "a.jsonl"), {}, "dataset 'x/../a.jsonl' is given twice: name each dataset once"),
        (("probe=1", "probe=2"), {}, "dataset 'probe' is given twice: name each dataset once"),
        (
            ("probe", "a.jsonl=0.5"),
            {},
            "dataset 'probe' has no share while another has: give every dataset one (such as probe=0.5), or none",
        ),
        (("a.jsonl",), {"num_prompts": 11}, "11 prompts are more than the 10 there are: ask for fewer"),
        (("a.jsonl",), {"num_prompts": 0}, "0 prompts are not possible: ask for 1 or more"),
        (("a.jsonl",), {"samples_per_subject": 0}, "0 samples per subject are not possible: ask for 1 or more"),
        (
            ("a.jsonl=0.5", "probe=0.5"),
            {"num_prompts": 22},
            "22 prompts in these shares need 11 of a, which has 10: ask for at most 20",
        ),
    ],
)
def test_what_cannot_be_loaded(in_folder, specs, options, message):
    in_folder("a.jsonl", 10)
    in_folder("x/other.jsonl", 1)
    with pytest.raises(InputError) as raised:
        load(*specs, **options)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("specs", "options", "description"),
    [
        (["probe"], {}, "probe"),
        (["mmlu"], {}, "mmlu:test"),
        (["mmlu"], {"split": "dev", "seed": 5}, "mmlu:dev"),
        (["mmlu"], {"samples_per_subject": 50}, "mmlu:test(50 per subject, seed 0)"),
        (
            ["mmlu"],
            {"samples_per_subject": 50, "subjects": ["anatomy", "virology"]},
            "mmlu:test(2 subjects, 50 per subject, seed 0)",
        ),
        (["some/dir/own.jsonl.gz", "probe"], {"subjects": ["anatomy"]}, "own.jsonl.gz+probe"),
        (["probe=0.3", "mmlu=70%"], {"seed": 3}, "probe=0.3+mmlu:test=0.7(seed 3)"),
        (["probe", "mmlu"], {"num_prompts": 9}, "probe+mmlu:test(9 prompts, seed 0)"),
    ],
)
def test_a_choice_in_a_few_words(specs, options, description):
    assert describe_datasets([parse_dataset(spec) for spec in specs], **options) == description
