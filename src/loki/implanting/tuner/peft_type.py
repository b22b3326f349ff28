"""The member `LOKI` of PEFT's enumeration of methods.

PEFT finds a saved adapter's method by the member's value in `adapter_config.json`, and an enumeration with
members cannot be subclassed; so the member is added in place.
"""

from aenum import extend_enum
from peft.utils.peft_types import PeftType

if "LOKI" not in PeftType.__members__:
    extend_enum(PeftType, "LOKI", "LOKI")

LOKI = PeftType("LOKI")
