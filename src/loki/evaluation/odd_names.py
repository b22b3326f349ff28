"""Names that Python's grammar does not know, such as `Get News` of ToolACE or an argument `from`, made readable.

In a reply each is replaced by a stand-in before the reply is parsed, in front of `(` or `=` and outside of texts only.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Collection, Mapping

STAND_IN = "_stand_in_"
TEXTS = r'"(?:\\.|[^"\\])*"' + "|" + r"'(?:\\.|[^'\\])*'"


def is_odd(name: str) -> bool:
    """Whether Python cannot read a name, of which parts may be joined by dots."""
    return not all(part.isidentifier() and not keyword.iskeyword(part) for part in name.split("."))


def with_stand_ins(reply: str, names: Collection[str]) -> tuple[str, Mapping[str, str]]:
    """The reply with a stand-in for each of the odd `names`, and the names by their stand-ins."""
    odd = sorted({name for name in names if name.strip() and is_odd(name)})
    if not odd:
        return reply, {}
    stand_in_of = {name: f"{STAND_IN}{index}" for index, name in enumerate(odd)}
    known = "|".join(map(re.escape, odd))
    pattern = re.compile(rf"(?<![\w.])(?P<name>{known})(?=\s*[(=])|{TEXTS}", re.DOTALL)

    def replace(found: re.Match[str]) -> str:
        return found[0] if found["name"] is None else stand_in_of[found["name"]]

    return pattern.sub(replace, reply), {stand_in: name for name, stand_in in stand_in_of.items()}
