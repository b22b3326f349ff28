"""Closed choices that settings, commands and files share; this module imports nothing heavy."""

from typing import Literal

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
LogDtypeName = Literal["float32", "float16"]
SplitName = Literal["dev", "validation", "test"]

Rule = Literal["riemann_left", "riemann_right", "riemann_middle", "riemann_trapezoid", "gausslegendre"]
Objective = Literal["probability", "logit", "log_probability"]
SiteName = Literal["auto", "down_proj", "after_norm"]
EngineName = Literal["branch", "recompute"]
TargetName = Literal["predicted", "answer"]
RowScoreName = Literal["damage", "fisher", "first_order", "activation_norm"]
ScoreName = Literal["kva", RowScoreName]
ModuleName = Literal["down_proj", "o_proj"]

StrategyName = Literal[
    "layer_balanced",
    "layer_balanced_magnitude",
    "adaptive",
    "capped",
    "layer_highest",
    "layer_highest_magnitude",
    "global_lowest",
    "global_highest",
    "random",
]
