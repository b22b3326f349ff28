"""Tasks that are learned: on files like those of the data folder, with replies that are known."""

import json
import logging
from functools import partial

import pytest
import torch
from tiny import make_model, make_tokenizer

from loki.errors import ArtefactError, InputError
from loki.evaluation import downstream
from loki.evaluation.benchmarks.rows import find_file
from loki.evaluation.bfcl import is_right
from loki.evaluation.downstream import CALLS, CORPUS, DOWNSTREAM, QUERIES, evaluate_downstream
from loki.evaluation.reranking import rank_passages, score_rankings
from loki.prompts.bfcl import read_requests
from loki.prompts.render import render_chat
from loki.prompts.reranking import load_passages, load_queries

FUNCTION = {"name": "Get News", "parameters": {"properties": {"q": {"type": "string"}}, "required": ["q"]}}
WORDS = "sun", "moon", "sea", "snow"


def call_row(index, **changes):
    row = {
        "id": f"r{index}",
        "category": "live_simple" if index % 2 else "simple_python",
        "functions": [FUNCTION],
        "messages": [{"role": "user", "content": f"News of the {WORDS[index % 4]}, number {index}?"}],
        "answer": f'[Get News(q="{WORDS[index % 4]}")]',
        "ground_truth": [{"Get News": {"q": [WORDS[index % 4]]}}],
    }
    return row | changes


def tool_row(index):
    row = call_row(index)
    call = {"name": "Get News", "arguments": {"q": WORDS[index]}}
    turns = [*row["messages"], {"role": "assistant", "content": row["answer"], "tool_calls": [call]}]
    return {"id": row["id"], "functions": row["functions"], "messages": turns}


def write(folder, name, rows):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "data"
    nothing = call_row(4, functions=[FUNCTION], ground_truth=None, answer=None, category="irrelevance")
    write(folder, CALLS["bfcl"], [*(call_row(index) for index in range(4)), nothing])
    write(folder, CALLS["toolace"], [tool_row(index) for index in range(3)])
    write(folder, CALLS["acebench"], [call_row(0, category="normal", ground_truth={"Get News": {"q": "sun"}})])
    write(
        folder,
        CORPUS,
        [{"id": f"p{index}", "title": word, "text": f"On the {word}."} for index, word in enumerate(WORDS)],
    )
    queries = [
        {"id": f"q{index}", "query": word, "positives": [f"p{index}"], "bm25_top20": ["p0", "p1", "p2", "p3"]}
        for index, word in enumerate(WORDS)
    ]
    write(folder, QUERIES, queries)
    return folder


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def replies(monkeypatch):
    """What is replied to a request, by its number; `[]` to all others. And what was asked."""
    said, asked = {}, []

    def generate(_model, _tokenizer, conversations, **options):
        asked.append((len(conversations), options["batch_size"], options["max_new_tokens"]))
        texts = [messages[-1]["content"] for messages in conversations]
        return [next((reply for end, reply in said.items() if text.endswith(f"number {end}?")), "[]") for text in texts]

    monkeypatch.setattr("loki.evaluation.bfcl.generate_replies", generate)
    return said, asked


def means(found):
    return {scores.task: scores.mean.value for scores in found}


def test_function_calls_by_hand(model, tokenizer, files, replies):
    said, asked = replies
    said |= {0: '[Get News(q="sun")]', 1: '[Get News(q="moon")]', 2: '[Get News(q="snow")]'}
    found = evaluate_downstream(model, tokenizer, ["bfcl", "toolace", "acebench"], data_dir=files)
    assert means(found) == {
        # 0 and 1 are right, 2 and 3 are not, and 4 is a right refusal.
        "bfcl": pytest.approx(60),
        "bfcl_calls": 50,
        "bfcl_single": 50,
        "bfcl_live": 50,
        "bfcl_non_live": 50,
        "bfcl_irrelevance": 100,
        "toolace": pytest.approx(200 / 3),
        "toolace_calls": pytest.approx(200 / 3),
        "toolace_single": pytest.approx(200 / 3),
        "acebench": 100,
        "acebench_calls": 100,
        "acebench_single": 100,
    }
    assert asked == [(5, 8, 128), (3, 8, 128), (1, 8, 128)]


def test_reranking_is_that_of_its_parts(model, tokenizer, files):
    found = evaluate_downstream(model, tokenizer, ["scifact"], data_dir=files)
    passages, queries = load_passages(files / CORPUS), load_queries(files / QUERIES)
    expected = score_rankings(rank_passages(model, tokenizer, queries, passages))
    assert means(found) == {name: pytest.approx(scores.mean.value) for name, scores in expected.items()}
    assert found[-1].ids == ("q0", "q1", "q2", "q3")
    assert len(set(found[-1].scores)) > 1


def test_a_smaller_draw_is_part_of_a_larger_one(model, tokenizer, files, replies):
    evaluate = partial(evaluate_downstream, model, tokenizer, data_dir=files)
    ids = [evaluate([task], limit=limit)[0].ids for task in ("bfcl", "scifact") for limit in (2, 3)]
    assert [len(found) for found in ids] == [2, 3, 2, 3]
    assert set(ids[0]) < set(ids[1])
    assert set(ids[2]) < set(ids[3])


@pytest.mark.parametrize("task", ["bfcl", "scifact"])
def test_the_same_call_goes_on_where_it_stopped(model, tokenizer, files, replies, tmp_path, monkeypatch, caplog, task):
    monkeypatch.setattr(downstream, "REQUESTS_AT_ONCE", 2)
    replies[0][0] = '[Get News(q="sun")]'
    evaluate = partial(evaluate_downstream, model, tokenizer, [task], data_dir=files)
    folder = tmp_path / "parts"

    def stop(items, what, **_):
        yield items[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(folder=folder, track=stop)
    assert len(json.loads((folder / f"{task}.json").read_text())["scores"]) == 2
    sizes_left = []

    def track(items, what, *, sizes=None, unit=""):
        sizes_left.append(sum(sizes))
        return items

    with caplog.at_level(logging.INFO, logger="loki"):
        assert evaluate(folder=folder, track=track) == evaluate()
    assert sizes_left == [{"bfcl": 3, "scifact": 2}[task]]
    assert f"{task}: 2 of " in caplog.text
    for options, difference in (({"limit": 3}, "items"), ({"max_new_tokens": 5}, "items")):
        if task == "bfcl" or "limit" in options:
            with pytest.raises(ArtefactError, match=f"another evaluation \\(other {difference}\\)"):
                evaluate(folder=folder, **options)
    with pytest.raises(ArtefactError, match="other model"):
        evaluate_downstream(make_model(1), tokenizer, [task], data_dir=files, folder=folder)
    stored = json.loads((folder / f"{task}.json").read_text())
    (folder / f"{task}.json").write_text(json.dumps(stored | {"scores": {"r0": 5, "q0": 5}}))
    with pytest.raises(ArtefactError, match="holds no scores: remove it"):
        evaluate(folder=folder)


def test_other_passages_are_another_evaluation(model, tokenizer, files, tmp_path):
    evaluate = partial(evaluate_downstream, model, tokenizer, ["scifact"], data_dir=files, folder=tmp_path / "parts")
    evaluate()
    write(files, CORPUS, [{"id": f"p{index}", "title": "", "text": "Else."} for index in range(4)])
    with pytest.raises(ArtefactError, match="other items"):
        evaluate()


def test_requests_beyond_the_models_positions_are_left_out(tokenizer, files, replies, caplog):
    longer = call_row(0, id="long", messages=[{"role": "user", "content": "sun " * 600}])
    write(files, CALLS["bfcl"], [call_row(0), longer])
    ids = evaluate_downstream(make_model(), tokenizer, ["bfcl"], data_dir=files)[0].ids
    assert ids == ("r0",)
    assert "bfcl: 1 of 2 requests are left out because they and a reply of 128 tokens are longer than" in caplog.text
    assert "2048 positions" in caplog.text
    # A reply of one token less than is left has its place.
    (_, request) = read_requests(files / CALLS["bfcl"])
    length = len(tokenizer(render_chat(tokenizer, request.messages)).input_ids)
    for room, expected in ((length + 4, ("r0", "long")), (length + 3, ("r0",))):
        model = make_model(max_position_embeddings=room)
        assert evaluate_downstream(model, tokenizer, ["bfcl"], data_dir=files, max_new_tokens=4)[0].ids == expected
    with pytest.raises(InputError, match="has no request that fits the model's 9 positions: leave it out"):
        evaluate_downstream(make_model(max_position_embeddings=9), tokenizer, ["bfcl"], data_dir=files)


def test_a_model_that_came_apart_is_told(model, tokenizer, files):
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="task 'scifact': the model's probabilities are not numbers"):
        evaluate_downstream(model, tokenizer, ["scifact"], data_dir=files)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("piqa", {}, "task 'piqa' is none that is learned: choose from bfcl, acebench, toolace, scifact"),
        ("bfcl", {"limit": 0}, "limit 0 is not possible: give 1 or more"),
        ("bfcl", {"batch_size": 0}, "batch size 0 is not possible"),
        ("bfcl", {"max_new_tokens": -1}, "max_new_tokens -1 is not possible"),
    ],
)
def test_what_is_refused(model, tokenizer, files, task, options, message):
    with pytest.raises(InputError, match=message):
        evaluate_downstream(model, tokenizer, [task], data_dir=files, **options)


def test_files_that_cannot_be_used(model, tokenizer, files):
    query = {"id": "q", "query": "x", "positives": ["p0"], "bm25_top20": ["p0"]}
    for name, path, row in (("bfcl", CALLS["bfcl"], call_row(0)), ("scifact", QUERIES, query)):
        write(files, path, [row, row])
        with pytest.raises(InputError, match=f"has the id '{row['id']}' more than once: ids must be unique"):
            evaluate_downstream(model, tokenizer, [name], data_dir=files)
        write(files, path, [])
        with pytest.raises(InputError, match=r"has no rows|more than the 0"):
            evaluate_downstream(model, tokenizer, [name], data_dir=files)
        (files / path).unlink()
        with pytest.raises(InputError, match=f"has no data for task '{name}': it is expected in"):
            evaluate_downstream(model, tokenizer, [name], data_dir=files)


@pytest.mark.data
@pytest.mark.parametrize(("task", "wrong"), [("bfcl", 6), ("acebench", 1), ("toolace", 0)])
def test_accepted_answers_of_the_data_folder_are_right(data_dir, task, wrong):
    """All but those that the rows' own accepted values refuse."""
    requests = read_requests(find_file(task, CALLS[task], data_dir))
    assert sum(not is_right(request.answer, request) for request in requests) == wrong
    # Another request's answer is right for hardly any: for those that ask for the same.
    shifted = zip(requests, [*requests[1:], requests[0]], strict=True)
    right = sum(is_right(other.answer, request) for request, other in shifted if request.ground_truth)
    assert right < 0.02 * len(requests)


@pytest.mark.data
def test_every_task_of_the_data_folder_is_scored(data_dir, tokenizer):
    model = make_model(max_position_embeddings=40_000)
    found = evaluate_downstream(model, tokenizer, DOWNSTREAM, data_dir=data_dir, limit=1, max_new_tokens=2)
    assert {scores.task.split("_")[0] for scores in found} == set(DOWNSTREAM)
