"""Models whose weights `accelerate` keeps in main memory or on the disk: the same scores, the same fingerprint."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from tiny import make_model
from transformers import AutoModelForCausalLM

from loki.analysis.attribution import attribute
from loki.provenance import fingerprint_model

TOLERANCE = 1e-6
"""The same operations on the same numbers; they are read from elsewhere."""
EVERYWHERE = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu"}
MAPS = {
    "all on disk": {"": "disk"},
    "last layers on disk": {
        **EVERYWHERE,
        "model.layers.1": "disk",
        "model.layers.2": "disk",
        "model.norm": "disk",
        "lm_head": "cpu",
    },
    "ends and middle on disk": {
        **EVERYWHERE,
        "model.embed_tokens": "disk",
        "model.layers.1": "disk",
        "model.layers.2": "cpu",
        "model.norm": "cpu",
        "lm_head": "disk",
    },
}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request):
    return request.param


@pytest.fixture
def plain(tied):
    return make_model(tie_word_embeddings=tied)


@pytest.fixture(params=["cpu_offload", "disk_offload", "dispatch_model", *MAPS])
def offloaded(request, plain, tied, tmp_path):
    """The same model, put aside in one of the ways there are."""
    if request.param in MAPS:
        plain.save_pretrained(tmp_path / "model")
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=MAPS[request.param], offload_folder=tmp_path / "offload"
        ).eval()
    model = make_model(tie_word_embeddings=tied)
    if request.param == "cpu_offload":
        return cpu_offload(model)
    if request.param == "disk_offload":
        return disk_offload(model, str(tmp_path / "offload"))
    return dispatch_model(
        model, MAPS["last layers on disk"], main_device="cpu", offload_dir=str(tmp_path / "offload"), force_hooks=True
    )


def meta_names(model):
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.is_meta}


def difference(found, expected):
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


@pytest.fixture
def ids():
    return torch.randint(4, 260, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch_size": 3, "max_branches": 4},
        {"rule": "riemann_trapezoid", "steps": 3, "site_module": "o_proj"},
        {"engine": "recompute", "steps": 2},
    ],
    ids=["defaults", "grouped", "trunk", "recompute"],
)
def test_scores_are_those_of_the_plain_model(plain, offloaded, ids, settings):
    aside = meta_names(offloaded)
    assert "model.layers.2.mlp.down_proj.weight" in aside or "model.layers.1.mlp.down_proj.weight" in aside
    found, expected = attribute(offloaded, ids, **settings), attribute(plain, ids, **settings)
    assert difference(found.scores, expected.scores) <= TOLERANCE
    assert torch.equal(found.target_ids, expected.target_ids)
    assert meta_names(offloaded) == aside  # nothing stays behind


def test_fingerprint_is_that_of_the_plain_model(plain, offloaded):
    aside = meta_names(offloaded)
    assert fingerprint_model(offloaded) == fingerprint_model(plain)
    assert meta_names(offloaded) == aside


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
def test_fingerprint_sees_a_change_in_weights_that_are_aside(tmp_path, name):
    changed = make_model(tie_word_embeddings=False)
    before = fingerprint_model(changed)
    with torch.no_grad():
        changed.get_parameter(name)[0, 0] += 1
    disk_offload(changed, str(tmp_path / "offload"))
    found = fingerprint_model(changed)
    assert found.weights != before.weights
    assert (found.architecture, found.dtype) == (before.architecture, before.dtype)


def test_a_family_of_other_names(tiny_model, tmp_path):
    """GPT-2 calls its tied pair `transformer.wte` and `lm_head`, and has biases."""
    sizes = {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 40}
    plain, other = (tiny_model("gpt2", tie_word_embeddings=True, **sizes) for _ in range(2))
    disk_offload(other, str(tmp_path))
    assert fingerprint_model(other) == fingerprint_model(plain)
    ids = torch.arange(1, 8)[None]
    assert difference(attribute(other, ids).scores, attribute(plain, ids).scores) <= TOLERANCE
