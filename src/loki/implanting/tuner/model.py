"""LokiModel: puts LokiLayers around the linear layers whose rows are named in the config."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from loki.architecture import FAMILIES
from loki.implanting.tuner.combination import combine
from loki.implanting.tuner.config import LokiConfig
from loki.implanting.tuner.layer import LokiLayer
from loki.implanting.tuner.quantisation import get_quantization_kwargs
from loki.implanting.tuner.targets import resolve_targets, rows_of


class LokiModel(BaseTuner):
    """A model of which only selected rows are trained."""

    prefix = "loki_"
    tuner_layer_cls = LokiLayer
    target_module_mapping = {name: [family.down_proj] for name, family in FAMILIES.items()}  # noqa: RUF012

    def _prepare_adapter_config(self, peft_config: LokiConfig, model_config: dict[str, Any]) -> LokiConfig:
        """Check that the positions fit the model, and target the modules that they name.

        Raises:
            LokiError: they do not; see `resolve_targets`.
        """
        peft_config.target_modules = resolve_targets(peft_config, self.model)
        return peft_config

    def _create_and_replace(
        self,
        loki_config: LokiConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        rows = rows_of(loki_config, self.model, current_key)
        if not rows:
            return
        if isinstance(target, LokiLayer):
            target.update_layer(adapter_name, rows, loki_config)
            return
        layer = LokiLayer(target, adapter_name, rows, loki_config, quantisation=get_quantization_kwargs(self.model))
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a module in another's place.

        PEFT's own copies weights between the two, which quantised layers and its wrappers of embeddings refuse;
        a LokiLayer is made on the device of its base.
        """
        setattr(parent, child_name, new_module)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Freeze the base.

        As PEFT does, but for its own meaning of `bias`: it would unfreeze the base's biases. Ours are changes of
        their own, so that several adapters can have them and disabling an adapter gives the base again.
        """
        trained: set[int] = set()
        for module in model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                trained |= {id(parameter) for parameter in module.parameters()}
            elif isinstance(module, BaseTunerLayer):
                for name in module.adapter_layer_names:
                    trained |= {id(parameter) for parameter in getattr(module, name).parameters()}
        for parameter in model.parameters():
            if id(parameter) not in trained:
                parameter.requires_grad_(False)

    def _check_new_adapter_config(self, config: LokiConfig) -> None:
        """Nothing to refuse: PEFT allows one adapter with `bias`, because its biases are the base's own."""

    def disable_adapter_layers(self) -> None:
        """Leave the base model; PEFT's warning about `bias` does not hold here."""
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                module.enable_adapters(False)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:  # DeepSpeed's ZeRO-3 wants one dtype
            for layer in self.modules():
                if isinstance(layer, LokiLayer):
                    layer.cast_to_base(adapter_name)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter whose change is the sum of the adapters' changes, each times its weight.

        The sum is exact, over the union of their rows: of LoKI* adapters it is a LoKI* adapter with all their
        ranks, and with adapters of both kinds one of whole rows.

        Raises:
            InputError: unknown adapters, another number of weights, a name that is taken, another
                `combination_type`, or adapters that train more than rows.
        """
        combine(self, adapters, weights, adapter_name, combination_type)
