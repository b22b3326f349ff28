"""A tiny random model of every family, with what sets the family apart switched on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

NUM_ROWS, NUM_TOKENS = 16, 64
"""Hidden size and vocabulary of every model here."""
PROMPT_LENGTHS = (1, 2, 7, 8, 9, 12)
"""Around the window of `WINDOW` tokens, and around `SWITCH`, where position scaling changes."""
WINDOW, SWITCH = 5, 8


@dataclass(frozen=True)
class Case:
    """One tiny model: what its config says, and what it says with the family's marks taken away."""

    model_type: str
    sizes: Mapping[str, Any]
    features: Mapping[str, Any] = field(default_factory=dict)
    """What sets the family (or this variant) apart, where the config decides it."""
    plain: Mapping[str, Any] = field(default_factory=dict)
    """The same fields without effect: each alone must change the predictions, or it is not tested at all."""
    attention: tuple[str, ...] = ("eager", "sdpa")
    """Implementations of attention that the family has."""

    def config(self, **changes: Any) -> Any:
        """The model's config, with changes."""
        fields = {**self.sizes, **self.features, **changes}
        if self.model_type == "gemma3":
            return AutoConfig.for_model("gemma3", text_config=fields, vision_config=VISION, mm_tokens_per_image=4)
        return AutoConfig.for_model(self.model_type, **fields)

    def build(
        self, *, attention: str = "eager", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
    ) -> PreTrainedModel:
        """The model in evaluation mode; the same weights for the same seed and shapes."""
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(self.config(**changes), attn_implementation=attention)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms at 1 and biases at 0 would hide what is done with them
                parameter.data += 0.3 * torch.randn_like(parameter)
        return model.to(dtype).eval()


def _sizes(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": NUM_TOKENS,
        "hidden_size": NUM_ROWS,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    } | changes


def _without(sizes: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in sizes.items() if name not in names}


def _gpt(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": NUM_TOKENS,
        "n_embd": NUM_ROWS,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
    } | changes


def _rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_theta": 100.0, **parameters}


LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
ALL_FULL = ["full_attention"] * 3
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_FALCON = _without(_sizes(), "intermediate_size", "num_key_value_heads") | {"tie_word_embeddings": False}
_GEMMA_3 = {
    "layer_types": LAYER_TYPES,
    "sliding_window": WINDOW,
    "rope_parameters": {
        "full_attention": _rope(rope_type="default", rope_theta=1000.0),
        "sliding_attention": _rope(rope_type="default", rope_theta=10.0),
    },
}
_GEMMA_3_PLAIN = {
    "layer_types": ALL_FULL,
    "sliding_window": 64,
    "rope_parameters": {
        "full_attention": _rope(rope_type="default", rope_theta=1000.0),
        "sliding_attention": _rope(rope_type="default", rope_theta=1000.0),
    },
}
_LONG = {"rope_type": "longrope", "partial_rotary_factor": 1.0, "short_factor": [1.0, 1.5], "long_factor": [3.0, 9.0]}

FAMILY_MODELS: dict[str, Case] = {
    "llama": Case("llama", _sizes()),
    "llama-dynamic-ntk": Case(
        "llama",
        _sizes(max_position_embeddings=SWITCH),
        {"rope_parameters": _rope(rope_type="dynamic", factor=8.0)},
        {"rope_parameters": _rope(rope_type="default")},
    ),
    "llama-yarn": Case(
        "llama",
        _sizes(),
        {"rope_parameters": _rope(rope_type="yarn", factor=8.0, original_max_position_embeddings=SWITCH)},
        {"rope_parameters": _rope(rope_type="default")},
    ),
    "llama-biases": Case(
        "llama", _sizes(), {"attention_bias": True, "mlp_bias": True}, {"attention_bias": False, "mlp_bias": False}
    ),
    "mistral": Case("mistral", _sizes(), {"sliding_window": WINDOW}, {"sliding_window": None}),
    "qwen2": Case(
        "qwen2",
        _sizes(),
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 3},
    ),
    "qwen3": Case("qwen3", _sizes(head_dim=6)),
    "smollm3": Case("smollm3", _sizes(), {"no_rope_layers": [1, 0, 1]}, {"no_rope_layers": [1, 1, 1]}),
    "granite": Case(
        "granite",
        _sizes(),
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.6, "logits_scaling": 0.5},
        {"embedding_multiplier": 1.0, "attention_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0},
    ),
    "starcoder2": Case("starcoder2", _sizes(), {"sliding_window": WINDOW}, {"sliding_window": None}),
    "gemma2": Case(
        "gemma2",
        _sizes(head_dim=6, query_pre_attn_scalar=6),
        {
            "layer_types": LAYER_TYPES,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
        {
            "layer_types": ALL_FULL,
            "sliding_window": 64,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
        ("eager",),
    ),
    "gemma3_text": Case("gemma3_text", _sizes(head_dim=6, query_pre_attn_scalar=6), _GEMMA_3, _GEMMA_3_PLAIN),
    "gemma3": Case("gemma3", _sizes(head_dim=6, query_pre_attn_scalar=6), _GEMMA_3, _GEMMA_3_PLAIN),
    "phi3-longrope": Case(
        "phi3",
        _sizes(num_key_value_heads=2, original_max_position_embeddings=SWITCH),
        {"rope_parameters": _rope(**_LONG)},
        {"rope_parameters": _rope(rope_type="default", partial_rotary_factor=1.0)},
    ),
    "olmo2": Case("olmo2", _sizes()),
    "gpt2": Case("gpt2", _gpt(tie_word_embeddings=False), {"n_inner": None}),
    "gpt2-scaled": Case(
        "gpt2",
        _gpt(n_inner=24),
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_by_inverse_layer_idx": False},
    ),
    "gpt_neox": Case(
        "gpt_neox",
        _without(_sizes(), "num_key_value_heads"),
        {"use_parallel_residual": True, "rope_parameters": _rope(rope_type="default", partial_rotary_factor=0.5)},
        {"use_parallel_residual": False, "rope_parameters": _rope(rope_type="default", partial_rotary_factor=1.0)},
    ),
    "gpt_neox-sequential": Case(
        "gpt_neox",
        _without(_sizes(), "num_key_value_heads"),
        {"use_parallel_residual": False},
        {"use_parallel_residual": True},
    ),
    "falcon": Case("falcon", _FALCON, {"multi_query": True, "parallel_attn": True}),
    "falcon-new": Case("falcon", _FALCON, {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 24}),
    "falcon-alibi": Case(
        "falcon",
        _FALCON,
        {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
        {"alibi": False},
    ),
    "falcon-alibi-parallel": Case("falcon", _FALCON, {"alibi": True}, {"alibi": False}),
    "gptj": Case("gptj", _gpt(rotary_dim=2, n_inner=24), {"rotary_dim": 2}, {"rotary_dim": 4}, ("eager",)),
    "phi": Case(
        "phi",
        _sizes(),
        {"rope_parameters": _rope(rope_type="default", partial_rotary_factor=0.5), "qk_layernorm": True},
        {"rope_parameters": _rope(rope_type="default", partial_rotary_factor=1.0), "qk_layernorm": False},
    ),
    "cohere": Case(
        "cohere",
        _sizes(),
        {"logit_scale": 0.4, "use_qk_norm": True},
        {"logit_scale": 1.0, "use_qk_norm": False},
    ),
    "cohere2": Case(
        "cohere2",
        _sizes(),
        {"layer_types": LAYER_TYPES, "sliding_window": WINDOW, "logit_scale": 0.4},
        {"layer_types": ALL_FULL, "sliding_window": 64, "logit_scale": 1.0},
    ),
}


def draw_prompts(lengths: Sequence[int] = PROMPT_LENGTHS, *, seed: int = 1) -> list[torch.Tensor]:
    """Prompts (T,) of random tokens, int64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(NUM_TOKENS, (length,), generator=generator) for length in lengths]


class _InFloat64(TorchFunctionMode):
    """Every float32 that is asked for becomes a float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        wider = [torch.float64 if value is torch.float32 else value for value in args]
        options = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*wider, **options)


@contextmanager
def in_float64() -> Iterator[None]:
    """Inside, a float64 model computes all in float64.

    Families compute norms, rotations and softmax in float32 whatever the model's dtype, and scores are float32;
    that rounding would cover differences of method below about 1e-6. Here only those remain.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _InFloat64():
            yield
    finally:
        torch.set_default_dtype(default)
