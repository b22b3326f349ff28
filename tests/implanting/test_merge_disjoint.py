"""Two skills on disjoint rows: merged in any order, at once, or both active at run time, they are the same model."""

import itertools
import json
import shutil

import pytest
import torch
from conversion import names_of, tensors_of
from families import FAMILY_MODELS
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_model
from transformers import AutoModelForCausalLM

from loki import LokiConfig
from loki.errors import ArtefactError
from loki.implanting import checkpoint
from loki.implanting.merge import merge

INPUT_IDS = torch.arange(1, 13).reshape(2, 6)
FIRST, SECOND, THIRD = [[7, 1], [], [0, 15, 3]], [[2, 0, 14], [5], [4, 1]], [[9], [6, 2], []]
"""Disjoint in every layer; unsorted, between each other's rows, and each without a layer that another one has."""


def make_adapter(model, folder, positions, seed, **options):
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, LokiConfig(positions=positions, init_weights=False, **options))
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder


def bits_of(folder):
    """Every tensor's bytes: equal floats may differ in the sign of zero."""
    return {
        name: (tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors_of(folder).items()
    }


def merged_in_orders(base, adapters, folder, **options):
    """One command for each adapter in every order, and one command for all in every order."""
    folders = []
    for number, order in enumerate(itertools.permutations(adapters)):
        model = base
        for step, adapter in enumerate(order):
            merge(str(model), adapter, folder / f"{number}-{step}", **options)
            model = folder / f"{number}-{step}"
        merge(str(base), list(order), folder / f"{number}-at-once", **options)
        folders += [model, folder / f"{number}-at-once"]
    return folders


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", ({}, {})),
        ("llama", ({}, {"r": 2, "lora_alpha": 3})),
        ("llama", ({"target_modules": "o_proj"}, {})),
        ("llama-biases", ({"bias": "rows"}, {"bias": "rows", "r": 2})),
        ("llama-biases", ({}, {"bias": "rows"})),
        ("gpt2", ({}, {"bias": "rows"})),
        ("gemma3", ({}, {})),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_bytes", [100, checkpoint.BLOCK_BYTES])
def test_any_order_gives_the_same_bits(tmp_path, monkeypatch, name, options, dtype, block_bytes):
    FAMILY_MODELS[name].build(dtype=dtype).save_pretrained(tmp_path / "base")
    adapters = [
        make_adapter(FAMILY_MODELS[name].build(), tmp_path / f"adapter{seed}", positions, seed, **chosen)
        for seed, (positions, chosen) in enumerate(zip((FIRST, SECOND), options, strict=True))
    ]
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", block_bytes)
    folders = merged_in_orders(tmp_path / "base", adapters, tmp_path)
    found = [bits_of(folder) for folder in folders]
    assert all(bits == found[0] for bits in found[1:])

    # Each tensor is the base plus both dense changes, added row by row in float64 and rounded once.
    before, after = tensors_of(tmp_path / "base"), tensors_of(folders[0])
    changes = [dense_changes(adapter, before) for adapter in adapters]
    changed = set(changes[0]) | set(changes[1])
    for tensor_name, tensor in before.items():
        if tensor_name not in changed:
            assert torch.equal(after[tensor_name], tensor), tensor_name
            continue
        exact = tensor.double() + sum(change[tensor_name] for change in changes if tensor_name in change)
        # A·B is summed in float32 here and in float64 there; rounded to 8 bits that may show in the last of them.
        tolerance = {"rtol": 1e-6, "atol": 1e-7} if dtype is torch.float32 else {"rtol": 2**-8, "atol": 0}
        torch.testing.assert_close(after[tensor_name].double(), exact, **tolerance)
        untouched = exact == tensor.double()
        assert torch.equal(after[tensor_name][untouched], tensor[untouched])
    assert len(changed) > 1


def dense_changes(adapter, before):
    """Changes of whole tensors in float64, read from the adapter's files without the package."""
    weights = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    found = {}
    for module in {name.rpartition(".")[0] for name in weights}:
        parts = {part: weights.get(f"{module}.loki_{part}") for part in ("delta", "A", "B", "bias")}
        number = next(int(part) for part in module.split(".") if part.isdecimal())
        rows = sorted(config["positions"][number])
        tail = ".".join(module.split(".")[module.split(".").index(str(number)) - 1 :])
        (name,) = [name for name in before if name.endswith(f"{tail}.weight")]
        delta = parts["delta"]
        if delta is None:
            delta = config["lora_alpha"] / config["r"] * parts["A"].double() @ parts["B"].double()
        change = torch.zeros(before[name].shape, dtype=torch.float64)
        for row, values in zip(rows, delta, strict=True):
            (change.T if ".c_proj." in name else change)[row] = values.double()  # GPT-2 stores (F, D)
        found[name] = change
        if parts["bias"] is not None:
            bias_name = name.removesuffix("weight") + "bias"
            found[bias_name] = torch.zeros(before[bias_name].shape, dtype=torch.float64)
            found[bias_name][rows] = parts["bias"].double()
    return found


def test_three_skills_in_every_order(tmp_path):
    FAMILY_MODELS["llama"].build().save_pretrained(tmp_path / "base")
    adapters = [
        make_adapter(FAMILY_MODELS["llama"].build(), tmp_path / f"adapter{seed}", positions, seed)
        for seed, positions in enumerate((FIRST, SECOND, THIRD))
    ]
    found = [bits_of(folder) for folder in merged_in_orders(tmp_path / "base", adapters, tmp_path)]
    assert len(found) == 12
    assert all(bits == found[0] for bits in found[1:])


@pytest.fixture
def base(tmp_path):
    FAMILY_MODELS["llama"].build().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapters(tmp_path):
    return [
        make_adapter(FAMILY_MODELS["llama"].build(), tmp_path / f"adapter{seed}", positions, seed)
        for seed, positions in enumerate((FIRST, SECOND))
    ]


def test_the_report_counts_both_changes(tmp_path, base, adapters):
    single = [merge(str(base), adapter, tmp_path / f"out{number}") for number, adapter in enumerate(adapters)]
    both = merge(str(base), adapters, tmp_path / "both")
    assert both.num_changed == single[0].num_changed + single[1].num_changed == (5 + 6) * 24
    assert both.num_parameters == single[0].num_parameters
    assert both.change_norm == pytest.approx((single[0].change_norm ** 2 + single[1].change_norm ** 2) ** 0.5)


def test_a_wider_dtype_does_not_mind_the_order_and_one_command_does_not_mind_a_narrower_one(tmp_path, base, adapters):
    FAMILY_MODELS["llama"].build(dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    wide = merged_in_orders(tmp_path / "half", adapters, tmp_path, dtype=torch.float32)
    assert all(bits_of(folder) == bits_of(wide[0]) for folder in wide)
    merge(str(base), adapters, tmp_path / "ab", dtype=torch.bfloat16)
    merge(str(base), adapters[::-1], tmp_path / "ba", dtype=torch.bfloat16)
    assert bits_of(tmp_path / "ab") == bits_of(tmp_path / "ba")
    # One after the other is not the same there: the second one's rows are rounded before they are changed.
    merge(str(base), adapters[0], tmp_path / "a", dtype=torch.bfloat16)
    merge(str(tmp_path / "a"), adapters[1], tmp_path / "a-then-b")
    assert bits_of(tmp_path / "a-then-b") != bits_of(tmp_path / "ab")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # of transformers, for a second adapter
def test_both_active_at_run_time_are_the_merged_model(tmp_path, base, adapters):
    merge(str(base), adapters, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").double()
    wrapped = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base).double(), adapters[0], adapter_name="a"
    )
    wrapped.load_adapter(adapters[1], adapter_name="b")
    with_transformers = AutoModelForCausalLM.from_pretrained(base).double()
    with_transformers.load_adapter(adapters[0], adapter_name="a")
    with_transformers.load_adapter(adapters[1], adapter_name="b")

    def logits(model):
        with torch.no_grad():
            return model(input_ids=INPUT_IDS).logits

    alone = logits(wrapped)
    for order in (["a", "b"], ["b", "a"]):
        wrapped.base_model.set_adapter(order)
        with_transformers.set_adapter(order)
        # In float64 only the merged sums' own rounding to float32 is left.
        torch.testing.assert_close(logits(wrapped), logits(merged), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(logits(with_transformers), logits(wrapped), rtol=0, atol=0)
    assert not torch.allclose(alone, logits(merged), atol=1e-3)


def test_peft_merges_them_to_the_same_bits(tmp_path, base, adapters):
    merge(str(base), adapters, tmp_path / "merged")
    for order in (["a", "b"], ["b", "a"]):
        wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters[0], adapter_name="a")
        wrapped.load_adapter(adapters[1], adapter_name="b")
        wrapped.merge_and_unload(adapter_names=order).save_pretrained(tmp_path / "".join(order))
        assert bits_of(tmp_path / "".join(order)) == bits_of(tmp_path / "merged")


def refuse(message, base, adapters, tmp_path):
    before = names_of(tmp_path)
    with pytest.raises(ArtefactError, match=message):
        merge(str(base), adapters, tmp_path / "merged")
    assert names_of(tmp_path) == before


def test_rows_that_both_change_are_refused(tmp_path, base, adapters):
    third = make_adapter(FAMILY_MODELS["llama"].build(), tmp_path / "third", [[9], [2], [4, 15, 3, 8]], 3)
    message = (
        r"adapters .*adapter0 and .*third both change 2 rows of model.layers.2.mlp.down_proj.weight, 3 for one: "
        r"train the second on rows that `loki select-nodes --exclude` selects"
    )
    refuse(message, base, [adapters[0], third], tmp_path)
    refuse(
        "adapter1 and .*third both change 1 rows of model.layers.2.*, 4 for one", base, [adapters[1], third], tmp_path
    )
    refuse("adapter0 and .*adapter0 both change 2 rows of model.layers.0", base, [*adapters, adapters[0]], tmp_path)
    # The same numbers in another module are other rows.
    other = make_adapter(FAMILY_MODELS["llama"].build(), tmp_path / "other", FIRST, 3, target_modules="o_proj")
    merge(str(base), [adapters[0], other], tmp_path / "merged")


def test_one_adapter_of_another_model_is_refused(tmp_path, base, adapters):
    wide = make_adapter(make_model(), tmp_path / "wide", [[2], [3], [4]], 3)
    shutil.copytree(adapters[1], tmp_path / "broken")
    weights = load_file(adapters[1] / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, tmp_path / "broken/adapter_model.safetensors")
    refuse("adapter .*broken: the change of .* has NaN", base, [adapters[0], tmp_path / "broken"], tmp_path)
    config = json.loads((wide / "adapter_config.json").read_text())
    (wide / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LORA"}))
    refuse("adapter .*wide is of type 'LORA', not 'LOKI': merge it with PEFT", base, [adapters[0], wide], tmp_path)
