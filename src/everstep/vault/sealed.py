"""Sealed JSON: one object whose last member, ``self``, is the BLAKE3 of the rest.

The hash is over the canonical form (sorted keys, no spaces), so that a flipped bit in such a file
is found as surely as one in a file that lies under its hash.
"""

from __future__ import annotations

import json
from typing import Any

from blake3 import blake3

from everstep.vault.errors import CheckpointDamaged


def encode(content: dict[str, Any]) -> bytes:
    """An object as it is written."""
    return _written({**content, "self": _digest(content)})


def decode(data: bytes, where: str) -> dict[str, Any]:
    """Read an object; raises `CheckpointDamaged` unless it is what was written.

    Args:
        data: the file's bytes.
        where: what to call it in an error.
    """
    try:
        content = json.loads(data)
        own = content.pop("self")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointDamaged(f"{where} can't be read: {error!r}") from error
    if own != _digest(content) or _written({**content, "self": own}) != data:
        raise CheckpointDamaged(f"{where}: its bytes don't hash to what it says")
    found: dict[str, Any] = content
    return found


def _written(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True).encode()


def _digest(content: dict[str, Any]) -> str:
    return blake3(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
