"""Causal language models whose output projections are split into trainable and frozen rows (LoKI, arXiv 2505.22120).

This file lies in every model folder that `loki create-model` writes, and needs only torch and transformers:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

gives a model of which only the selected rows require gradients; any trainer of Hugging Face models can train it.
Its config names the rows (`target_pos`, a list for each layer) and the split modules (`target_module`).
`loki restore-model` puts the rows back in place afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

TARGET_MODULE = "model.layers.{layer}.mlp.down_proj"
"""Where most families have the linear layer that ends a layer's feed-forward block."""


class LoKILinear(nn.Module):
    """A linear layer in two parts: rows that are trained (`active`) and rows that are not (`frozen`).

    Rows keep their order in both parts, so the order of `target_pos` does not matter. It replaces `nn.Linear`, and
    GPT-2's `Conv1D`, whose weight is kept transposed; row j gives output j of either.

    Raises:
        ValueError: a row that does not exist, or twice the same.
    """

    index_map: torch.Tensor
    active_bias: nn.Parameter | None
    frozen_bias: nn.Parameter | None

    def __init__(self, original_linear: Any, target_pos: Sequence[int]) -> None:
        super().__init__()
        weight: torch.Tensor = original_linear.weight.detach()
        if not hasattr(original_linear, "in_features"):
            weight = weight.T
        self.out_features: int = weight.shape[0]
        self.in_features: int = weight.shape[1]
        if len(set(target_pos)) != len(target_pos):
            raise ValueError("target_pos holds duplicate rows: each may occur once")
        if not all(0 <= row < self.out_features for row in target_pos):
            raise ValueError(f"target_pos must be within [0, {self.out_features - 1}], the layer's rows")
        self.active_pos = sorted(target_pos)
        self.frozen_pos = sorted(set(range(self.out_features)) - set(target_pos))
        self.active = _linear(weight[self.active_pos], is_trained=True)
        self.frozen = _linear(weight[self.frozen_pos], is_trained=False)
        bias = getattr(original_linear, "bias", None)
        self.active_bias = None if bias is None else nn.Parameter(bias.detach()[self.active_pos].clone())
        self.frozen_bias = None if bias is None else nn.Parameter(bias.detach()[self.frozen_pos].clone(), False)
        self.register_buffer("index_map", torch.empty(self.out_features, dtype=torch.int64, device=weight.device))
        self.reset_index_map()

    def reset_index_map(self) -> None:
        """Set where each output stands in the outputs of the active rows followed by those of the frozen ones."""
        self.index_map.copy_(torch.tensor(self.active_pos + self.frozen_pos).argsort())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs (..., rows) in the order of the layer that was split."""
        parts = torch.cat([self.active(x), self.frozen(x)], dim=-1)
        if self.active_bias is not None and self.frozen_bias is not None:
            parts = parts + torch.cat([self.active_bias, self.frozen_bias])
        return parts.index_select(-1, self.index_map)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, active_rows={len(self.active_pos)}"


def _linear(weight: torch.Tensor, *, is_trained: bool) -> nn.Linear:
    # Initialised nowhere, and never with no row at all, of which torch would warn.
    linear = nn.Linear(weight.shape[1], max(1, weight.shape[0]), bias=False, device="meta")
    linear.out_features = weight.shape[0]
    linear.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=is_trained)
    return linear


class SplitRows(PreTrainedModel):
    """What the model classes below add to those of transformers: projections split as the config says."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if getattr(config, "target_pos", None) is None:
            raise ValueError("config has no target_pos, a list of rows for each layer: make it with loki create-model")
        pattern = getattr(config, "target_module", None) or TARGET_MODULE
        num_layers = config.get_text_config().num_hidden_layers
        if len(config.target_pos) != num_layers:
            raise ValueError(f"target_pos has {len(config.target_pos)} lists, the model {num_layers} layers")
        for layer, rows in enumerate(config.target_pos):
            if rows:
                parent_name, _, name = pattern.format(layer=layer).rpartition(".")
                parent = self.get_submodule(parent_name)
                setattr(parent, name, LoKILinear(getattr(parent, name), rows))
        self.freeze_all_but_active()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As of any model; afterwards only active rows require gradients."""
        cls._adopt_renamings()
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Loading makes new parameters, which all require gradients, and leaves open what is not in the files.
        model.freeze_all_but_active()
        for module in model.modules():
            if isinstance(module, LoKILinear):
                module.reset_index_map()
        return loaded

    @classmethod
    def _adopt_renamings(cls) -> None:
        """Let tensors be renamed in loading as they are for the class of transformers (GPT-NeoX's head, Gemma 3)."""
        try:
            from transformers import conversion_mapping
        except ImportError:  # before transformers 5 the renamings are inherited with the class
            return
        family: Any = next(parent for parent in cls.__mro__ if parent.__module__.startswith("transformers.models."))
        renamings = conversion_mapping.get_checkpoint_conversion_mapping(family.__name__)
        if renamings is None:
            renamings = conversion_mapping.get_checkpoint_conversion_mapping(family.config_class.model_type)
        if renamings is not None:
            conversion_mapping.register_checkpoint_conversion_mapping(cls.__name__, renamings, overwrite=True)

    def freeze_all_but_active(self) -> None:
        """Let only the active rows and their biases require gradients."""
        self.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, LoKILinear):
                module.active.requires_grad_(True)
                if module.active_bias is not None:
                    module.active_bias.requires_grad_(True)


class LoKILlamaConfig(LlamaConfig):
    """`LlamaConfig` with `target_pos`."""


class LoKILlamaForCausalLM(SplitRows, LlamaForCausalLM):
    """`LlamaForCausalLM` with split projections."""

    config_class = LoKILlamaConfig


class LoKIMistralConfig(MistralConfig):
    """`MistralConfig` with `target_pos`."""


class LoKIMistralForCausalLM(SplitRows, MistralForCausalLM):
    """`MistralForCausalLM` with split projections."""

    config_class = LoKIMistralConfig


class LoKIQwen2Config(Qwen2Config):
    """`Qwen2Config` with `target_pos`."""


class LoKIQwen2ForCausalLM(SplitRows, Qwen2ForCausalLM):
    """`Qwen2ForCausalLM` with split projections."""

    config_class = LoKIQwen2Config


class LoKIQwen3Config(Qwen3Config):
    """`Qwen3Config` with `target_pos`."""


class LoKIQwen3ForCausalLM(SplitRows, Qwen3ForCausalLM):
    """`Qwen3ForCausalLM` with split projections."""

    config_class = LoKIQwen3Config


class LoKISmolLM3Config(SmolLM3Config):
    """`SmolLM3Config` with `target_pos`."""


class LoKISmolLM3ForCausalLM(SplitRows, SmolLM3ForCausalLM):
    """`SmolLM3ForCausalLM` with split projections."""

    config_class = LoKISmolLM3Config


class LoKIGraniteConfig(GraniteConfig):
    """`GraniteConfig` with `target_pos`."""


class LoKIGraniteForCausalLM(SplitRows, GraniteForCausalLM):
    """`GraniteForCausalLM` with split projections."""

    config_class = LoKIGraniteConfig


class LoKIPhi3Config(Phi3Config):
    """`Phi3Config` with `target_pos`."""


class LoKIPhi3ForCausalLM(SplitRows, Phi3ForCausalLM):
    """`Phi3ForCausalLM` with split projections."""

    config_class = LoKIPhi3Config


class LoKICohereConfig(CohereConfig):
    """`CohereConfig` with `target_pos`."""


class LoKICohereForCausalLM(SplitRows, CohereForCausalLM):
    """`CohereForCausalLM` with split projections."""

    config_class = LoKICohereConfig


class LoKICohere2Config(Cohere2Config):
    """`Cohere2Config` with `target_pos`."""


class LoKICohere2ForCausalLM(SplitRows, Cohere2ForCausalLM):
    """`Cohere2ForCausalLM` with split projections."""

    config_class = LoKICohere2Config


class LoKIStarcoder2Config(Starcoder2Config):
    """`Starcoder2Config` with `target_pos`."""


class LoKIStarcoder2ForCausalLM(SplitRows, Starcoder2ForCausalLM):
    """`Starcoder2ForCausalLM` with split projections."""

    config_class = LoKIStarcoder2Config


class LoKIOlmo2Config(Olmo2Config):
    """`Olmo2Config` with `target_pos`."""


class LoKIOlmo2ForCausalLM(SplitRows, Olmo2ForCausalLM):
    """`Olmo2ForCausalLM` with split projections."""

    config_class = LoKIOlmo2Config


class LoKIGemma2Config(Gemma2Config):
    """`Gemma2Config` with `target_pos`."""


class LoKIGemma2ForCausalLM(SplitRows, Gemma2ForCausalLM):
    """`Gemma2ForCausalLM` with split projections."""

    config_class = LoKIGemma2Config


class LoKIGemma3TextConfig(Gemma3TextConfig):
    """`Gemma3TextConfig` with `target_pos`."""


class LoKIGemma3ForCausalLM(SplitRows, Gemma3ForCausalLM):
    """`Gemma3ForCausalLM` with split projections."""

    config_class = LoKIGemma3TextConfig


class LoKIGemma3Config(Gemma3Config):
    """`Gemma3Config` with `target_pos`."""


class LoKIGemma3ForConditionalGeneration(SplitRows, Gemma3ForConditionalGeneration):
    """`Gemma3ForConditionalGeneration` with split projections."""

    config_class = LoKIGemma3Config


class LoKIGPT2Config(GPT2Config):
    """`GPT2Config` with `target_pos`."""


class LoKIGPT2LMHeadModel(SplitRows, GPT2LMHeadModel):
    """`GPT2LMHeadModel` with split projections."""

    config_class = LoKIGPT2Config


class LoKIGPTJConfig(GPTJConfig):
    """`GPTJConfig` with `target_pos`."""


class LoKIGPTJForCausalLM(SplitRows, GPTJForCausalLM):
    """`GPTJForCausalLM` with split projections."""

    config_class = LoKIGPTJConfig


class LoKIGPTNeoXConfig(GPTNeoXConfig):
    """`GPTNeoXConfig` with `target_pos`."""


class LoKIGPTNeoXForCausalLM(SplitRows, GPTNeoXForCausalLM):
    """`GPTNeoXForCausalLM` with split projections."""

    config_class = LoKIGPTNeoXConfig


class LoKIFalconConfig(FalconConfig):
    """`FalconConfig` with `target_pos`."""


class LoKIFalconForCausalLM(SplitRows, FalconForCausalLM):
    """`FalconForCausalLM` with split projections."""

    config_class = LoKIFalconConfig


class LoKIPhiConfig(PhiConfig):
    """`PhiConfig` with `target_pos`."""


class LoKIPhiForCausalLM(SplitRows, PhiForCausalLM):
    """`PhiForCausalLM` with split projections."""

    config_class = LoKIPhiConfig
