"""Values that every JSON reader can hold.

What is accepted is served back to every client, and Python's ``json`` reads more than others do:
lone surrogates, which no UTF-8 text can hold (RFC 3629, section 3), NaN and infinities, which are
not JSON (RFC 8259, section 6), and integers of any size. One such value in a stored record would
spoil each list that the record is part of.
"""

from __future__ import annotations

import math
from typing import Any

from everstep.integers import MAX_INT64

_MAX_SHOWN = 24


def check_json(value: Any, where: str) -> None:
    """Check that a value can be stored, and sent to any client.

    Args:
        value: a decoded JSON value, at any depth.
        where: its name in the error.

    Raises:
        ValueError: it holds a lone surrogate, NaN, an infinity, or an integer beyond 64 bits. The
            text names the member.
    """
    pending = [(where, value)]
    while pending:
        name, each = pending.pop()
        if isinstance(each, dict):
            for key, item in each.items():
                check_text(str(key), f"a key of {name}")
                pending.append((f"{name}.{key}", item))
        elif isinstance(each, (list, tuple)):
            pending.extend((f"{name}[{index}]", item) for index, item in enumerate(each))
        elif isinstance(each, str):
            check_text(each, name)
        elif isinstance(each, int) and not -MAX_INT64 - 1 <= each <= MAX_INT64:
            raise ValueError(f"{name} is an integer beyond 64 bits; give a smaller one")
        elif isinstance(each, float) and not math.isfinite(each):
            raise ValueError(f"{name} is {each}, which JSON can't hold; send a finite number")


def check_text(text: str, where: str) -> None:
    """Check that a string can be encoded.

    Raises:
        ValueError: it holds a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = text[error.start : error.start + _MAX_SHOWN]
        raise ValueError(
            f"{where} holds a lone surrogate at character {error.start} ({shown!a}), "
            "which no UTF-8 text can hold; encode the text again from its source"
        ) from error


def encodable(text: str) -> str:
    r"""Return a text with its lone surrogates spelled out (``\ud800``), so that it can be sent."""
    return text.encode("utf-8", "backslashreplace").decode()
