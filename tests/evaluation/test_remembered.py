"""A model that remembers what it read: the same numbers to the bit, and one reading of each text."""

import pytest
import torch
from families import FAMILY_MODELS
from peft import LoraConfig, get_peft_model
from tiny import make_model

from loki.evaluation.remembered import RememberedModel
from loki.evaluation.text import Text, text_scores
from loki.heads import plain_head

TEXTS = [Text("a", "the sea is blue and the sky is grey"), Text("b", "one two three four five six seven")]


def readings(model):
    """Counts how often the first decoder layer computes."""
    count = []
    model.get_decoder().layers[0].register_forward_hook(lambda *_: count.append(1))
    return count


def test_numbers_are_the_models_own(model, tokenizer):
    base = make_model(seed=5)
    remembered = RememberedModel(base)
    plain = text_scores(model, tokenizer, "own", TEXTS, reference=base)
    for _ in range(2):
        assert text_scores(model, tokenizer, "own", TEXTS, reference=remembered) == plain


def test_each_text_is_read_once(model, tokenizer):
    base = make_model(seed=5)
    count = readings(base)
    remembered = RememberedModel(base)
    for seed in (1, 2, 3):
        text_scores(make_model(seed=seed), tokenizer, "own", TEXTS, reference=remembered)
    assert len(count) == len(TEXTS)


def test_texts_that_begin_alike_are_two():
    model = make_model(seed=5)
    remembered = RememberedModel(model)
    short, long = torch.tensor([[3, 4, 5]]), torch.tensor([[3, 4, 5, 6]])
    for ids in (short, long, short.reshape(3, 1), torch.tensor([[3, 4, 7]]), long):
        assert torch.equal(remembered(input_ids=ids).logits, model(input_ids=ids, use_cache=False).logits)


@pytest.mark.parametrize("family", sorted(FAMILY_MODELS))
def test_every_family_reads_as_it_does_itself(family):
    model = FAMILY_MODELS[family].build()
    remembered = RememberedModel(model)
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    for _ in range(2):
        found = remembered(input_ids=ids).logits
        assert torch.equal(found, expected)
        assert not found.requires_grad


def test_what_an_adapter_changes_is_not_remembered():
    model = get_peft_model(make_model(seed=5), LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad(), model.disable_adapter():
        expected = model(input_ids=ids, use_cache=False).logits
    remembered = RememberedModel(model, reading=model.disable_adapter)
    assert torch.equal(remembered(input_ids=ids).logits, expected)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.add_(1.0)
    assert torch.equal(remembered(input_ids=ids).logits, expected)
    assert not torch.equal(model(input_ids=ids, use_cache=False).logits, expected)


def test_a_head_that_is_trained_is_plain_only_for_those_who_want_no_gradient_of_it():
    model = make_model(seed=5)
    assert plain_head(model) is None
    assert plain_head(model, trained=True) is model.get_output_embeddings()
    model.requires_grad_(False)
    assert plain_head(model) is model.get_output_embeddings()
