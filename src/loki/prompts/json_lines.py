"""Rows of a JSON Lines file, plain or gzipped, and their fields; what cannot be used is named with its line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from loki.errors import InputError
from loki.prompts.render import LETTERS

GZIP_MAGIC = b"\x1f\x8b"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SHOWN_LENGTH = 60
"""Characters of a wrong value that an error shows."""


def read_rows(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """For each row where it stands (`file, line 3`), its line number and its object; blank lines are no rows.

    Raises:
        InputError: the file cannot be read or unpacked, or a line is not UTF-8, not JSON or not an object.
    """
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, number, _row(line, where)


def user_path(path: str | Path) -> Path:
    """A path as the user wrote it, `~` replaced where it names a home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def text_field(row: Mapping[str, Any], name: str, where: str) -> str:
    """A field that must be there and hold text.

    Raises:
        InputError: it is missing, not a text, blank, or holds a broken character.
    """
    return text_value(row.get(name), f"{where}: {name!r}")


def text_value(value: Any, what: str) -> str:
    """`value`, which must be a text that is not blank.

    Raises:
        InputError: it is something else, or holds half of a surrogate pair, which no tokenizer takes.
    """
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{what} must be a text that is not blank, not {shown(value)}")
    return whole_text(value, what)


def whole_text(value: str, what: str) -> str:
    """`value`, if it can be written as UTF-8.

    Raises:
        InputError: it holds half of a surrogate pair, which JSON can spell (`\\ud83d`) but which is no character.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start].encode("unicode_escape").decode()
        raise InputError(f"{what} has {half}, half of a character: write the whole character") from error
    return value


def choices_field(row: Mapping[str, Any], where: str, *, fewest: int = 2, most: int = len(LETTERS)) -> tuple[str, ...]:
    """The options of a question.

    Raises:
        InputError: not a list of `fewest` to `most` texts.
    """
    choices = row.get("choices")
    if not isinstance(choices, list) or not fewest <= len(choices) <= most:
        number = str(fewest) if fewest == most else f"{fewest} to {most}"
        found = f"{len(choices)} of them" if isinstance(choices, list) else shown(choices)
        raise InputError(f"{where}: 'choices' must be a list of {number} texts, not {found}")
    return tuple(text_value(choice, f"{where}: choice {LETTERS[i]}") for i, choice in enumerate(choices))


def answer_field(row: Mapping[str, Any], num_choices: int, where: str) -> int:
    """Index of the right option, given as such or as a letter.

    Raises:
        InputError: neither an index nor a letter of one of the `num_choices` options.
    """
    answer = row.get("answer")
    letters = LETTERS[:num_choices]
    if isinstance(answer, str) and len(answer) == 1 and answer.upper() in letters:
        return letters.index(answer.upper())
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < num_choices:
        return answer
    raise InputError(
        f"{where}: 'answer' must be an index from 0 to {num_choices - 1} or a letter from A to {letters[-1]}, "
        f"not {shown(answer)}"
    )


def shown(value: Any) -> str:
    """A wrong value as an error shows it: in one line, and not all of a long one."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= SHOWN_LENGTH else f"{text[:SHOWN_LENGTH]}…"


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            zipped = path.suffix == ".gz" or file.peek(2)[:2] == GZIP_MAGIC
            lines = cast(Iterator[bytes], gzip.GzipFile(fileobj=file) if zipped else file)
            for number, line in enumerate(lines):
                yield line.removeprefix(BYTE_ORDER_MARK) if number == 0 else line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not a whole gzip file ({error}): compress it again") from error
    except (OSError, ValueError) as error:
        # A path that holds what no path can is a ValueError.
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{str(path)!r} cannot be read ({reason}): name a JSON Lines file") from error


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text: save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise InputError(f"{where} is not JSON ({reason}): write one JSON object a line") from error
    if not isinstance(row, dict):
        raise InputError(f"{where} is {shown(row)}: write one JSON object a line")
    return row
