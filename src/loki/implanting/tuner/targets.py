"""Which rows of which modules a LokiConfig means in a given model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from loki.architecture import Family, family_of, model_type_of, projections, shape_of
from loki.choices import ModuleName
from loki.errors import InputError
from loki.implanting.tuner.config import LokiConfig
from loki.implanting.tuner.layer import rows_and_columns
from loki.rows import RowSelection, named_for


def config_of_blocks(model: nn.Module, selections: Mapping[ModuleName, RowSelection], **options: Any) -> LokiConfig:
    """A configuration that trains rows by layer of one projection, or of several; `options` as LokiConfig has them.

    Raises:
        ArtefactError: rows for another number of layers.
        ArchitectureError: a family that is not known, or without such a projection.
    """
    if len(selections) == 1:
        ((module, rows),) = selections.items()
        return LokiConfig(positions=rows, target_modules=None if module == "down_proj" else module, **options)
    by_name: dict[str, list[int]] = {}
    for module, rows in selections.items():
        names = projections(model, module)
        rows.require_fit(num_layers=len(names), num_rows=shape_of(model).num_rows, what=f"positions of {module}")
        by_name |= {name: chosen for name, chosen in zip(names, rows.as_lists(), strict=True) if chosen}
    return LokiConfig(positions=by_name, **options)


def resolve_targets(config: LokiConfig, model: nn.Module) -> set[str]:
    """The `target_modules` that the positions stand for, after a check that every row exists.

    Raises:
        InputError: no positions, positions of modules or rows that do not exist or cannot be trained, target
            modules that the positions do not speak of, or `bias="rows"` where no layer has a bias.
        ArtefactError: positions by layer of another model.
        ArchitectureError: positions by layer for a family that is not known.
    """
    positions = config.positions
    if positions is None:
        raise InputError("LokiConfig has no positions: name a positions file, or the rows themselves")
    if isinstance(positions, Mapping):
        targets = _named(config, model)
    else:
        module = _by_layer(config, model)
        found = projections(model, module)
        num_rows = min(_num_rows(name, linear) for name, linear in found.items())
        RowSelection.from_lists(positions).require_fit(num_layers=len(found), num_rows=num_rows)
        targets = {family_of(model_type_of(model)).projection(module)}
    _require_rows(config, targets, model)
    return targets


def rows_of(config: LokiConfig, model: nn.Module, module_name: str) -> list[int]:
    """The rows that the config names for a module; none for a module that it does not speak of."""
    if isinstance(config.positions, Mapping):
        name = named_for(module_name, config.positions)
        return [] if name is None else list(config.positions[name])
    names = list(projections(model, _by_layer(config, model)))
    return list(config.positions[names.index(module_name)]) if module_name in names else []


def _by_layer(config: LokiConfig, model: nn.Module) -> ModuleName:
    """Which projection positions by layer speak of.

    Raises:
        InputError: `target_modules` names no such projection, or several.
    """
    family = family_of(model_type_of(model))
    wanted = config.target_modules
    if wanted is None:
        return "down_proj"
    names = {module: _names_of(module, family) for module in get_args(ModuleName)}
    meant: list[ModuleName] = [module for module in names if set(wanted) <= names[module]]
    if len(meant) != 1:
        raise InputError(
            f"target_modules {sorted(wanted)} and positions by layer disagree: leave target_modules out for the "
            "down-projections, give 'o_proj' for those of attention, or give positions as {module name: rows}"
        )
    return meant[0]


def _names_of(module: ModuleName, family: Family) -> set[str]:
    """What a projection may be called: ours, and the family's own name with and without its block."""
    path = family.projection(module)
    return {module, path, path.rpartition(".")[2]}


def _named(config: LokiConfig, model: nn.Module) -> set[str]:
    named = set(config.positions)
    meant = {named_for(module_name, named) for module_name, _ in model.named_modules()}
    if named - meant:
        raise InputError(
            f"positions name {sorted(named - meant)[0]!r}, which the model does not have: "
            "give names of its linear layers, as in model.named_modules()"
        )
    if config.target_modules is not None and set(config.target_modules) != named:
        raise InputError(
            f"target_modules {sorted(config.target_modules)} and the modules that positions name "
            f"({sorted(named)}) disagree: leave target_modules out"
        )
    return named


def _require_rows(config: LokiConfig, targets: set[str], model: nn.Module) -> None:
    any_bias = False
    resolved = replace(config, target_modules=targets)
    for name, module in model.named_modules():
        if named_for(name, targets) is None or not (rows := rows_of(config, model, name)):
            continue
        if not check_target_module_exists(resolved, name):
            raise InputError(f"{name} is in positions and in modules_to_save: train its rows or all of it, not both")
        num_rows = _num_rows(name, module)
        if rows[-1] >= num_rows:
            raise InputError(f"{name} has no row {rows[-1]}: its rows are 0 to {num_rows - 1}; correct the positions")
        any_bias = any_bias or _plain_layer(module).bias is not None
    if config.bias == "rows" and not any_bias:
        raise InputError("bias 'rows' needs layers that have a bias, and none of those in positions has: give 'none'")


def _num_rows(name: str, module: nn.Module) -> int:
    linear = _plain_layer(module)
    size = rows_and_columns(linear)
    if size is None:
        raise InputError(
            f"rows of {name} cannot be trained: it is {type(linear).__name__}, not a linear layer; "
            "name linear layers in positions"
        )
    return size[0]


def _plain_layer(module: nn.Module) -> nn.Module:
    """The layer itself, below adapters."""
    if not isinstance(module, BaseTunerLayer):
        return module
    layer: nn.Module = module.get_base_layer()
    return layer
