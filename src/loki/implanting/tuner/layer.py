"""LokiLayer: a linear layer with a trainable change of some output rows.

The change Δ is a parameter of its own, added to the outputs of its rows: `y[..., rows] += x Δᵀ`. The base
weight is never touched in training (a mask on its gradient would save no memory, rebuilding it would cost a
copy a step), and Δ stays in float32 whatever the base's dtype, because steps below about 0.1 % of a weight
vanish in bfloat16.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.nn import functional as F  # noqa: N812

NON_ZERO_STD = 0.02
"""Spread of the random change that `init_weights=False` asks for."""


class LokiLayer(nn.Module, BaseTunerLayer):
    """Rows `loki_rows[adapter]` (K,) of a base layer (D, F) get the change `loki_delta[adapter]` (K, F)."""

    adapter_layer_names = ("loki_delta",)
    other_param_names = ("loki_rows",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, rows: list[int], *, init_weights: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.loki_delta = nn.ParameterDict()
        # Not saved: the rows are in adapter_config.json.
        self.loki_rows = BufferDict(persistent=False)
        self.merged_adapters: list[str] = []
        self._replaced_rows: dict[str, torch.Tensor] = {}
        linear = self.get_base_layer()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, rows, init_weights=init_weights, inference_mode=False)

    def update_layer(self, adapter_name: str, rows: list[int], *, init_weights: bool, inference_mode: bool) -> None:
        """Add an adapter that changes `rows`.

        Raises:
            ValueError: a row that the layer does not have.
        """
        if rows[-1] >= self.out_features:
            raise ValueError(f"row {rows[-1]} does not exist: the layer's rows are 0 to {self.out_features - 1}")
        device = self.get_base_layer().weight.device
        delta_KF = torch.zeros(len(rows), self.in_features, dtype=torch.float32, device=device)
        if not init_weights:
            nn.init.normal_(delta_KF, std=NON_ZERO_STD)
        self.loki_delta[adapter_name] = nn.Parameter(delta_KF)
        self.loki_rows[adapter_name] = torch.tensor(rows, dtype=torch.int64, device=device)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Base output (…, D) with each active adapter's change added to its rows."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        output: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return output
        for adapter in self.active_adapters:
            if adapter in self.loki_delta:
                change = F.linear(x, self.loki_delta[adapter].to(x.dtype))
                output = output.index_add(-1, self.loki_rows[adapter], change.to(output.dtype))
        return output

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The change as a dense matrix (D, F), float32, zero outside the adapter's rows."""
        delta_KF = self.loki_delta[adapter_name]
        dense = torch.zeros(self.out_features, self.in_features, dtype=delta_KF.dtype, device=delta_KF.device)
        return dense.index_copy(0, self.loki_rows[adapter_name], delta_KF)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the change to the base weight's rows, in float32 with one cast at the end.

        Raises:
            ValueError: with `safe_merge`, the merged rows are not finite; nothing is changed then.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.loki_delta:
                continue
            weight_DF = self.get_base_layer().weight.data
            rows = self.loki_rows[adapter]
            replaced_KF = weight_DF[rows]
            merged_KF = (replaced_KF.float() + self.loki_delta[adapter].float()).to(weight_DF.dtype)
            if safe_merge and not torch.isfinite(merged_KF).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
            self._replaced_rows[adapter] = replaced_KF
            weight_DF.index_copy_(0, rows, merged_KF)
            self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the replaced rows back, exactly, last merged adapter first."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            self.get_base_layer().weight.data.index_copy_(0, self.loki_rows[adapter], self._replaced_rows.pop(adapter))
