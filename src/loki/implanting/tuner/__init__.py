"""LoKI as a PEFT method; importing this package registers it under the name `LOKI`."""

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from loki.implanting.tuner.config import LokiConfig
from loki.implanting.tuner.layer import LokiLayer
from loki.implanting.tuner.model import LokiModel
from loki.implanting.tuner.peft_type import LOKI

if LOKI not in PEFT_TYPE_TO_TUNER_MAPPING:
    register_peft_method(name="loki", config_cls=LokiConfig, model_cls=LokiModel)

__all__ = ["LokiConfig", "LokiLayer", "LokiModel"]
