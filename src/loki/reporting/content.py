"""What a page is made of: sections, each a finding in one sentence, its pictures, and how to read them."""

from __future__ import annotations

from dataclasses import dataclass, field

from loki.reporting.drawing import Picture


@dataclass(frozen=True)
class Explorer:
    """Makes maps answer to pointer, touch and keys."""

    kind: str
    """`rows` or `subjects`: which data and which words the script takes."""
    votes: str = ""
    """`signed` or `magnitude`."""
    names: tuple[str, str] = ("", "")
    """What high and low votes are called."""
    decades: int = 1
    """The colour scale's span."""


@dataclass(frozen=True)
class Table:
    """Rows of text under headings; the first column names the row."""

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_text_columns: int = 1
    """So many columns from the left hold words, the others numbers."""


@dataclass(frozen=True)
class Section:
    """A finding and its pictures."""

    name: str
    """Of its anchor."""
    heading: str
    result: str
    reading: str = ""
    pictures: dict[str, Picture] = field(default_factory=dict)
    """By the name of the file that `--figures` writes."""
    explorer: Explorer | None = None
    table: Table | None = None


@dataclass(frozen=True)
class Content:
    """The sections, the numbers over them, and the data for the page's script."""

    sections: tuple[Section, ...]
    glance: tuple[tuple[str, str], ...]
    """A number and what it is."""
    script_data: dict[str, str]
    """JSON by the name that the script knows."""
