"""Quotas in exact arithmetic: binary floats lose one row at some quotas."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from fractions import Fraction

from loki.errors import InputError

MAX_EXPONENT = 50


def parse_quota(quota: str | float | Fraction) -> Fraction:
    """A percentage in (0, 100], exactly as written: `"10"`, `0.5`, `"33.3"`.

    Raises:
        InputError: not a number, or outside (0, 100].
    """
    try:
        # str() of a float is its shortest decimal form, which is what the user wrote.
        exact = quota if isinstance(quota, Fraction) else _fraction(str(quota))
    except (InvalidOperation, ValueError, OverflowError):
        raise InputError(f"quota {quota!r} is not a number: give a percentage above 0 and up to 100") from None
    if not 0 < exact <= 100:
        raise InputError(f"quota {quota} is outside (0, 100]: give a percentage above 0 and up to 100")
    return exact


def _fraction(text: str) -> Fraction:
    number = Decimal(text.strip())
    if number.is_finite() and abs(number.adjusted()) > MAX_EXPONENT:
        # As an exact fraction, 1e999999999 would be a number of a billion digits.
        number = Decimal(0)
    return Fraction(number)


def rows_for_quota(quota: str | float | Fraction, num_rows: int) -> int:
    """⌊quota/100 · num_rows⌋.

    Raises:
        InputError: as `parse_quota`, or the quota gives no row.
    """
    exact = parse_quota(quota)
    count = int(exact * num_rows / 100)
    if count == 0:
        least = format_quota(Fraction(100, num_rows))
        raise InputError(f"quota {format_quota(exact)} gives no row out of {num_rows}: give at least {least}")
    return count


def format_quota(quota: Fraction) -> str:
    """Decimal text of a quota, as `10` or `0.5`; only an endless fraction is rounded, up to 4 decimals."""
    decimals = 4
    # A fraction ends where its denominator divides a power of ten, which takes at most its bits in decimals.
    for places in range(quota.denominator.bit_length() + 1):
        if 10**places % quota.denominator == 0:
            decimals = places
            break
    scaled = -(-quota * 10**decimals // 1)
    text = f"{Decimal(int(scaled)).scaleb(-decimals):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
