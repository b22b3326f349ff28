import pytest
import torch
from dialled_models import EXAMPLES, POSITIONS, TEXTS
from peft import PeftModel
from tiny import make_model, make_tokenizer

from loki.study.dialled import dialled_parts
from loki.study.settings import DialSection


def parts(folder, by):
    section = DialSection(by=by, examples=2, text_tokens=200)
    return dialled_parts(section, make_model(), folder, make_tokenizer(), EXAMPLES, TEXTS)


def changes(model):
    """By layer, what the down-projection's rows have changed by."""
    base = make_model()
    return [
        after.mlp.down_proj.weight.detach() - before.mlp.down_proj.weight.detach()
        for before, after in zip(base.model.layers, model.model.layers, strict=True)
    ]


@pytest.mark.parametrize(
    ("kind", "by"), [("rows", "layers"), ("rows", "rows"), ("product", "rows"), ("lora", "layers")]
)
def test_the_whole_is_what_was_trained_bit_for_bit(trained, kind, by):
    folder = trained(kind)
    whole = PeftModel.from_pretrained(make_model(), folder).merge_and_unload()
    part = parts(folder, by)
    part(0.5)  # leaves nothing behind
    for (name, expected), found in zip(whole.named_parameters(), part(1.0).parameters(), strict=True):
        assert torch.equal(expected, found), name


def test_by_rows_some_are_kept_and_the_others_are_the_base(trained):
    folder = trained("rows")
    part = parts(folder, "rows")
    whole, half = changes(part(1.0)), changes(part(0.5))
    kept = 0
    for layer, rows in enumerate(POSITIONS):
        for row in rows:
            change = half[layer][row]
            assert torch.equal(change, whole[layer][row]) or not change.any()
            kept += bool(change.any())
    assert kept == sum(map(len, POSITIONS)) // 2


def test_by_layer_each_is_scaled_by_its_own_factor(trained):
    folder = trained("rows")
    part = parts(folder, "layers")
    whole, some = changes(part(1.0)), changes(part(0.4))
    factors = [float((b * a).sum() / (a * a).sum()) for a, b in zip(whole, some, strict=True)]
    for factor, a, b in zip(factors, whole, some, strict=True):
        assert torch.allclose(b, factor * a, atol=1e-6)
        assert 0 <= factor <= 1
    assert max(factors) - min(factors) > 0.05
