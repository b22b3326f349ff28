"""Writes the tables and pictures of results/*.json into README.md and docs/, between their markers.

    python scripts/write_results.py [--check]

A block begins with `<!-- table: results/NAME.json TABLE -->` and ends with `<!-- end of table -->`; a table is one of
`loki.study.tables`. Names of methods after it leave out the rows of all others. Fronts that a document shows go to
docs/images. With --check nothing is written, and a block that is not what its result says is an error.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from loki.reporting.content import Table
from loki.results import Result
from loki.study.page import front_picture
from loki.study.tables import AGAINST, markdown, tables

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", *(f"docs/{name}.md" for name in ("results", "damage", "preserve", "dial")))
BLOCK = re.compile(r"(<!-- table: (\S+) (\S+)((?: \S+)*) -->\n).*?(<!-- end of table -->)", re.DOTALL)
FRONT = re.compile(r"images/(\w+)_front_(\w+)\.png")


@cache
def load(name: str) -> Result:
    """A result by its path in the repository."""
    return Result.load(ROOT / name)


def table_of(result: Result, name: str, only: Sequence[str]) -> Table:
    """A table of a result, with the rows of some methods."""
    table = tables(result)[name]
    labels = {method["name"]: method["label"] for method in result.figures["methods"]}
    left_out = set(labels.values()) - {labels[method] for method in only} if only else set()
    return replace(table, rows=tuple(row for row in table.rows if row[0].split(AGAINST)[0] not in left_out))


def filled(text: str) -> str:
    """A document with all its blocks made anew."""

    def block_of(found: re.Match[str]) -> str:
        head, path, name, only, end = found.groups()
        return f"{head}{markdown(table_of(load(path), name, only.split()))}\n{end}"

    return BLOCK.sub(block_of, text)


def fronts(documents: str) -> set[tuple[str, str]]:
    """Studies and texts whose fronts are shown."""
    return set(FRONT.findall(documents))


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        old = path.read_text(encoding="utf-8")
        new = filled(old)
        if new != old:
            stale.append(name)
            if not check:
                path.write_text(new, encoding="utf-8")
    if check:
        for name in stale:
            print(f"{name} is not what results/*.json say: run python scripts/write_results.py", file=sys.stderr)
        return 1 if stale else 0
    for name, text in sorted(fronts("".join((ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS))):
        picture = front_picture(load(f"results/{name}.json"), text)
        picture.save(ROOT / "docs/images" / f"{name}_front_{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
