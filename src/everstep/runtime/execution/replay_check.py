"""Replay check: compares a replayed result with the recorded one.

In the numeric environment of the recorded result both must be equal, bit for bit. In another one
(other threads, instruction set, torch, device or dtype) the last bits may differ. Numbers are then
compared to a tolerance, which is stated here and in docs/numerics.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from everstep.wire.codecs.proto import decode_forward_backward_output
from everstep.wire.errors import InvalidRequest

ABSOLUTE = 2e-2
RELATIVE = 2e-2
"""Tolerances in another environment: bfloat16 has 8 bits of mantissa."""


def difference(
    recorded: bytes, media: str | None, replayed: bytes | dict[str, Any], *, exact: bool
) -> str | None:
    """Describe how a replayed result differs from the recorded one.

    Args:
        recorded: the result in the ledger.
        media: its encoding, ``protobuf`` or ``json``.
        replayed: the replayed result: protobuf bytes, or JSON.
        exact: whether they must be equal bit for bit.

    Returns:
        The largest difference, or None if there is none or all are within the tolerance.
    """
    if _canonical(replayed) == recorded:
        return None
    try:
        before, after = list(_numbers(recorded, media)), list(_numbers(replayed, media))
    except (InvalidRequest, ValueError) as error:
        return f"the recorded result can't be read: {error}"
    if [name for name, _ in before] != [name for name, _ in after]:
        return "the results have other parts"
    worst = _worst(before, after)
    if worst is None:
        return "the bytes differ, the numbers don't" if exact else None
    name, recorded_value, replayed_value, within = worst
    if within and not exact:
        return None
    return f"{name} was {recorded_value!r} and is {replayed_value!r} now"


def _canonical(result: bytes | dict[str, Any]) -> bytes:
    return result if isinstance(result, bytes) else json.dumps(result).encode()


def _worst(
    before: list[tuple[str, float]], after: list[tuple[str, float]]
) -> tuple[str, float, float, bool] | None:
    """Return the number with the largest difference, and whether it is within the tolerance."""
    found: tuple[str, float, float, bool] | None = None
    largest = -1.0
    for (name, old), (_, new) in zip(before, after, strict=True):
        if old == new or (math.isnan(old) and math.isnan(new)):
            continue
        off = abs(old - new) / (ABSOLUTE + RELATIVE * abs(old))
        off = math.inf if math.isnan(off) else off
        if off > largest:
            largest, found = off, (name, old, new, off <= 1.0)
    return found


def _numbers(result: bytes | dict[str, Any], media: str | None) -> Iterator[tuple[str, float]]:
    """Yield every number of a result, with a name."""
    if media == "protobuf" and isinstance(result, bytes):
        output = decode_forward_backward_output(result)
        yield from sorted(output.metrics.items())
        for index, tensors in enumerate(output.loss_fn_outputs):
            for name, tensor in sorted(tensors.items()):
                for position, value in enumerate(tensor.data):
                    yield f"datum {index}, {name}[{position}]", float(value)
        return
    content = json.loads(result) if isinstance(result, bytes) else result
    for name, value in sorted((content.get("metrics") or {}).items()):
        yield name, float(value)
