"""Our configs for PEFT's own tests, and the tiny models that stand in for those of the Hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from loki import LokiConfig

# Models that PEFT's tests build themselves: `MLP` has lin0 (10 → 20) and lin1 (20 → 2), both with biases;
# `EmbConv1D` has emb (100 × 5), conv1d (5 → 1) and lin0 (10 → 2).
_LIN0, _BOTH = {"lin0": [0, 3, 7, 19]}, {"lin0": [0, 3, 7], "lin1": [1]}

CUSTOM_MODELS = [
    ("rows", "MLP", LokiConfig, {"positions": _LIN0}),
    ("rows of the other layer", "MLP", LokiConfig, {"positions": {"lin1": [0, 1]}}),
    ("rows of two layers", "MLP", LokiConfig, {"positions": _BOTH}),
    ("rows and their biases", "MLP", LokiConfig, {"positions": _BOTH, "bias": "rows"}),
    ("rows with LoRA", "MLP", LokiConfig, {"positions": _LIN0, "r": 2}),
    ("rows with LoRA of two layers", "MLP", LokiConfig, {"positions": _BOTH, "r": 8, "lora_alpha": 4}),
    ("rows with LoRA and their biases", "MLP", LokiConfig, {"positions": _LIN0, "r": 2, "bias": "rows"}),
    ("rows and a whole module", "MLP", LokiConfig, {"positions": _LIN0, "modules_to_save": ["lin1"]}),
    ("rows with LoRA and a whole module", "MLP", LokiConfig, {"positions": _LIN0, "r": 2, "modules_to_save": ["lin1"]}),
    ("all rows", "MLP2", LokiConfig, {"positions": {"lin0": list(range(32))}}),
    ("rows of Conv1D", "EmbConv1D", LokiConfig, {"positions": {"conv1d": [0]}}),
    ("rows of Conv1D with LoRA", "EmbConv1D", LokiConfig, {"positions": {"conv1d": [0], "lin0": [1]}, "r": 2}),
    ("rows of Conv1D and biases", "EmbConv1D", LokiConfig, {"positions": {"conv1d": [0]}, "bias": "rows"}),
    (
        "rows and tokens",
        "EmbConv1D",
        LokiConfig,
        {"positions": {"lin0": [0, 1]}, "trainable_token_indices": {"emb": [0, 10]}},
    ),
]
"""Name, model, config class and arguments: as PEFT's TEST_CASES."""

_SOME, _OTHER = {"init_weights": False}, {"init_weights": False}
TWO_ADAPTERS = [
    ("same rows", "loki", LokiConfig, {"positions": _LIN0, **_SOME}, {"positions": _LIN0, **_OTHER}),
    (
        "overlapping rows",
        "loki",
        LokiConfig,
        {"positions": {"lin0": [0, 1]}, **_SOME},
        {"positions": {"lin0": [1, 2]}, **_OTHER},
    ),
    (
        "other layers",
        "loki",
        LokiConfig,
        {"positions": {"lin0": [0, 1]}, **_SOME},
        {"positions": {"lin1": [1]}, **_OTHER},
    ),
    ("rows and LoRA", "loki", LokiConfig, {"positions": _BOTH, **_SOME}, {"positions": _LIN0, "r": 2, **_OTHER}),
    (
        "LoRA and LoRA",
        "loki",
        LokiConfig,
        {"positions": _LIN0, "r": 4, **_SOME},
        {"positions": _BOTH, "r": 2, **_OTHER},
    ),
    (
        "biases",
        "loki",
        LokiConfig,
        {"positions": _LIN0, "bias": "rows", **_SOME},
        {"positions": _BOTH, "bias": "rows", **_OTHER},
    ),
]
"""Name, method, config class and the arguments of two adapters: as PEFT's MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES."""


@dataclass
class RowsOfTargets(LokiConfig):
    """LokiConfig for tests that name target modules only: two rows of each."""

    def __post_init__(self) -> None:
        if self.positions is None and self.target_modules is not None:
            self.positions = {name: [0, 1] for name in sorted(self.target_modules)}
        super().__post_init__()


# Every decoder below has 2 layers of 16 rows.
_BY_LAYER: dict[str, Any] = {"task_type": "CAUSAL_LM", "positions": [[0, 3, 15], [1, 2]]}
DECODER_CONFIGS = [
    (LokiConfig, _BY_LAYER),
    (LokiConfig, {**_BY_LAYER, "r": 2}),
    (LokiConfig, {**_BY_LAYER, "target_modules": "o_proj"}),
    (LokiConfig, {**_BY_LAYER, "bias": "rows"}),
    (LokiConfig, {"task_type": "CAUSAL_LM", "positions": {"fc2": [0, 3], "out_proj": [1]}}),
]
"""Config class and arguments: as PEFT's ALL_CONFIGS."""

_SIZES = {
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GPT = {
    "vocab_size": 260,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "opt",
        {**_SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16, "init_std": 0.3},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("gpt2", _GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("gptj", {**_GPT, "rotary_dim": 2}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("llama", _SIZES),
    "peft-internal-testing/tiny-dummy-qwen2": ("qwen2", _SIZES),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("gemma3_text", {**_SIZES, "head_dim": 4}),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("mistral", _SIZES),
    "hf-internal-testing/tiny-random-gpt2": ("gpt2", _GPT),
}
_UNKNOWN_FAMILY = "OPT"
_WITH_BIASES = ("OPT", "GPT2", "gpt2", "GPTJ")


def fits(model_id: str, arguments: dict[str, Any]) -> bool:
    """Whether a decoder config is meant for a model: named modules for OPT, biases where there are some."""
    if isinstance(arguments["positions"], dict) or _UNKNOWN_FAMILY in model_id:
        return isinstance(arguments["positions"], dict) and _UNKNOWN_FAMILY in model_id
    return arguments.get("bias", "none") == "none" or any(name in model_id for name in _WITH_BIASES)


def write_models(directory: Path) -> None:
    """Lay tiny models out as `directory/<owner>/<name>`: `from_pretrained` takes a folder before it asks the Hub."""
    for model_id, (model_type, fields) in _DECODERS.items():
        folder = directory / model_id
        if (folder / "config.json").exists():
            continue
        config = AutoConfig.for_model(model_type, **fields)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    adapter = directory / "peft-internal-testing/tiny-opt-lora-revision"
    adapter.mkdir(parents=True, exist_ok=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8}))
