"""HTTP ranges (RFC 9110, section 14): the bytes of a content that a request selects."""

from __future__ import annotations

import re
from collections.abc import Mapping

from everstep.integers import MAX_INT64, parse_natural

_RANGE = re.compile(r"bytes\s*=\s*([0-9]*)\s*-\s*([0-9]*)\s*", re.IGNORECASE)


class Unsatisfiable(Exception):
    """The range begins after the end of the content."""


def requested(headers: Mapping[str, str], tag: str, size: int) -> tuple[int, int] | None:
    """Return the start and stop of the range that a request selects, or None for the whole content.

    Multiple ranges, other units and malformed ranges are ignored, as the standard allows. So is a
    range of a content that has changed since (``If-Range``).

    Args:
        headers: the request's headers, by lower-case names.
        tag: the content's entity tag, with its quotes.
        size: the size of the content in bytes.

    Raises:
        Unsatisfiable: the content has none of these bytes.
    """
    range_ = _RANGE.fullmatch(headers.get("range", ""))
    if range_ is None or headers.get("if-range", tag).strip() != tag:
        return None
    first, last = (_position(digits) for digits in range_.groups())
    if first is not None:
        start, stop = first, size if last is None else min(last + 1, size)
        if last is not None and last < start:
            return None
    elif last is not None:
        start, stop = max(size - last, 0), size
    else:
        return None
    if start >= stop:
        raise Unsatisfiable
    return start, stop


def _position(digits: str) -> int | None:
    """Read a position. One beyond 64 bits is behind the end of everything."""
    if not digits:
        return None
    number = parse_natural(digits)
    return MAX_INT64 if number is None else number
