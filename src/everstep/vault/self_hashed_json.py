"""Self-hashed JSON: an object whose member ``self`` is the BLAKE3 of the others.

The hash is over the canonical form (sorted keys, no spaces). So a flipped bit in such a file is
found as surely as one in a file that is named by its hash.
"""

from __future__ import annotations

import json
from typing import Any

from blake3 import blake3

from everstep.vault.errors import CheckpointDamaged


def encode(content: dict[str, Any]) -> bytes:
    """Encode an object with its hash."""
    return _written({**content, "self": _digest(content)})


def decode(data: bytes, where: str) -> dict[str, Any]:
    """Decode an object and verify its hash.

    Args:
        data: the file's bytes.
        where: its name in an error message.

    Raises:
        CheckpointDamaged: the bytes are not those that were written.
    """
    try:
        content = json.loads(data)
        own = content.pop("self")
        is_whole = own == _digest(content) and _written({**content, "self": own}) == data
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointDamaged(f"{where} can't be read: {error!r}") from error
    if not is_whole:
        raise CheckpointDamaged(f"{where}: its bytes don't hash to what it says")
    found: dict[str, Any] = content
    return found


def _written(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True).encode()


def _digest(content: dict[str, Any]) -> str:
    return blake3(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
