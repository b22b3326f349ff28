"""LoKI: Low-damage Knowledge Implanting (arXiv 2505.22120): fine-tune a language model without it forgetting.

Importing this package makes PEFT know the method `LOKI`, at once if PEFT is imported already, otherwise as
soon as it is. It imports neither torch nor PEFT itself; public names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from loki._peft_hook import register_with_peft

if TYPE_CHECKING:
    from loki.analysis.attribution import AttributionResult, attribute
    from loki.analysis.row_scores import score_rows
    from loki.errors import LokiError
    from loki.implanting.convert import create_loki_model
    from loki.implanting.modeling.modeling_loki import LoKILinear
    from loki.implanting.restore import restore_loki_model
    from loki.implanting.tuner import LokiConfig
    from loki.rows import RowSelection
    from loki.training.budget import ForgettingBudget
    from loki.training.preserve import PreservePredictions
    from loki.training.row_rates import RowRates

__version__ = "0.1.0"
__all__ = [
    "AttributionResult",
    "ForgettingBudget",
    "LoKILinear",
    "LokiConfig",
    "LokiError",
    "PreservePredictions",
    "RowRates",
    "RowSelection",
    "attribute",
    "create_loki_model",
    "restore_loki_model",
    "score_rows",
]

_HOMES = {
    "AttributionResult": "loki.analysis.attribution",
    "ForgettingBudget": "loki.training.budget",
    "LoKILinear": "loki.implanting.modeling.modeling_loki",
    "LokiConfig": "loki.implanting.tuner",
    "LokiError": "loki.errors",
    "PreservePredictions": "loki.training.preserve",
    "RowRates": "loki.training.row_rates",
    "RowSelection": "loki.rows",
    "attribute": "loki.analysis.attribution",
    "create_loki_model": "loki.implanting.convert",
    "restore_loki_model": "loki.implanting.restore",
    "score_rows": "loki.analysis.row_scores",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'loki' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_peft()
