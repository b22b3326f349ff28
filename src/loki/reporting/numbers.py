"""Numbers as people read them."""

from __future__ import annotations

import math

NBSP, THIN, MINUS = "\u00a0", "\u202f", "\u2212"
_POWERS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def format_number(value: float, digits: int = 4) -> str:
    """A number for reading: `digits` significant digits, thin spaces between thousands, written powers of ten.

    Whole numbers are written whole.
    """
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return with_minus(f"{int(value):,}").replace(",", THIN if abs(value) >= 10_000 else "")
    if abs(value) >= 10_000:
        return with_minus(f"{value:,.0f}").replace(",", THIN)
    if abs(value) >= 1e-3:
        return with_minus(f"{value:.{digits}g}")
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{with_minus(mantissa)}\u2009×\u200910{str(int(exponent)).translate(_POWERS)}"


def power_of_ten(exponent: int, sign: str = "") -> str:
    """`10⁻³`, with a sign before it."""
    return f"{sign}10{str(exponent).translate(_POWERS)}"


def percent(share: float, decimals: int = 1) -> str:
    """A share as a percentage in a sentence: `3.3 %`."""
    return f"{100 * share:.{decimals}f}{NBSP}%".replace("-", MINUS)


def short_percent(share: float) -> str:
    """A share as a percentage on an axis, two digits: `0.1 %`, `25 %`."""
    return f"{100 * share:.2g}{THIN}%" if share < 0.1 else f"{100 * share:.0f}{THIN}%"


def times(ratio: float) -> str:
    """A ratio in a sentence, one decimal; below 0.1 one digit: `8.1`, `0.03`."""
    return f"{ratio:.1f}" if ratio >= 0.1 else f"{ratio:.1g}"


def with_minus(text: str) -> str:
    """The minus sign in place of hyphens."""
    return text.replace("-", MINUS)


def round_down(value: float) -> float:
    """The largest 1, 2, 3, 4, 5, 6 or 8 times a power of ten that is not above `value`, which is positive."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(digit for digit in (8, 6, 5, 4, 3, 2, 1) if digit * power <= value * (1 + 1e-9)) * power


def plural(count: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{format_number(count)} {noun}{'' if count == 1 else 's'}"
