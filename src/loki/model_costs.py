"""What LoKI costs for a model: trainable weights, adapter, optimiser memory, time of an analysis.

Everything follows from the model's config; weights are never loaded.
"""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from loki.architecture import Shape, decoder_layers, shape_of, shape_of_config, text_config
from loki.errors import InputError
from loki.models import load_config
from loki.selection.quota import format_quota, parse_quota, rows_for_quota

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

ADAPTER_BYTES = 4
"""Of a trainable weight in an adapter: float32."""
OPTIMISER_BYTES = 16
"""Of a trainable weight under AdamW, all float32: the weight, its gradient, and two moments."""
NUM_TOKENS = 150
"""T of a middling prompt of MMLU."""
STEPS = 7
"""Nodes of the quadrature rule when nothing else is asked for."""
MAX_MEASURED_WEIGHTS = 2**24
"""Of the matrix that is multiplied to measure a speed: larger than caches, small beside a model."""


@dataclass(frozen=True)
class ModelSize:
    """What of a model decides its costs."""

    shape: Shape
    num_weights: int
    """Of the whole model; tied ones count once."""
    layer_weights: tuple[int, ...]
    """In the matrices of each decoder layer: the multiplications that one token takes there."""
    head_weights: int
    """In the projection to the vocabulary, tied or not."""
    dtype: str | None
    """Of the stored weights, where the config says."""


def read_config(name_or_path: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Config of a model given as for `load_config`, or as the path of a `config.json` or of a GGUF file.

    Raises:
        InputError: not found, or of a kind that `transformers` does not know.
    """
    path = Path(name_or_path).expanduser()
    source = name_or_path
    if path.name == "config.json" or path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(
                f"model file {name_or_path!r} does not exist: name a config.json or GGUF file, or a folder"
            )
        if path.suffix == ".gguf":
            return _read_gguf(path)
        source = str(path.parent)
    return load_config(source, trust_remote_code=trust_remote_code)


def _read_gguf(path: Path) -> PretrainedConfig:
    from transformers import AutoConfig

    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"reading {path} needs the package gguf: run `pip install gguf`")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # what a damaged file breaks is not foreseeable
        raise InputError(f"GGUF file {path} cannot be read ({_text(error)}): name a whole GGUF file") from error
    return config


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def model_size(config: PretrainedConfig, *, trust_remote_code: bool = False) -> ModelSize:
    """Measure a model that is built without memory for its weights.

    Raises:
        ArchitectureError: unknown family, a mixture of experts, or down-projections of several sizes.
        InputError: a config that no model can be built from.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    shape_of_config(config)  # before the work: is the family known?
    dtype = config.dtype or text_config(config).dtype
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # as in `read_config`
        raise InputError(
            f"config of this {config.model_type!r} model cannot be used ({_text(error)}): mend it"
        ) from error
    return ModelSize(
        shape=shape_of(model),
        num_weights=sum(parameter.numel() for parameter in model.parameters()),
        layer_weights=tuple(
            sum(module.weight.numel() for module in layer.modules() if isinstance(module, torch.nn.Linear | Conv1D))
            for layer in decoder_layers(model).values()
        ),
        head_weights=model.get_output_embeddings().weight.numel(),
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
    )


@dataclass(frozen=True)
class TrainingCost:
    """What it takes to train the rows of one quota, the same number in every layer."""

    quota_percent: str
    rank: int
    """r of the product that stands for the change (LoKI*); 0: the rows themselves."""
    rows_per_layer: int
    num_trainable: int
    """Weights."""
    trainable_percent: float
    """Of the model's weights."""
    adapter_bytes: int
    """Of the tensors in `adapter_model.safetensors`, float32."""
    optimiser_bytes: int
    """Under AdamW, float32: trainable weights, their gradients, two moments. Neither the frozen model nor
    activations are in it."""


def training_cost(size: ModelSize, quota: str | float | Fraction, rank: int = 0) -> TrainingCost:
    """Cost of k = ⌊quota/100·D⌋ rows in every layer: k·F weights, or r·(k + F) of A (k, r) and B (r, F).

    Raises:
        InputError: a quota outside (0, 100] or too small for one row, or a negative rank.
    """
    if rank < 0:
        raise InputError(f"rank {rank} is not possible: give 1 or more, or 0 for none")
    num_columns = size.shape.num_columns
    rows = rows_for_quota(quota, size.shape.num_rows)
    num_trainable = size.shape.num_layers * (rank * (rows + num_columns) if rank else rows * num_columns)
    return TrainingCost(
        quota_percent=format_quota(parse_quota(quota)),
        rank=rank,
        rows_per_layer=rows,
        num_trainable=num_trainable,
        trainable_percent=100 * num_trainable / size.num_weights,
        adapter_bytes=ADAPTER_BYTES * num_trainable,
        optimiser_bytes=OPTIMISER_BYTES * num_trainable,
    )


def forward_operations(size: ModelSize, num_tokens: int = NUM_TOKENS) -> int:
    """Floating-point operations of a plain pass over one prompt: two for each weight of a layer and each token.

    Only the last token reaches the vocabulary; that, and attention's products of activations, are left out.
    """
    return 2 * num_tokens * sum(size.layer_weights)


def analysis_operations(size: ModelSize, num_tokens: int = NUM_TOKENS, steps: int = STEPS) -> int:
    """Floating-point operations of attributing one prompt with the `branch` engine, counted as the plain pass is.

    After one plain pass, the `steps` branches of every earlier layer and the unmodified row pass each layer forward
    and back, and all branches pass the head forward and back.
    """
    branches = sum((steps * layer + 1) * weights for layer, weights in enumerate(size.layer_weights))
    head = steps * len(size.layer_weights) * size.head_weights
    return forward_operations(size, num_tokens) + 2 * 2 * (branches + head)


def measure_speed(size: ModelSize, device: torch.device, dtype: torch.dtype, *, seconds: float = 1.0) -> float:
    """Floating-point operations a second of a product with a matrix of the model's shape, measured for `seconds`."""
    import torch

    num_rows = size.shape.num_rows
    num_columns = min(size.shape.num_columns, max(1, MAX_MEASURED_WEIGHTS // num_rows))
    tokens_TD = torch.rand(NUM_TOKENS, num_rows, device=device, dtype=dtype)
    weight_FD = torch.rand(num_columns, num_rows, device=device, dtype=dtype)

    def multiply() -> None:
        torch.nn.functional.linear(tokens_TD, weight_FD)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    multiply()  # kernels are chosen or compiled on first use
    num_products, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or num_products == 0:
        multiply()
        num_products += 1
    return 2 * NUM_TOKENS * weight_FD.numel() * num_products / elapsed
