"""pytest plugin: puts our configs where PEFT's tests have those of PEFT's methods, and leaves out all other tests.

`@pytest.mark.parametrize` keeps the list it was given, so each list is replaced in the marks that hold it.
"""

from __future__ import annotations

import inspect
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from peft_suite.cases import CUSTOM_MODELS, DECODER_CONFIGS, TWO_ADAPTERS, RowsOfTargets, fits

from loki import LokiConfig

REPLACED = {
    "test_custom_models": {
        "TEST_CASES": CUSTOM_MODELS,
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": TWO_ADAPTERS,
        "ALL_PEFT_CONFIG_CLASSES": [RowsOfTargets],
    },
    "test_decoder_models": {"ALL_CONFIGS": DECODER_CONFIGS},
    "test_config": {"ALL_CONFIG_CLASSES": [(LokiConfig, {}), (LokiConfig, {"positions": [[1, 2], []], "r": 2})]},
}
"""Our values by module and list."""
WIDENED = {"_skip_if_conv1d_not_supported", "check_beft_config"}
"""Functions that skip tests of every method but a few, where ours can be tested: they do nothing here."""
EXCLUDED = Path(__file__).with_name("excluded.txt")


def _stub_diffusers() -> None:
    """PEFT's tests import one class of diffusers, to skip what is made with it."""
    if "diffusers" not in sys.modules:
        module = ModuleType("diffusers")
        module.__spec__ = ModuleSpec("diffusers", None)
        module.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
        sys.modules["diffusers"] = module


def read_excluded() -> dict[str, str]:
    """Names of tests that are left out, with the reason."""
    lines = [line.strip() for line in EXCLUDED.read_text().splitlines()]
    return dict(line.split(": ", 1) for line in lines if line and not line.startswith("#"))


def pytest_configure(config: pytest.Config) -> None:
    _stub_diffusers()


def pytest_collectstart(collector: pytest.Collector) -> None:
    if not isinstance(collector, pytest.Module):
        return
    module = collector.obj
    for place in (module, sys.modules.get("tests.testing_common")):
        for name in WIDENED & vars(place).keys() if place else ():
            setattr(place, name, lambda *_: None)
    ours = {id(getattr(module, name)): values for name, values in REPLACED[collector.path.stem].items()}
    for place in (module, *(value for value in vars(module).values() if inspect.isclass(value))):
        for value in vars(place).values():
            if inspect.isfunction(value) and hasattr(value, "pytestmark"):
                value.pytestmark = [_with_ours(mark, ours) for mark in value.pytestmark]


def _with_ours(mark: pytest.Mark, ours: dict[int, list[Any]]) -> pytest.Mark:
    if mark.name != "parametrize" or id(mark.args[1]) not in ours:
        return mark
    return pytest.mark.parametrize(mark.args[0], ours[id(mark.args[1])], **mark.kwargs).mark


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    excluded = read_excluded()
    kept, left_out = [], 0
    for item in items:
        values = getattr(item, "callspec", None)
        if values is None or not any(value in (LokiConfig, RowsOfTargets) for value in _classes(values.params)):
            continue  # a test of PEFT's own methods
        model_id = values.params.get("model_id", "")
        if "/" in model_id and not fits(model_id, values.params["config_kwargs"]):
            continue
        if item.originalname in excluded:
            left_out += 1
            continue
        kept.append(item)
    unknown = set(excluded) - {item.originalname for item in items}
    if unknown:
        raise pytest.UsageError(f"{EXCLUDED} names tests that PEFT does not have: {', '.join(sorted(unknown))}")
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
    config.stash[_LEFT_OUT] = left_out


_LEFT_OUT = pytest.StashKey[int]()


def _classes(params: dict[str, Any]) -> list[type]:
    return [value for value in params.values() if isinstance(value, type)]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    stats = terminalreporter.stats
    passed, failed, skipped = (len(stats.get(name, [])) for name in ("passed", "failed", "skipped"))
    failed += len(stats.get("error", []))
    terminalreporter.ensure_newline()
    terminalreporter.write_line(
        f"PEFT {version('peft')}, its own tests with LoKI: {passed} passed, {failed} failed, "
        f"{skipped} skipped by PEFT as not meant for the method, "
        f"{config.stash.get(_LEFT_OUT, 0)} excluded by name in {EXCLUDED.name}"
    )
