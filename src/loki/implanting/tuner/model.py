"""LokiModel: puts LokiLayers around the linear layers whose rows are named in the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from loki.architecture import FAMILIES, down_projections, family_of, model_type_of, shape_of
from loki.errors import InputError
from loki.implanting.tuner.config import LokiConfig
from loki.implanting.tuner.layer import LokiLayer
from loki.rows import RowSelection, named_for


class LokiModel(BaseTuner):
    """A model of which only selected rows are trained."""

    prefix = "loki_"
    tuner_layer_cls = LokiLayer
    target_module_mapping = {name: [family.down_proj] for name, family in FAMILIES.items()}  # noqa: RUF012

    def _prepare_adapter_config(self, peft_config: LokiConfig, model_config: dict[str, Any]) -> LokiConfig:
        """Check that the positions fit the model, and target the modules that they name.

        Raises:
            InputError: no positions, positions of modules that do not exist, or target modules that the
                positions do not speak of.
            ArtefactError: positions of another model.
            ArchitectureError: positions by layer for a family that is not known.
        """
        positions = peft_config.positions
        if positions is None:
            raise InputError("LokiConfig has no positions: name a positions file, or the rows themselves")
        if isinstance(positions, Mapping):
            named = set(positions)
            meant = {named_for(module_name, named) for module_name, _ in self.model.named_modules()}
            if named - meant:
                raise InputError(
                    f"positions name {sorted(named - meant)[0]!r}, which the model does not have: "
                    "give names of its linear layers, as in model.named_modules()"
                )
        else:
            shape = shape_of(self.model)
            selection = RowSelection.from_lists(positions)
            selection.require_fit(num_layers=shape.num_layers, num_rows=shape.num_rows)
            named = {family_of(model_type_of(self.model)).down_proj}
        if peft_config.target_modules is None:
            peft_config.target_modules = named
        elif peft_config.target_modules != named:
            raise InputError(
                f"target_modules {peft_config.target_modules!r} and positions disagree: leave target_modules out; "
                "for other modules give positions as {module name: rows}"
            )
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
        rows = self._rows_of(loki_config, current_key)
        if not rows:
            return
        if isinstance(target, LokiLayer):
            target.update_layer(
                adapter_name,
                rows,
                init_weights=loki_config.init_weights,
                inference_mode=loki_config.inference_mode,
            )
            return
        linear = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"rows of {current_key} cannot be trained: it is {type(linear).__name__}, not nn.Linear")
        layer = LokiLayer(target, adapter_name, rows, init_weights=loki_config.init_weights)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _rows_of(self, config: LokiConfig, key: str) -> list[int]:
        """The rows that the config names for a module."""
        if isinstance(config.positions, Mapping):
            name = named_for(key, config.positions)
            return [] if name is None else list(config.positions[name])
        return list(config.positions[list(down_projections(self.model)).index(key)])
