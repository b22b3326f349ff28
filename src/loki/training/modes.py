"""A model under training as its own base: its adapter off, in evaluation mode, in the precision of training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from loki.errors import InputError

if TYPE_CHECKING:
    from transformers import TrainingArguments

BASE_KEEPING = (True, False, "gaussian", "orthogonal", "eva")
"""Initialisations of LoRA that leave the base's own weights alone; PiSSA, OLoRA, CorDA and LoftQ do not."""

SHARDING = ("DEEPSPEED", "FSDP", "MEGATRON_LM")
"""Ways to train in which weights are in parts, out of reach of what goes beyond the trainer's own step."""


def require_unsharded(what: str) -> None:
    """Make sure that the training under way keeps whole weights; `what` wants it.

    Raises:
        InputError: it shards them.
    """
    from accelerate.state import AcceleratorState

    way = AcceleratorState().distributed_type.value
    if way in SHARDING:
        raise InputError(f"{what} does not work with {way}: train in one process or with DDP, or leave it out")


def has_adapter(model: Any) -> bool:
    """Whether PEFT wraps the model, or `transformers` put an adapter into it."""
    return hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False)


def require_own_base(model: Any, what: str) -> None:
    """Make sure that the model with its adapter off is what it was before training; `what` wants it.

    Raises:
        InputError: a LoRA that began by changing the base's weights.
    """
    for config in getattr(model, "peft_config", {}).values():
        beginning = getattr(config, "init_lora_weights", True)
        if beginning not in BASE_KEEPING:
            raise InputError(
                f"{what} needs the base as the model with its adapter off, and a LoRA that begins with {beginning!r} "
                f"changes the base's weights: begin with another, or leave {what} out"
            )


@contextlib.contextmanager
def adapter_disabled(model: Any) -> Iterator[None]:
    """The base, for PEFT's wrapper and for an adapter that `transformers` holds itself; it takes no copy."""
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
        return
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def device_of(model: torch.nn.Module) -> torch.device:
    """Where the model takes its inputs."""
    return next(model.parameters()).device


def training_precision(model: torch.nn.Module, args: TrainingArguments) -> torch.autocast:
    """The autocast that the trainer trains with, or none."""
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    return torch.autocast(device_of(model).type, dtype=dtype, enabled=bool(args.bf16 or args.fp16))


@contextlib.contextmanager
def measuring(model: torch.nn.Module, args: TrainingArguments) -> Iterator[None]:
    """Evaluation mode without gradients, in the precision of training; afterwards all is as before."""
    was_training = model.training
    model.eval()
    for module in model.modules():
        # In evaluation bitsandbytes lays 4-bit weights out anew for some CPUs, and gradients are wrong ever after.
        if type(module).__name__ == "Linear4bit":
            module.train()
    try:
        with torch.no_grad(), training_precision(model, args):
            yield
    finally:
        model.train(was_training)
