"""Ranges of HTTP (RFC 9110, section 14): which bytes of a content a request asks for."""

from __future__ import annotations

import re
from collections.abc import Mapping

_RANGE = re.compile(r"bytes\s*=\s*(\d*)\s*-\s*(\d*)\s*", re.IGNORECASE)


class Unsatisfiable(Exception):
    """The range begins behind the end."""


def requested(headers: Mapping[str, str], tag: str, size: int) -> tuple[int, int] | None:
    """Where the bytes begin that a request asks for, and where they end; None: it wants all.

    Several ranges at once, other units and what can't be read are passed over, as the standard
    allows; so is a range of a content that has changed since (``If-Range``).

    Args:
        headers: the request's, by lower-case names.
        tag: the content's entity tag, with its quotes.
        size: of the content, in bytes.

    Raises:
        Unsatisfiable: none of these bytes are there.
    """
    asked = _RANGE.fullmatch(headers.get("range", ""))
    if asked is None or headers.get("if-range", tag).strip() != tag:
        return None
    first, last = asked.groups()
    if first:
        start, stop = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None
    elif last:
        start, stop = max(size - int(last), 0), size
    else:
        return None
    if start >= stop:
        raise Unsatisfiable
    return start, stop
