import math

import pytest
import torch
from tiny import make_model

from loki.errors import InputError
from loki.evaluation.text import Text, load_texts, text_scores
from loki.prompts.parts import part_of

TEXTS = [
    Text("a", "the sea is blue and the sky is grey"),
    Text("b", "one two three four five six seven"),
    Text("c", ""),
]


def plain(model, tokenizer, text, reference=None):
    """Loss and KL of one text, token by token, in double precision."""
    ids = tokenizer(text).input_ids
    loss = divergence = 0.0
    for end in range(1, len(ids)):
        # One prefix at a time: no causal mask to trust.
        prefix = torch.tensor([ids[:end]])
        now = model(input_ids=prefix).logits[0, -1].double().log_softmax(-1)
        loss -= float(now[ids[end]].detach())
        if reference is not None:
            base = reference(input_ids=prefix).logits[0, -1].double().log_softmax(-1)
            divergence += float((base.exp() * (base - now)).sum().detach())
    return loss, divergence, len(ids) - 1


def test_parity_with_one_prefix_at_a_time(model, tokenizer):
    reference = make_model(seed=5)
    (loss, kl), (before,) = text_scores(model, tokenizer, "own", TEXTS[:2], reference=reference)
    assert before == text_scores(reference, tokenizer, "own", TEXTS[:2]).model[0]
    assert (loss.task, kl.task) == ("own_loss", "own_kl")
    assert loss.unit == kl.unit == "nats per token"
    assert not loss.higher_is_better
    sums = [plain(model, tokenizer, text.text, reference) for text in TEXTS[:2]]
    for found, place in ((loss, 0), (kl, 1)):
        # Float32 logits of order 1.
        assert found.scores == pytest.approx([part[place] / part[2] for part in sums], rel=1e-5)
        assert found.weights == tuple(part[2] for part in sums)
        assert found.mean.value == pytest.approx(sum(p[place] for p in sums) / sum(p[2] for p in sums), rel=1e-5)


def test_a_model_does_not_diverge_from_itself(model, tokenizer):
    (_, kl), _ = text_scores(model, tokenizer, "own", TEXTS[:2], reference=model)
    assert kl.scores == (0.0, 0.0)


def test_pieces_of_rows_change_nothing(model, tokenizer, monkeypatch):
    whole = text_scores(model, tokenizer, "own", TEXTS[:2], reference=make_model(seed=5)).model
    monkeypatch.setattr("loki.evaluation.text.ROWS_AT_ONCE", 2)
    parts = text_scores(model, tokenizer, "own", TEXTS[:2], reference=make_model(seed=5)).model
    for one, other in zip(whole, parts, strict=True):
        assert one.scores == pytest.approx(other.scores, rel=1e-6)


def test_windows_are_read_on_their_own(model, tokenizer):
    text = TEXTS[0].text
    ids = tokenizer(text).input_ids
    (found,) = text_scores(model, tokenizer, "own", TEXTS[:1], window=4).model
    starts = [start for start in range(0, len(ids), 4) if len(ids[start : start + 4]) > 1]
    assert found.ids == tuple(f"a/{number}" for number in range(len(starts)))
    assert found.weights == tuple(len(ids[start : start + 4]) - 1 for start in starts)
    alone = torch.tensor([ids[4:8]])
    logits = model(input_ids=alone).logits[0, :-1].log_softmax(-1)
    expected = -float(logits.gather(-1, alone[0, 1:, None]).mean().detach())
    assert found.scores[1] == pytest.approx(expected, rel=1e-5)


def test_a_text_of_one_token_has_nothing_to_predict(model, tokenizer):
    (found,) = text_scores(model, tokenizer, "own", [Text("c", ""), TEXTS[1]]).model
    assert found.ids == ("b/0",)
    with pytest.raises(InputError, match="has no two tokens in a row: give longer texts"):
        text_scores(model, tokenizer, "own", [Text("c", "")])


def test_max_tokens_takes_windows_until_there_are_enough(model, tokenizer):
    texts = [Text(str(number), TEXTS[0].text) for number in range(10)]
    length = len(tokenizer(TEXTS[0].text).input_ids) - 1
    (found,) = text_scores(model, tokenizer, "own", texts, max_tokens=2 * length + 1).model
    assert len(found.ids) == 3
    (again,) = text_scores(model, tokenizer, "own", texts, max_tokens=2 * length + 1).model
    assert again.ids == found.ids
    (other,) = text_scores(model, tokenizer, "own", texts, max_tokens=2 * length + 1, seed=1).model
    assert other.ids != found.ids
    (more,) = text_scores(model, tokenizer, "own", texts, max_tokens=3 * length + 1).model
    assert more.ids[:3] == found.ids
    (everything,) = text_scores(model, tokenizer, "own", texts, max_tokens=10**6).model
    assert len(everything.ids) == 10


def test_files_of_ones_own(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"id": "a", "text": "one two"}\n\n{"text": "three"}\n')
    assert load_texts(str(path)) == [Text("a", "one two"), Text("line 3", "three")]


def test_a_named_text_comes_from_the_data_folder(tmp_path):
    (tmp_path / "text").mkdir()
    rows = [f'{{"id": "c4_{number}", "text": "words {number}"}}' for number in range(40)]
    (tmp_path / "text/c4_demo.jsonl").write_text("\n".join(rows))
    everything = load_texts("c4", tmp_path)
    halves = {part: load_texts("c4", tmp_path, part=part) for part in ("analysis", "evaluation")}
    assert len(everything) == 40
    assert sorted(text.id for half in halves.values() for text in half) == sorted(text.id for text in everything)
    for part, texts in halves.items():
        assert {part_of(text.id) for text in texts} == {part}
        # 40 fair coins fall outside 8 to 32 once in 5,000 tries; the ids are fixed.
        assert 8 <= len(texts) <= 32


def test_parts_are_what_the_documentation_says():
    """The last digit of `printf a | sha256sum` is odd or even."""
    assert part_of("a") == "analysis"
    # They end in b, d and 6.
    assert part_of("b") == "analysis"
    assert part_of("c") == "evaluation"


@pytest.mark.parametrize(
    ("name", "rows", "text"),
    [
        ("c4", None, "text 'c4' comes from a data folder: give --data-dir"),
        ("pile", None, "text 'pile' is unknown: give wikitext2, c4 or a JSON Lines file with 'text'"),
        ("empty.jsonl", "\n", "is empty: give at least one row with 'text'"),
        ("blank.jsonl", '{"text": " "}\n', "line 1: 'text' must be a text that is not blank"),
    ],
)
def test_bad_texts(tmp_path, name, rows, text):
    if rows is not None:
        (tmp_path / name).write_text(rows)
        name = str(tmp_path / name)
    with pytest.raises(InputError) as error:
        load_texts(name)
    assert text in str(error.value)


def test_a_window_of_one_token_predicts_nothing(model, tokenizer):
    with pytest.raises(InputError, match="window 1 is not possible: give 2 tokens or more"):
        text_scores(model, tokenizer, "own", TEXTS, window=1)


def test_loss_is_the_logarithm_of_perplexity(model, tokenizer):
    """A model without any preference predicts one token in V."""
    with torch.no_grad():
        model.lm_head.weight.zero_()
    (found,) = text_scores(model, tokenizer, "own", TEXTS[:2]).model
    assert math.exp(found.mean.value) == pytest.approx(model.config.vocab_size, rel=1e-5)
