"""Integers from text that others wrote.

``int()`` reads digits of every script, underscores and signs, and raises for more than 4,300
digits, which is quadratic work below that.
"""

from __future__ import annotations

MAX_INT64 = (1 << 63) - 1
MAX_SECONDS = 100 * 365 * 24 * 3600
"""The longest time that may be asked for. Clocks, timeouts and dates overflow beyond it."""


def parse_natural(text: str, maximum: int = MAX_INT64) -> int | None:
    """Return a natural number, or None if a text is none.

    Args:
        text: one or more of the digits 0 to 9, and nothing else.
        maximum: the largest number that is accepted.
    """
    if not (text.isascii() and text.isdecimal()):
        return None
    digits = text.lstrip("0") or "0"
    if len(digits) > len(str(maximum)):
        return None
    number = int(digits)
    return number if number <= maximum else None
