"""How the weight of a quantised layer is read and written, for merging; training never touches it."""

from __future__ import annotations

from typing import Any

from torch import nn

from loki.errors import InputError

try:
    from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
except ModuleNotFoundError:  # PEFT before 0.21: changes train on quantised layers, but are not merged into them

    def get_quantization_kwargs(model: nn.Module) -> dict[str, Any]:
        """Nothing to know."""
        return {}

    def resolve_quantization_backend(base_layer: nn.Module, **_: Any) -> Any:
        """No way is known."""
        raise ValueError


__all__ = ["find_backend", "get_quantization_kwargs"]


def find_backend(linear: nn.Module, quantisation: dict[str, Any], *, is_wrapped: bool) -> Any:
    """PEFT's way to read and write a quantised layer's weight; None where the weight is an ordinary one.

    `quantisation` is what `get_quantization_kwargs` found out about the model, `is_wrapped` whether an adapter of
    another method lies between.

    Raises:
        InputError: the weight cannot be read, or not be written.
    """
    weight = linear.weight
    if type(weight) is nn.Parameter and weight.dtype.is_floating_point:
        return None
    # On some CPUs bitsandbytes lays 4-bit weights out anew once they are used, and reads them back wrongly.
    is_laid_out_anew = getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)
    try:
        backend = resolve_quantization_backend(linear, **quantisation)
    except ValueError:  # torchao, quantised by hand: how is not known to the model
        pass
    else:
        if backend is None or (backend.supports_merge and not is_wrapped and not is_laid_out_anew):
            return backend
    raise InputError(
        f"a change cannot be merged into this {type(weight).__name__} of a quantised model: "
        "merge it into the unquantised checkpoint, with `loki merge`"
    )
