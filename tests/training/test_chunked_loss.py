import copy

import pytest
import torch
from families import FAMILY_MODELS
from tiny import make_model, make_tokenizer
from torch.nn import functional as F  # noqa: N812
from trl import SFTConfig

from loki.heads import PLAIN_HEADS
from loki.training import trainer
from loki.training.chunked_loss import chunked_loss
from loki.training.encoding import IGNORED
from loki.training.trainer import CompletionTrainer

T, D, V = 11, 6, 19


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return torch.randn(T, D, requires_grad=True), torch.randn(V, D), torch.randint(0, V, (T,))


@pytest.mark.parametrize("at_once", [1, 4, 11, 100])
def test_parity_with_cross_entropy(inputs, monkeypatch, at_once):
    monkeypatch.setattr("loki.training.chunked_loss.POSITIONS_AT_ONCE", at_once)
    hidden_TD, head_VD, targets_T = inputs
    expected = F.cross_entropy(hidden_TD @ head_VD.T, targets_T, reduction="sum")
    (expected_grad,) = torch.autograd.grad(3 * expected, hidden_TD)
    found = chunked_loss(hidden_TD, head_VD, targets_T)
    (found_grad,) = torch.autograd.grad(3 * found, hidden_TD)
    # A few dozen float32 operations in another order.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found_grad, expected_grad, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_that_of_finite_differences(inputs):
    hidden_TD, head_VD, targets_T = (x.double() if x.is_floating_point() else x for x in inputs)
    # Scores are computed in float32, whatever comes in: differences of 1e-2 stand above its rounding.
    torch.autograd.gradcheck(
        lambda hidden: chunked_loss(hidden, head_VD, targets_T),
        hidden_TD.detach().requires_grad_(),
        eps=1e-2,
        atol=2e-3,
    )


def test_bfloat16_keeps_its_dtype_and_sums_in_float32(inputs):
    hidden_TD, head_VD, targets_T = inputs
    hidden = hidden_TD.detach().bfloat16().requires_grad_()
    head = head_VD.bfloat16()
    found = chunked_loss(hidden, head, targets_T)
    assert found.dtype == torch.float32
    found.backward()
    assert hidden.grad.dtype == torch.bfloat16
    expected = F.cross_entropy((hidden @ head.T).float(), targets_T, reduction="sum")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def make_trainer(model, tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, max_length=None)
    from datasets import Dataset

    rows = Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [[IGNORED, 2, 3]]})
    return CompletionTrainer(model=model, args=args, train_dataset=rows, processing_class=make_tokenizer())


def batch(vocabulary):
    """Two examples, the second padded; answers of 4 and 2 tokens, apart from each other."""
    torch.manual_seed(1)
    input_ids = torch.randint(4, vocabulary, (2, 9))
    labels = input_ids.clone()
    labels[:, :3] = IGNORED
    labels[0, 5] = labels[0, 8] = IGNORED
    labels[1, 5:] = IGNORED
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 6:] = 0
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}


def plain_loss(model, inputs):
    """The definition, over all positions."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    return F.cross_entropy(
        logits.float().flatten(0, 1), inputs["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="mean"
    )


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def with_one_trained_matrix(model):
    model.requires_grad_(False)
    next(p for name, p in model.named_parameters() if "mlp" in name and p.ndim == 2).requires_grad_(True)
    return model


@pytest.mark.parametrize("family", [*PLAIN_HEADS, "granite", "gemma2", "cohere"])
def test_every_family_has_the_loss_of_its_definition(family, tmp_path, monkeypatch):
    """Granite divides its logits, Gemma 2 caps them and Cohere scales them: there, the model computes them."""
    used = []
    monkeypatch.setattr(trainer, "chunked_loss", lambda *args: used.append(args) or chunked_loss(*args))
    model = with_one_trained_matrix(FAMILY_MODELS[family].build())
    other = copy.deepcopy(model)
    inputs = batch(model.config.vocab_size)
    expected = plain_loss(other, inputs)
    expected.backward()
    # In another order, as above.
    found = make_trainer(model, tmp_path).compute_loss(model, inputs)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for name, grad in gradients(other).items():
        torch.testing.assert_close(gradients(model)[name], grad, rtol=1e-4, atol=1e-6)
    assert bool(used) is (family in PLAIN_HEADS)


def test_a_trained_head_gets_its_gradient(tmp_path):
    model, other = make_model(), make_model()
    inputs = batch(260)
    make_trainer(model, tmp_path).compute_loss(model, inputs).backward()
    plain_loss(other, inputs).backward()
    for name, grad in gradients(other).items():
        torch.testing.assert_close(gradients(model)[name], grad, rtol=1e-4, atol=1e-6)
    assert "model.embed_tokens.weight" in gradients(model)


def test_the_head_is_itself_again_after_an_error(tmp_path, monkeypatch):
    model = with_one_trained_matrix(make_model())
    inputs = batch(260)
    watched = make_trainer(model, tmp_path)

    def fail(*_args, **_kwargs):
        raise RuntimeError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(type(model.model), "forward", fail)
        with pytest.raises(RuntimeError, match="no room"):
            watched.compute_loss(model, inputs)
    assert not model.lm_head._forward_pre_hooks
    assert model(input_ids=inputs["input_ids"]).logits.shape == (2, 9, 260)
