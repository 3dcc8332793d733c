"""LoopState: the position of a training loop, stored with the checkpoint as ``user_metadata``.

    everstep_run      the run's name
    everstep_loop     "<version> <sha256 of the JSON> <number of parts>"
    everstep_loop_0…  its JSON in parts of 1,000 characters: step, epoch, position, user, metrics
    <metric>          each metric once more, as text, for people and for retention by the service

It is sent in the same request as the weights: neither exists without the other.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from everstep.loops.errors import LoopStateDamaged

RUN = "everstep_run"
LOOP = "everstep_loop"
VERSION = 1
_PART_LENGTH = 1000
_MAX_LENGTH = 64_000
_MAX_VALUE = 10**18


@dataclass(frozen=True)
class LoopState:
    """The position of a training loop, from which it can continue.

    Attributes:
        step: optimizer steps made so far.
        epoch: the epoch of the next example.
        position: of the next example in its epoch.
        user: other state that the loop needs, as JSON: a shuffle seed, a generator's state, ….
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    user: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("step", "epoch", "position"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _MAX_VALUE:
                raise ValueError(
                    f"LoopState.{name} has to be a non-negative integer below 10**18; got {value!r}"
                )


Metrics = Mapping[str, float]


def encode(run_name: str, state: LoopState, metrics: Metrics) -> dict[str, str]:
    """Encode a loop state and its metrics as a checkpoint's ``user_metadata``.

    Raises:
        ValueError: the user dictionary isn't JSON, or is longer than 64,000 characters, or a metric
            has one of the names above or isn't a number.
    """
    for name, value in metrics.items():
        if name.startswith("everstep_") or not isinstance(value, int | float):
            raise ValueError(
                f"a metric is a number, with a name not starting with everstep_; "
                f"got {name}={value!r}"
            )
    content = {
        "step": state.step,
        "epoch": state.epoch,
        "position": state.position,
        "user": dict(state.user),
        "metrics": {name: repr(float(value)) for name, value in metrics.items()},
    }
    text = _json(content)
    if json.loads(text)["user"] != dict(state.user):
        raise ValueError("LoopState.user changes in a JSON round trip: use text keys and lists")
    if len(text) > _MAX_LENGTH:
        raise ValueError(
            f"the loop state has {len(text):,} characters; at most {_MAX_LENGTH:,} are allowed. "
            "Store large data elsewhere, and its location in LoopState.user."
        )
    parts = [text[begin : begin + _PART_LENGTH] for begin in range(0, len(text), _PART_LENGTH)]
    return {
        **{name: repr(float(value)) for name, value in metrics.items()},
        RUN: run_name,
        LOOP: f"{VERSION} {_checksum(text)} {len(parts)}",
        **{f"{LOOP}_{index}": part for index, part in enumerate(parts)},
    }


def fingerprint(state: LoopState) -> str:
    """Return a checksum of a loop state's current content. Its dictionary may change later."""
    return encode("", state, {})[LOOP]


def decode(metadata: Mapping[str, str] | None) -> tuple[LoopState, dict[str, float]] | None:
    """Decode the result of `encode`. None if there is no loop state.

    Raises:
        LoopStateDamaged: the loop state is incomplete or was changed.
    """
    if not metadata or LOOP not in metadata:
        return None
    try:
        version, checksum, count = metadata[LOOP].split(" ")
        if int(version) != VERSION:
            raise LoopStateDamaged(
                f"the loop state has version {version}; this everstep reads version {VERSION}"
            )
        text = "".join(metadata[f"{LOOP}_{index}"] for index in range(int(count)))
        if _checksum(text) != checksum:
            raise LoopStateDamaged("the loop state's checksum does not match: it was changed")
        content = json.loads(text)
        metrics = {name: float(value) for name, value in content.pop("metrics").items()}
        return LoopState(**content), metrics
    except (KeyError, TypeError, ValueError) as error:
        raise LoopStateDamaged(f"the loop state can't be read: {error!r}") from error


def is_number(value: float | None) -> bool:
    """Return whether a metric can be compared: it exists and is finite."""
    return value is not None and math.isfinite(value)


def _json(content: Any) -> str:
    try:
        return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"LoopState.user has to be JSON: {error}") from error


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
