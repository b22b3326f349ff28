"""LokiLayer: a linear layer with a trainable change of some output rows.

The change is a parameter of its own, Δ (K, F) or A (K, r) and B (r, F), added to the outputs of its rows:
`y[..., rows] += x Δᵀ`. The base weight is never touched in training (a mask on its gradient would save no
memory, and a quantised one cannot be changed), and the change stays in float32 whatever the base's dtype,
because steps below about 0.1 % of a weight vanish in bfloat16. The product runs in the input's dtype, or in
autocast's.

Shape suffixes: D rows of the layer (its outputs), F its inputs, K chosen rows, R the rank of LoKI*.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers.pytorch_utils import Conv1D

from loki.implanting.tuner.config import LokiConfig
from loki.implanting.tuner.product import ChangedRowsProduct
from loki.implanting.tuner.quantisation import find_backend

NON_ZERO_STD = 0.02
"""Spread of the random change that `init_weights=False` asks for."""


def rows_and_columns(linear: nn.Module) -> tuple[int, int] | None:
    """(D, F) of a layer whose rows can be trained; None for other modules.

    These are linear layers, quantised ones too, and GPT-2's `Conv1D`, which keeps its weight transposed. The
    output projection of `nn.MultiheadAttention` is none: attention reads its weight and never calls it.
    """
    if isinstance(linear, Conv1D):
        return linear.nf, linear.nx
    if isinstance(linear, nn.Linear) and not isinstance(linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return linear.out_features, linear.in_features
    return None


class LokiLayer(nn.Module, BaseTunerLayer):
    """Rows `loki_rows[adapter]` (K,) of a base layer (D, F) get a change.

    It is `loki_delta[adapter]` (K, F), or `loki_scaling[adapter]` · `loki_A[adapter]` (K, R) ·
    `loki_B[adapter]` (R, F); and `loki_bias[adapter]` (K,) for the rows' biases, where they are trained.
    """

    adapter_layer_names = ("loki_delta", "loki_A", "loki_B", "loki_bias")
    other_param_names = ("loki_rows", "loki_scaling")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        rows: list[int],
        config: LokiConfig,
        *,
        quantisation: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.loki_delta = nn.ParameterDict()
        self.loki_A = nn.ParameterDict()
        self.loki_B = nn.ParameterDict()
        self.loki_bias = nn.ParameterDict()
        # Not saved: the rows are in adapter_config.json.
        self.loki_rows = BufferDict(persistent=False)
        self.loki_scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        # What merging replaced, by adapter: rows of the weight and of the bias, or a whole quantised layer.
        self._replaced: dict[str, tuple[torch.Tensor, torch.Tensor | None] | nn.Module] = {}
        self._quantisation = quantisation or {}
        linear = self.get_base_layer()
        size = rows_and_columns(linear)
        assert size is not None
        self.out_features, self.in_features = size
        self._is_transposed = isinstance(linear, Conv1D)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, rows, config)

    def update_layer(self, adapter_name: str, rows: list[int], config: LokiConfig) -> None:
        """Add an adapter that changes `rows`, which the layer must have."""
        assert rows[-1] < self.out_features
        linear = self.get_base_layer()
        # Where the base is offloaded, the change is not.
        device = None if linear.weight.is_meta else linear.weight.device
        num_rows = len(rows)
        if config.r:
            # As in LoRA, the side next to the inputs is random and the other zero: A·B is zero, its gradient not.
            b_RF = torch.empty(config.r, self.in_features, dtype=torch.float32, device=device)
            nn.init.kaiming_uniform_(b_RF, a=math.sqrt(5))
            self.loki_B[adapter_name] = nn.Parameter(b_RF)
            self.loki_A[adapter_name] = _start(config, device, num_rows, config.r)
        else:
            self.loki_delta[adapter_name] = _start(config, device, num_rows, self.in_features)
        if config.bias == "rows" and linear.bias is not None:
            self.loki_bias[adapter_name] = _start(config, device, num_rows)
        self.loki_scaling[adapter_name] = config.scaling
        self.loki_rows[adapter_name] = torch.tensor(rows, dtype=torch.int64, device=device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Base output (…, D) with each active adapter's change added to its rows."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = [adapter for adapter in self.active_adapters if adapter in self.loki_rows]
        if self.disable_adapters or self.merged:
            adapters = []
        if self._takes_one_product(x, adapters) and not args and not kwargs:
            return self._changed_product(x, adapters[0])
        output: torch.Tensor = self.base_layer(x, *args, **kwargs)
        for adapter in adapters:
            # Not in place: the base layer's hooks may have kept its output, and the copy is cheap.
            output = output.index_add(-1, self.loki_rows[adapter], self._row_outputs(x, adapter).to(output.dtype))
        return output

    def _row_outputs(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """What the change adds to the outputs of its rows: (…, K)."""
        bias_K = self.loki_bias[adapter].to(x.dtype) if adapter in self.loki_bias else None
        if adapter in self.loki_delta:
            return F.linear(x, self.loki_delta[adapter].to(x.dtype), bias_K)
        a_KR = self.loki_A[adapter] * self.loki_scaling[adapter]
        return F.linear(F.linear(x, self.loki_B[adapter].to(x.dtype)), a_KR.to(x.dtype), bias_K)

    def _takes_one_product(self, x: torch.Tensor, adapters: list[str]) -> bool:
        """Whether the change may go into the product with the base weight, which is the quicker way to train.

        Only in float32, because small changes of a bfloat16 weight vanish in rounding; only for an ordinary
        layer that nobody listens to, because the base layer is not called; and only with gradients, because
        a copy of the weight costs more than it saves where few tokens come in at once.
        """
        base = self.base_layer
        return (
            torch.is_grad_enabled()
            and len(adapters) == 1
            and adapters[0] in self.loki_delta
            and type(base) is nn.Linear
            and type(base.weight) is nn.Parameter
            and not base.weight.requires_grad
            and base.weight.dtype == x.dtype == self.loki_delta[adapters[0]].dtype == torch.float32
            and not torch.is_autocast_enabled(x.device.type)
            and not hasattr(base, "_hf_hook")
            and not base._forward_hooks
            and not base._forward_pre_hooks
            and not base._backward_hooks
            and not base._backward_pre_hooks
        )

    def _changed_product(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        rows, bias_D = self.loki_rows[adapter], self.base_layer.bias
        if adapter in self.loki_bias:
            bias_D = bias_D.index_add(0, rows, self.loki_bias[adapter].to(bias_D.dtype))
        output: torch.Tensor = ChangedRowsProduct.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
            x, self.base_layer.weight, bias_D, rows, self.loki_delta[adapter]
        )
        return output

    def row_change(self, adapter_name: str) -> torch.Tensor:
        """The change of the adapter's rows: (K, F) float32."""
        if adapter_name in self.loki_delta:
            change_KF: torch.Tensor = self.loki_delta[adapter_name].float()
        else:
            a_KR, b_RF = self.loki_A[adapter_name].float(), self.loki_B[adapter_name].float()
            change_KF = (self.loki_scaling[adapter_name] * a_KR) @ b_RF
        return change_KF

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The change of the base weight as a dense matrix, float32, zero outside the adapter's rows.

        (D, F), or (F, D) for `Conv1D`: the shape of the base weight.
        """
        change_KF = self.row_change(adapter_name)
        dense_DF = change_KF.new_zeros(self.out_features, self.in_features)
        dense_DF = dense_DF.index_copy(0, self.loki_rows[adapter_name], change_KF)
        return dense_DF.T if self._is_transposed else dense_DF

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` gives the same change: not for changed biases, which LoRA has not."""
        return adapter_name not in self.loki_bias

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter, and leave its dtypes: PEFT would cast changes to the base's, before 0.21 rows too."""
        device = device or self.get_base_layer().weight.device
        for name in (*self.adapter_layer_names, "loki_rows"):
            held = getattr(self, name)
            if adapter_name in held and not held[adapter_name].is_meta and device != torch.device("meta"):
                held[adapter_name].data = held[adapter_name].data.to(device)

    def cast_to_base(self, adapter_name: str) -> None:
        """Keep the change in the base weight's dtype, where that is a floating-point one."""
        dtype = self.get_base_layer().weight.dtype
        if not dtype.is_floating_point:
            return
        for name in self.adapter_layer_names:
            parameters = getattr(self, name)
            if adapter_name in parameters:
                parameters[adapter_name].data = parameters[adapter_name].data.to(dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the change to the base layer's rows, in float32 with one cast at the end.

        A quantised layer is quantised anew as a whole, which rounds its other rows too; a warning says so.

        Raises:
            ValueError: with `safe_merge`, the merged rows are not finite; nothing is changed then.
            InputError: a quantised layer that cannot be written.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.loki_rows:
                continue
            linear, rows = self.get_base_layer(), self.loki_rows[adapter]
            backend = find_backend(linear, self._quantisation, is_wrapped=self.base_layer is not linear)
            weight = linear.weight.data if backend is None else backend.get_base_weight(linear).clone()
            weight_DF = weight.T if self._is_transposed else weight
            replaced_KF = weight_DF[rows]
            merged_KF = (replaced_KF.float() + self.row_change(adapter).to(replaced_KF.device)).to(weight.dtype)
            replaced_K = merged_K = None
            if adapter in self.loki_bias:
                replaced_K = linear.bias.data[rows]
                merged_K = (replaced_K.float() + self.loki_bias[adapter].float()).to(replaced_K.dtype)
            merged = [merged_KF] if merged_K is None else [merged_KF, merged_K]
            if safe_merge and not all(torch.isfinite(part).all() for part in merged):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
            if backend is None:
                self._replaced[adapter] = (replaced_KF, replaced_K)
                weight_DF.index_copy_(0, rows, merged_KF)
            else:
                warnings.warn(
                    f"merging into {backend.backend_name} weights rounds every row of the layer anew; "
                    "`loki merge` into the model's unquantised checkpoint changes only the selected rows",
                    stacklevel=2,
                )
                self._replaced[adapter] = copy.deepcopy(self.base_layer)
                weight_DF.index_copy_(0, rows, merged_KF)
                backend.set_base_weight(self, weight)
            if merged_K is not None:
                self.get_base_layer().bias.data.index_copy_(0, rows, merged_K)
            self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the replaced rows back, exactly, last merged adapter first."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            replaced, rows, linear = self._replaced.pop(adapter), self.loki_rows[adapter], self.get_base_layer()
            if isinstance(replaced, nn.Module):
                self.base_layer = replaced
                continue
            replaced_KF, replaced_K = replaced
            weight = linear.weight.data
            (weight.T if self._is_transposed else weight).index_copy_(0, rows, replaced_KF)
            if replaced_K is not None:
                linear.bias.data.index_copy_(0, rows, replaced_K)


def _start(config: LokiConfig, device: torch.device | None, *shape: int) -> nn.Parameter:
    """A float32 parameter that is zero, or random where the config asks for it."""
    values = torch.zeros(*shape, dtype=torch.float32, device=device)
    if not config.init_weights:
        nn.init.normal_(values, std=NON_ZERO_STD)
    return nn.Parameter(values)
