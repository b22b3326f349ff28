"""Scores over all positions of a text: every family against plain definitions, batches, expectations, refusals."""

import copy
import functools
from typing import get_args

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from families import FAMILY_MODELS, NUM_ROWS, NUM_TOKENS, SWITCH, draw_prompts, in_float64
from torch import nn

import loki
from loki.analysis import label_gradients
from loki.analysis.label_gradients import sample, uniforms
from loki.analysis.row_scores import NO_TOKEN, position_sum, score_rows, score_texts
from loki.analysis.settings import RowScoreSettings
from loki.architecture import projections
from loki.choices import RowScoreName
from loki.errors import ArchitectureError, InputError

SCORES = get_args(RowScoreName)
EACH_SCORE = pytest.mark.parametrize("score", SCORES)
EACH_FAMILY = pytest.mark.parametrize("name", list(FAMILY_MODELS))
# ‖a−b‖/‖b‖ per text and layer, in float64 throughout: the same sums in another order differ by 1e-14 here.
SAME = 1e-10
LENGTHS = (2, SWITCH + 1)


@functools.cache
def model_of(name, dtype=torch.float64):
    case = FAMILY_MODELS[name]
    return case.build(attention=case.attention[-1], dtype=dtype)


def distance(a_NLD, b_NLD):
    assert a_NLD.shape == b_NLD.shape
    assert b_NLD.norm(dim=-1).min() > 1e-8
    return float(((a_NLD - b_NLD).norm(dim=-1) / b_NLD.norm(dim=-1)).max())


# --- the plain definition -----------------------------------------------------------------------------------


def plain_labels(logits_TV, ids_T, seed):
    """The first token whose cumulative probability exceeds the draw, by a loop."""
    labels = []
    for logits_V, draw in zip(logits_TV.detach().double(), uniforms(ids_T, seed).tolist(), strict=True):
        total, label = 0.0, 0
        for label, probability in enumerate(logits_V.softmax(-1).tolist()):  # noqa: B007
            total += probability
            if total > draw:
                break
        labels.append(label)
    return torch.tensor(labels)


class Plain:
    """One text through a copy of a model whose projections' weights take gradients and whose outputs are kept."""

    def __init__(self, model, ids_T, module="down_proj"):
        self.model, self.ids_T = copy.deepcopy(model), ids_T
        self.sites = list(projections(self.model, module).values())
        self.inputs, self.outputs, self.added = [], [], []
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for site in self.sites:
            site.weight.requires_grad_(True)
            site.register_forward_hook(self.keep)
        self.logits_TV = self.model(input_ids=ids_T[None], use_cache=False).logits[0]

    def keep(self, _site, inputs, output):
        added = torch.zeros_like(output, requires_grad=True)
        self.inputs.append(inputs[0][0].detach().clone())
        self.outputs.append(output[0].detach().clone())
        self.added.append(added)
        return output + added

    def weights(self):
        """Weights (D, F) whichever way they are stored."""
        return [site.weight.T if type(site).__name__ == "Conv1D" else site.weight for site in self.sites]

    def gradients(self, labels_P):
        """Of the sum of the labels' losses at the first P positions: by weight, and by output."""
        loss = nn.functional.cross_entropy(self.logits_TV[: len(labels_P)], labels_P, reduction="sum")
        found = torch.autograd.grad(loss, [*(site.weight for site in self.sites), *self.added], retain_graph=True)
        half = len(self.sites)
        by_weight = [
            gradient.T if type(site).__name__ == "Conv1D" else gradient
            for site, gradient in zip(self.sites, found[:half], strict=True)
        ]
        return by_weight, [gradient[0] for gradient in found[half:]]

    def scores(self, score, seed=0):
        """(L, D)"""
        ids_T = self.ids_T
        if score == "activation_norm":
            return torch.stack([(z_TD**2).mean(0) for z_TD in self.outputs])
        labels_P = ids_T[1:] if score == "first_order" else plain_labels(self.logits_TV, ids_T, seed)
        by_weight, by_output = self.gradients(labels_P)
        if score == "fisher":
            return torch.stack([(gradient_DF**2).sum(-1) for gradient_DF in by_weight]) / len(labels_P)
        if score == "first_order":
            products = [(w * g).sum(-1).abs() for w, g in zip(self.weights(), by_weight, strict=True)]
            return torch.stack(products).detach() / len(labels_P)
        found = torch.zeros(len(self.sites), NUM_ROWS, dtype=self.logits_TV.dtype)
        for layer, (u_TF, g_TD) in enumerate(zip(self.inputs, by_output, strict=True)):
            for t in range(len(ids_T)):
                for j in range(NUM_ROWS):
                    found[layer, j] += g_TD[t, j] ** 2 * float(u_TF[t] @ u_TF[t]) / len(ids_T)
        return found


@EACH_SCORE
@EACH_FAMILY
def test_scores_are_those_of_a_plain_backward_pass(name, score):
    model = model_of(name)
    for ids_T in draw_prompts(LENGTHS):
        with in_float64():
            scores_NLD = score_rows(model, ids_T[None], score=score, seed=3)
            expected_LD = Plain(model, ids_T).scores(score, seed=3)
        assert distance(scores_NLD, expected_LD[None]) < SAME
        assert scores_NLD.min() >= 0


@EACH_SCORE
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "falcon-new", "llama-biases"])
def test_attention_has_rows_too(name, score):
    model, ids_T = model_of(name), draw_prompts((9,))[0]
    with in_float64():
        scores_NLD = score_rows(model, ids_T[None], score=score, site_module="o_proj")
        expected_LD = Plain(model, ids_T, "o_proj").scores(score)
    assert distance(scores_NLD, expected_LD[None]) < SAME


def test_each_score_by_hand():
    """Two positions, two inputs, one row: g = (2, −1), u = (3, 4) and (1, 0), z = (5, 6)."""
    u_TF, z_TD = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[5.0], [6.0]])
    g_TD = torch.tensor([[2.0], [-1.0]])
    assert position_sum("damage", torch.tensor([[25.0], [1.0]]), g_TD).tolist() == [4 * 25 + 1 * 1]
    assert position_sum("fisher", u_TF, g_TD).tolist() == [(2 * 3 - 1 * 1) ** 2 + (2 * 4) ** 2]
    assert position_sum("first_order", z_TD, g_TD).tolist() == [abs(2 * 5 - 1 * 6)]
    assert position_sum("first_order", -z_TD, g_TD).tolist() == [abs(2 * 5 - 1 * 6)]
    assert position_sum("activation_norm", z_TD, g_TD).tolist() == [25 + 36]


@pytest.mark.parametrize("name", ["llama-biases", "gpt2", "olmo2"])
def test_first_order_is_what_scaling_a_row_does_to_the_loss(name):
    """The central difference of the mean loss when row j, without its bias, is scaled by 1 ± 1e-5."""
    model, ids_T, step = copy.deepcopy(model_of(name)), draw_prompts((9,))[0], 1e-5
    with in_float64(), torch.no_grad():
        scores_LD = score_rows(model, ids_T[None], score="first_order")[0]
        for layer, site in enumerate(projections(model).values()):
            rows_DF = site.weight.T if name == "gpt2" else site.weight
            for row in (0, 5, 15):
                kept, losses = rows_DF[row].clone(), []
                for scale in (1 + step, 1 - step):
                    rows_DF[row] = kept * scale
                    logits_TV = model(input_ids=ids_T[None]).logits[0]
                    losses.append(nn.functional.cross_entropy(logits_TV[:-1], ids_T[1:]))
                    rows_DF[row] = kept
                slope = float(losses[0] - losses[1]) / (2 * step)
                # The error of the difference is of order step², and 1e-16 / step of rounding.
                assert abs(slope) == pytest.approx(float(scores_LD[layer, row]), rel=1e-5, abs=1e-8)


# --- what labels drawn from the model mean ------------------------------------------------------------------


def exact_expectations(model, ids_T):
    """Expected `damage` and `fisher` (L, D): every position's every token, weighted by its probability."""
    plain = Plain(model, ids_T)
    damage, fisher = 0.0, 0.0
    for s, logits_V in enumerate(plain.logits_TV):
        log_p_V = logits_V.log_softmax(-1)
        for token in range(NUM_TOKENS):
            found = torch.autograd.grad(
                -log_p_V[token], [*(site.weight for site in plain.sites), *plain.added], retain_graph=True
            )
            by_weight, by_output = found[: len(plain.sites)], found[len(plain.sites) :]
            p = float(log_p_V[token].detach().exp())
            fisher += p * torch.stack([(gradient_DF**2).sum(-1) for gradient_DF in by_weight])
            damage += p * torch.stack(
                [
                    sum(g_NTD[0, t] ** 2 * (u_TF[t] @ u_TF[t]) for t in range(s + 1))
                    for g_NTD, u_TF in zip(by_output, plain.inputs, strict=True)
                ]
            )
    return {"damage": damage / len(ids_T), "fisher": fisher / len(ids_T)}


@functools.cache
def short_text():
    return draw_prompts((4,), seed=5)[0]


@functools.cache
def expectations():
    return exact_expectations(model_of("llama", torch.float32), short_text())


@pytest.mark.parametrize("score", ["damage", "fisher"])
def test_scores_of_drawn_labels_are_right_on_average(score, monkeypatch):
    """48 rows over 6,000 draws: each within 5 of its own standard errors, and together within 3 % of the truth."""
    stream = torch.Generator().manual_seed(0)

    def draw(ids_T, _seed):
        return torch.rand(len(ids_T), generator=stream, dtype=torch.float64)

    monkeypatch.setattr("loki.analysis.row_scores.uniforms", draw)
    ids_NT = short_text().repeat(6000, 1)
    scores_NLD = score_rows(model_of("llama", torch.float32), ids_NT, score=score, batch_size=500).double()
    mean_LD, error_LD = scores_NLD.mean(0), scores_NLD.std(0) / len(ids_NT) ** 0.5
    expected_LD = expectations()[score].double()
    assert ((mean_LD - expected_LD).abs() / error_LD).max() < 5
    assert ((mean_LD.sum(-1) - expected_LD.sum(-1)).abs() / expected_LD.sum(-1)).max() < 0.03
    other = expectations()["fisher" if score == "damage" else "damage"].double()
    assert ((mean_LD - other).abs() / error_LD).max() > 8  # the cross terms are seen


def test_tokens_are_drawn_as_often_as_they_are_probable():
    probabilities_V = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    grid = (torch.arange(1000) + 0.5) / 1000
    drawn = sample(probabilities_V.expand(1000, -1), grid)
    assert torch.bincount(drawn, minlength=6).tolist() == [0, 500, 0, 300, 200, 0]
    # The ends of [0, 1), and what rounds up to 1.
    assert sample(probabilities_V.expand(3, -1), torch.tensor([0.0, 1 - 2**-24, 1.0])).tolist() == [1, 4, 4]


def test_labels_depend_on_the_seed_and_on_every_token():
    ids_T = torch.tensor([3, 1, 4, 1, 5])
    assert torch.equal(uniforms(ids_T, 0), uniforms(ids_T.clone(), 0))
    others = [
        uniforms(ids_T, 1),
        uniforms(torch.tensor([3, 1, 4, 1, 6]), 0),
        uniforms(torch.tensor([1, 3, 4, 1, 5]), 0),
    ]
    for other in others:
        assert not torch.isclose(uniforms(ids_T, 0), other).any()


@pytest.mark.parametrize("score", ["damage", "fisher"])
def test_another_seed_draws_other_labels(score):
    model, ids_T = model_of("llama", torch.float32), draw_prompts((12,))[0]
    first, again, other = (score_rows(model, ids_T[None], score=score, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert distance(other, first) > 0.1


@pytest.mark.parametrize("score", ["first_order", "activation_norm"])
def test_the_seed_says_nothing_to_scores_that_draw_nothing(score):
    model, ids_T = model_of("llama", torch.float32), draw_prompts((12,))[0]
    assert torch.equal(*(score_rows(model, ids_T[None], score=score, seed=seed) for seed in (0, 1)))


def test_the_target_is_the_last_label():
    model, texts = model_of("llama", torch.float32), draw_prompts((7, 12))
    targets = {
        score: [found.target_id for found in score_texts(model, texts, RowScoreSettings(score))] for score in SCORES
    }
    drawn = [int(plain_labels(Plain(model, ids_T).logits_TV, ids_T, 0)[-1]) for ids_T in texts]
    last = [int(ids_T[-1]) for ids_T in texts]
    assert targets == {"damage": drawn, "fisher": drawn, "first_order": last, "activation_norm": [NO_TOKEN] * 2}
    assert drawn != last
    found = score_texts(model, texts, RowScoreSettings())
    assert all(result.completeness_gap_L is None for result in found)


# --- batches ------------------------------------------------------------------------------------------------


def padded(texts, side):
    """Ids and mask (N, T), with random tokens as padding."""
    longest, generator = max(len(ids_T) for ids_T in texts), torch.Generator().manual_seed(7)
    ids_NT = torch.randint(NUM_TOKENS, (len(texts), longest), generator=generator)
    mask_NT = torch.zeros(len(texts), longest, dtype=torch.int64)
    for n, ids_T in enumerate(texts):
        place = slice(longest - len(ids_T), None) if side == "left" else slice(len(ids_T))
        ids_NT[n, place], mask_NT[n, place] = ids_T, 1
    return ids_NT, mask_NT


@EACH_SCORE
@EACH_FAMILY
def test_batches_padding_and_pieces_change_nothing(name, score, monkeypatch):
    model, texts = model_of(name), draw_prompts((9, 2, 12, 7, 12))
    with in_float64():
        alone_NLD = torch.cat([score_rows(model, ids_T[None], score=score) for ids_T in texts])
        for batch_size, side, num_positions in ((5, "left", 1000), (2, "right", 5)):
            monkeypatch.setattr(label_gradients, "LOGIT_BYTES", 16 * NUM_TOKENS * num_positions)
            scores_NLD = score_rows(model, *padded(texts, side), score=score, batch_size=batch_size)
            assert distance(scores_NLD, alone_NLD) < SAME


def test_no_more_logits_are_there_at_once_than_allowed(monkeypatch):
    model, seen = FAMILY_MODELS["llama"].build(), []
    model.lm_head.register_forward_hook(lambda _m, _i, output: seen.append(output.shape[:-1].numel()))
    monkeypatch.setattr(label_gradients, "LOGIT_BYTES", 16 * NUM_TOKENS * 5)
    score_rows(model, draw_prompts((12,))[0][None])
    assert seen == [5, 5, 2]


@pytest.mark.parametrize(("score", "num_calls"), [("damage", 1), ("activation_norm", 1)])
def test_a_batch_takes_one_pass(score, num_calls):
    model, calls = FAMILY_MODELS["llama"].build(), []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    score_rows(model, *padded(draw_prompts((9, 2, 12)), "left"), score=score, batch_size=3)
    assert len(calls) == num_calls


@EACH_SCORE
def test_float32_is_near_float64(score):
    texts = draw_prompts((9, 12))
    narrow_model, wide_model = model_of("llama", torch.float32), model_of("llama")
    narrow = score_rows(narrow_model, *padded(texts, "left"), score=score, batch_size=2)
    assert narrow.dtype == torch.float32
    with in_float64():  # where other weights would be drawn
        wide = score_rows(wide_model, *padded(texts, "left"), score=score)
    # As the attribution's own: norms and softmax amplify rounding where numbers cancel.
    assert distance(narrow.double(), wide) < 1e-4


@EACH_SCORE
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_bfloat16_models_are_summed_in_float32(name, score):
    """Against a plain pass of the same bfloat16 model, of which only the sums over positions are wider here."""
    model, ids_T = model_of(name, torch.bfloat16), draw_prompts((12,))[0]
    scores_NLD = score_rows(model, ids_T[None], score=score)
    assert scores_NLD.dtype == torch.float32
    expected_LD = Plain(model, ids_T).scores(score).float()
    # bfloat16 has 8 bits: sums of 12 terms lose about 1 % where they do not cancel, gradients some more.
    assert distance(scores_NLD, expected_LD[None]) < 0.1
    assert not torch.equal(scores_NLD, scores_NLD.bfloat16().float())


@EACH_SCORE
@pytest.mark.parametrize("put_aside", [cpu_offload, disk_offload])
def test_offloaded_models_have_the_same_scores(score, put_aside, tmp_path):
    ids_NT = torch.stack(draw_prompts((9, 9)))
    model = FAMILY_MODELS["llama-biases"].build()
    expected_NLD = score_rows(model, ids_NT, score=score)
    place = () if put_aside is cpu_offload else (str(tmp_path / "offload"),)
    offloaded = put_aside(model, *place)
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    for _ in range(2):
        assert distance(score_rows(offloaded, ids_NT, score=score), expected_NLD) < 1e-6
    assert all(parameter.is_meta for name, parameter in offloaded.named_parameters() if "down_proj" in name)


# --- the model afterwards, and refusals ---------------------------------------------------------------------


class OnPurposeError(Exception):
    pass


def state_of(model):
    return (
        [{name: len(value) if "hooks" in name else None for name, value in vars(m).items()} for m in model.modules()],
        [(module.training, module.forward.__func__) for module in model.modules()],
        [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()],
        torch.is_grad_enabled(),
    )


@EACH_SCORE
@pytest.mark.parametrize("raises", [None, "lm_head", "model.layers.2.mlp.down_proj"])
def test_the_model_is_as_before_whatever_happens(score, raises):
    model = FAMILY_MODELS["llama"].build().train()
    model.model.norm.weight.requires_grad_(False)
    before = state_of(model)
    if raises is None:
        score_rows(model, draw_prompts((9,))[0][None], score=score)
    else:

        def refuse(*_):
            raise OnPurposeError

        handle = model.get_submodule(raises).register_forward_hook(refuse)
        if (score, raises) == ("activation_norm", "lm_head"):
            score_rows(model, draw_prompts((9,))[0][None], score=score)  # it needs no head
        else:
            with pytest.raises(OnPurposeError):
                score_rows(model, draw_prompts((9,))[0][None], score=score)
        handle.remove()
    assert state_of(model) == before


def test_a_body_that_is_wrapped_stays_so():
    """As offloading wraps a forward: in the module's own attributes."""
    model, calls = FAMILY_MODELS["llama"].build(), []
    body, ids_NT = model.base_model, draw_prompts((9,))[0][None]
    expected, plain_forward = score_rows(model, ids_NT), body.forward

    def wrapper(*args, **kwargs):
        calls.append(1)
        return plain_forward(*args, **kwargs)

    body.forward = wrapper
    for _ in range(2):
        assert torch.equal(score_rows(model, ids_NT), expected)
        assert vars(body)["forward"] is wrapper
    assert len(calls) == 2


def test_scores_are_the_same_without_gradients_around_and_in_training():
    """Also with dropout in the config, which training would switch on."""
    model, ids_NT = FAMILY_MODELS["gpt2"].build(resid_pdrop=0.5), draw_prompts((9,))[0][None]
    expected = score_rows(model, ids_NT)
    with torch.no_grad():
        assert torch.equal(score_rows(model.train(), ids_NT), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "kva"}, "score 'kva' is unknown: choose one of damage, fisher, first_order, activation_norm"),
        ({"site_module": "up_proj"}, "site_module 'up_proj' is unknown: choose one of down_proj, o_proj"),
        ({"seed": -1}, "seed -1 is not possible: give 0 or more"),
        ({"batch_size": 0}, "batch size 0 is not possible: give 1 or more"),
        (
            {"attention_mask": torch.tensor([[1, 1, 1], [0, 1, 0]]), "score": "first_order"},
            "text 1 has 1 token, first_order needs a next one: give 2 or more, or another score",
        ),
        ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "a prompt has no tokens"),
    ],
)
def test_what_cannot_be_scored_is_refused(options, message):
    with pytest.raises(InputError) as error:
        score_rows(model_of("llama", torch.float32), torch.ones(2, 3, dtype=torch.int64), **options)
    assert message in str(error.value)


def test_one_token_is_enough_where_its_own_prediction_counts():
    model, ids_NT = model_of("llama", torch.float32), torch.tensor([[3]])
    for score in ("damage", "fisher", "activation_norm"):
        assert score_rows(model, ids_NT, score=score).min() > 0
    # With one position there are no cross terms.
    assert distance(score_rows(model, ids_NT, score="damage"), score_rows(model, ids_NT, score="fisher")) < 1e-5


def test_models_that_see_later_tokens_are_refused():
    model = FAMILY_MODELS["gemma3_text"].build(use_bidirectional_attention=True)
    with pytest.raises(ArchitectureError, match="attends to later tokens"):
        score_rows(model, torch.ones(1, 3, dtype=torch.int64))


def test_the_package_offers_it():
    assert loki.score_rows is score_rows
    assert "score_rows" in loki.__all__


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"max_tokens": 1}, "max_tokens 1 is not possible: give 2 or more"), ({"seed": -3}, "seed -3 is not possible")],
)
def test_settings_that_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        RowScoreSettings(**changes)


def test_settings_name_what_decides_a_score_and_nothing_else():
    assert RowScoreSettings("fisher", 3, 64).as_dict() == {
        "score": "fisher",
        "seed": 3,
        "max_tokens": 64,
        "site_module": "down_proj",
    }
    assert "seed" not in RowScoreSettings("first_order", 3).as_dict()
    assert np.array_equal(sorted(RowScoreSettings("activation_norm").as_dict()), ["max_tokens", "score", "site_module"])


@pytest.mark.real
def test_smollm2_has_scores_of_a_plain_pass():
    """Fisher information of the first, a middle and the last layer of the embedded model, on 24 tokens."""
    from loki.models import load_model, load_tokenizer

    model = load_model("embedded", dtype="float32", device="cpu")
    text = "The harbour froze over in the winter of 1709, and people walked across it to the island to buy their bread."
    ids_T = load_tokenizer("embedded")(text, return_tensors="pt").input_ids[0]
    fisher_LD = score_rows(model, ids_T[None], score="fisher")[0]
    sites = [list(projections(model).values())[layer] for layer in (0, 15, 29)]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for site in sites:
        site.weight.requires_grad_(True)
    logits_TV = model(input_ids=ids_T[None]).logits[0]
    labels_T = plain_labels(logits_TV, ids_T, 0)
    nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum").backward()
    for layer, site in zip((0, 15, 29), sites, strict=True):
        expected_D = (site.weight.grad**2).sum(-1) / len(ids_T)
        assert float((fisher_LD[layer] - expected_D).norm() / expected_D.norm()) < 1e-3
