"""The methods that are compared: from a method's settings to a model that is ready to be trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loki.architecture import linear_layers, projections
from loki.choices import ModuleName
from loki.implanting.tuner.targets import config_of_blocks
from loki.rows import RowSelection
from loki.study.settings import Kind, MethodSection, Targets

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftConfig
    from transformers import PreTrainedModel

OUTPUTS: tuple[ModuleName, ...] = ("down_proj", "o_proj")
BLOCKS: Mapping[Targets, tuple[ModuleName, ...]] = {"all": OUTPUTS, "ffn": ("down_proj",), "attention": ("o_proj",)}
"""Blocks whose linear layers get an adapter, by the projections that end them."""
ALPHA_PER_RANK = 2
PISSA_ITERATIONS = 16
"""Of the randomised singular value decomposition; PiSSA's own choice for a fast start."""


@dataclass(frozen=True)
class Setup:
    """What a method may need besides its settings."""

    model: PreTrainedModel
    rows: Mapping[ModuleName, RowSelection]
    """By projection."""
    calibration: Sequence[torch.Tensor]
    """Token ids (1, T) of the texts that knowledge-preserving initialisations read."""
    seed: int


def peft_config(method: MethodSection, setup: Setup) -> PeftConfig | None:
    """The adapter that is trained, or None where the whole model is; CorDA prepares `setup.model` for it."""
    return _CONFIGS[method.kind](method, setup)


def _lora(method: MethodSection, setup: Setup) -> LoraConfig:
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig
    from transformers.pytorch_utils import Conv1D

    options: Mapping[str, dict[str, Any]] = {
        "plain": {},
        "rslora": {"use_rslora": True},
        "dora": {"use_dora": True},
        "pissa": {"init_lora_weights": f"pissa_niter_{PISSA_ITERATIONS}"},
        "corda": {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="kpm")},
    }
    targets = _targets(method, setup)
    alpha = method.rank if method.variant in ("pissa", "corda") else ALPHA_PER_RANK * method.rank
    config = LoraConfig(
        r=method.rank,
        lora_alpha=alpha,
        target_modules=targets,
        fan_in_fan_out=isinstance(setup.model.get_submodule(targets[0]), Conv1D),
        task_type="CAUSAL_LM",
        **options[method.variant],
    )
    if method.variant == "corda":
        _calibrate(config, setup)
    return config


def _calibrate(config: LoraConfig, setup: Setup) -> None:
    """CorDA in its knowledge-preserving mode: the adapter takes the directions that the texts use least."""
    import torch
    from peft.tuners.lora.corda import preprocess_corda

    def read() -> None:
        with torch.no_grad():
            for ids_1T in setup.calibration:
                setup.model(input_ids=ids_1T.to(setup.model.device), use_cache=False)

    preprocess_corda(setup.model, config, run_model=read)


def _osf(method: MethodSection, setup: Setup) -> PeftConfig:
    from peft import OSFConfig

    return OSFConfig(target_modules=_targets(method, setup), task_type="CAUSAL_LM")


def _shira(method: MethodSection, setup: Setup) -> PeftConfig:
    from peft import ShiraConfig

    return ShiraConfig(
        r=method.rank, target_modules=_targets(method, setup), random_seed=setup.seed, task_type="CAUSAL_LM"
    )


def _miss(method: MethodSection, setup: Setup) -> PeftConfig:
    from peft import MissConfig

    return MissConfig(r=method.rank, target_modules=_targets(method, setup), task_type="CAUSAL_LM")


def _loki(method: MethodSection, setup: Setup) -> PeftConfig:
    return config_of_blocks(setup.model, setup.rows, r=method.rank, task_type="CAUSAL_LM")


def _targets(method: MethodSection, setup: Setup) -> list[str]:
    if method.targets == "outputs":
        return [name for module in OUTPUTS for name in projections(setup.model, module)]
    return linear_layers(setup.model, BLOCKS[method.targets])


_CONFIGS: Mapping[Kind, Callable[[MethodSection, Setup], PeftConfig | None]] = {
    "full": lambda _method, _setup: None,
    "lora": _lora,
    "osf": _osf,
    "shira": _shira,
    "miss": _miss,
    "loki": _loki,
}
