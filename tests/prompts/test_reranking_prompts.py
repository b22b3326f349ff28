"""Reranking data: what rows become, what is drawn for training, how passages are cut, and what is refused."""

import json
from collections import Counter

import pytest

from loki.errors import InputError
from loki.prompts.reranking import (
    SCALES,
    RankedQuery,
    cut_passage,
    load_passages,
    load_queries,
    make_relevance_examples,
    relevance_messages,
)


@pytest.fixture
def write(tmp_path):
    def write_rows(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return path

    return write_rows


def query_row(**changes):
    return {"id": "q", "query": "Do bees dance?", "positives": ["p1"], "bm25_top20": ["p2", "p1"], **changes}


def test_passages_have_their_title_in_front(write):
    rows = [{"id": "a", "title": "Bees.", "text": "They dance."}, {"id": "b", "title": "", "text": "No."}]
    assert load_passages(write(*rows, {"id": "c", "text": "Ah."})) == {"a": "Bees. They dance.", "b": "No.", "c": "Ah."}


def test_queries_in_a_drawn_order_of_which_fewer_are_the_beginning(write):
    path = write(*(query_row(id=f"q{index}") for index in range(12)))
    queries = load_queries(path)
    assert sorted(query.id for query in queries) == sorted(f"q{index}" for index in range(12))
    assert [query.id for query in queries] != [f"q{index}" for index in range(12)]
    assert load_queries(path, count=5) == queries[:5]
    assert load_queries(path, seed=1) != queries
    assert RankedQuery("q0", "Do bees dance?", ("p1",), ("p2", "p1")) in queries


def test_the_prompt_is_lb_rerankers():
    assert relevance_messages("Q?", "P.", "relevance") == (
        {
            "role": "system",
            "content": "Given a query and a piece of text, output a score of 1-7 based on how related the query is to "
            "the text. 1 means least related and 7 is most related.",
        },
        {"role": "user", "content": "<<<Query>>>\nQ?\n\n<<<Context>>>\nP."},
    )
    yes_no = relevance_messages("Q?", "P.", "yes-no")
    assert yes_no[1] == relevance_messages("Q?", "P.", "relevance")[1]
    assert "yes" in yes_no[0]["content"]


def test_scales_go_from_the_least_related_to_the_most():
    assert SCALES["relevance"].answers == tuple("1234567")
    assert SCALES["relevance"].values == (1, 2, 3, 4, 5, 6, 7)
    assert (SCALES["yes-no"].answers, SCALES["yes-no"].values) == (("no", "yes"), (0, 1))


PASSAGES = {f"p{index}": f"Passage {index}." for index in range(12)}
QUERIES = [
    RankedQuery("q1", "One?", ("p0", "p11"), tuple(f"p{index}" for index in range(10))),
    RankedQuery("q2", "Two?", ("p1",), ("p1", "p2")),
]


@pytest.mark.parametrize(("scale", "low", "high"), [("relevance", "1", "7"), ("yes-no", "no", "yes")])
@pytest.mark.parametrize(("negatives", "drawn"), [(0, (0, 0)), (1, (2, 1)), (3, (6, 1)), (99, (9, 1))])
def test_all_relevant_passages_and_so_many_others(tokenizer, scale, low, high, negatives, drawn):
    examples = make_relevance_examples(QUERIES, PASSAGES, tokenizer, scale=scale, negatives_per_positive=negatives)
    answers = {example.id: example.answer for example in examples}
    assert len(answers) == len(examples)
    assert {id_ for id_, answer in answers.items() if answer == high} == {"q1-p0", "q1-p11", "q2-p1"}
    others = [id_ for id_, answer in answers.items() if answer == low]
    assert Counter(id_[:2] for id_ in others) == Counter({"q1": drawn[0], "q2": drawn[1]})
    assert set(others) <= {"q2-p2", *(f"q1-p{index}" for index in range(1, 10))}


def test_an_example_holds_its_query_and_passage(tokenizer):
    examples = make_relevance_examples(QUERIES, PASSAGES, tokenizer)
    (example,) = [example for example in examples if example.id == "q2-p2"]
    assert example.as_prompt_completion() == {
        "prompt": list(relevance_messages("Two?", "Passage 2.", "relevance")),
        "completion": [{"role": "assistant", "content": "1"}],
    }


def test_examples_are_drawn_and_fewer_are_the_beginning_of_more(tokenizer):
    def make(queries=QUERIES, **changes):
        return make_relevance_examples(queries, PASSAGES, tokenizer, negatives_per_positive=3, **changes)

    assert make(count=4) == make()[:4]
    assert {example.id for example in make(seed=1)} != {example.id for example in make()}
    assert {example.id for example in make(QUERIES[:1])} < {example.id for example in make()}


def test_passages_are_cut_by_tokens_and_never_inside_a_character(tokenizer):
    assert cut_passage(tokenizer, "Bees dance.", 11) == "Bees dance."
    assert cut_passage(tokenizer, "Bees dance.", 4) == "Bees"
    assert cut_passage(tokenizer, "a – b", 3) == "a "
    assert cut_passage(tokenizer, "a – b", 5) == "a –"
    examples = make_relevance_examples(QUERIES[1:], PASSAGES, tokenizer, passage_tokens=3)
    assert {example.messages[1]["content"] for example in examples} == {"<<<Query>>>\nTwo?\n\n<<<Context>>>\nPas"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": None}, "'id' must be a text that is not blank, not nothing"),
        ({"query": " "}, "'query' must be a text that is not blank, not ' '"),
        ({"positives": []}, r"'positives' must be a list of one or more passage ids, not \[\]"),
        ({"bm25_top20": [3]}, r"'bm25_top20' must be a list of one or more passage ids, not \[3\]"),
        ({"bm25_top20": ["p", "p"]}, "'bm25_top20' has 'p' more than once: name each passage once"),
    ],
)
def test_what_a_query_cannot_be(write, changes, message):
    with pytest.raises(InputError, match=f"rows.jsonl, line 2: {message}"):
        load_queries(write(query_row(), query_row(**changes)))


def test_what_cannot_be_read_or_made(write, tokenizer):
    with pytest.raises(InputError, match="line 2 has the id 'a' again: give each passage an id of its own"):
        load_passages(write({"id": "a", "text": "x"}, {"id": "a", "text": "y"}))
    with pytest.raises(InputError, match="line 1: 'title' must be a text, not 3"):
        load_passages(write({"id": "a", "title": 3, "text": "x"}))
    with pytest.raises(InputError, match="has no passages: name a file that has some"):
        load_passages(write())
    with pytest.raises(InputError, match="0 queries are not possible: ask for 1 or more"):
        load_queries(write(query_row()), count=0)
    with pytest.raises(InputError, match=r"2 queries are more than the 1 in .*: ask for fewer"):
        load_queries(write(query_row()), count=2)
    with pytest.raises(InputError, match="1 queries are more than the 0 in"):
        load_queries(write())
    with pytest.raises(InputError, match="-1 negatives per positive are not possible: give 0 or more"):
        make_relevance_examples(QUERIES, PASSAGES, tokenizer, negatives_per_positive=-1)
    with pytest.raises(InputError, match="0 examples are not possible: ask for 1 or more"):
        make_relevance_examples(QUERIES, PASSAGES, tokenizer, count=0)
    with pytest.raises(InputError, match="7 examples are more than the 6 there are: ask for fewer, or for more neg"):
        make_relevance_examples(QUERIES, PASSAGES, tokenizer, count=7)
    with pytest.raises(InputError, match=r"passage 'p.*' of query 'q.' is not among the 1 passages: give the corpus"):
        make_relevance_examples(QUERIES, {"x": "y"}, tokenizer)
    with pytest.raises(InputError, match="0 tokens of a passage are not possible: give 1 or more"):
        cut_passage(tokenizer, "x", 0)


@pytest.mark.data
def test_scifact_is_read_whole(data_dir):
    passages = load_passages(data_dir / "rerank/scifact_corpus.jsonl.gz")
    train, test = (load_queries(data_dir / f"rerank/scifact_{part}.jsonl") for part in ("train", "test"))
    assert (len(passages), len(train), len(test)) == (5183, 809, 240)
    assert sum(len(query.positives) for query in train) == 919
    named = {passage_id for query in [*train, *test] for passage_id in (*query.positives, *query.candidates)}
    assert named <= set(passages)
    assert not {query.id for query in train} & {query.id for query in test}
