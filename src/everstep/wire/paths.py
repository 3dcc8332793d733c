"""Checkpoint paths ``tinker://<run>/<segment>/<name>``, parsed strictly.

A name is one segment of letters, digits and ``. _ - + =``, at most 128 characters, not starting
with a dot. A run id may also contain ``:``. Everything else is rejected here, so that it never
reaches a file-system path or a key of an object store.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from everstep.wire.errors import InvalidName, InvalidPath

SCHEME = "tinker://"
_NAME = re.compile(r"[A-Za-z0-9_+=-][A-Za-z0-9._+=-]{0,127}", re.ASCII)
_RUN_ID = re.compile(r"[A-Za-z0-9_+=-][A-Za-z0-9._+=:-]{0,127}", re.ASCII)
_RULE = (
    "one path segment of letters, digits, '.', '_', '-', '+' and '=', at most 128 characters, "
    "not starting with a dot"
)


class CheckpointKind(StrEnum):
    """The purpose of a checkpoint."""

    TRAINING = "training"
    SAMPLER = "sampler"
    EXTERNAL = "external"

    @property
    def segment(self) -> str:
        """The path segment of this kind."""
        return _SEGMENTS[self]

    @classmethod
    def from_segment(cls, segment: str) -> CheckpointKind:
        """Return the kind of a path segment, or raise `InvalidPath` for any other text."""
        for kind, own in _SEGMENTS.items():
            if own == segment:
                return kind
        raise InvalidPath(
            f"{segment!r} is not a kind of checkpoint; use one of {', '.join(_SEGMENTS.values())}."
        )


_SEGMENTS = {
    CheckpointKind.TRAINING: "weights",
    CheckpointKind.SAMPLER: "sampler_weights",
    CheckpointKind.EXTERNAL: "external_weights",
}


@dataclass(frozen=True)
class TinkerPath:
    """The path of a checkpoint."""

    run_id: str
    kind: CheckpointKind
    name: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.run_id}/{self.checkpoint_id}"

    @property
    def checkpoint_id(self) -> str:
        """``<segment>/<name>``, unique in the run."""
        return f"{self.kind.segment}/{self.name}"


def validate_name(name: str) -> str:
    """Return a checkpoint name unchanged, or raise `InvalidName` with the rule."""
    if not _NAME.fullmatch(name):
        raise InvalidName(f"Invalid checkpoint name {name[:200]!r}: a name is {_RULE}.")
    return name


def validate_run_id(run_id: str) -> str:
    """Return a run id unchanged, or raise `InvalidName` with the rule."""
    if not _RUN_ID.fullmatch(run_id):
        raise InvalidName(f"Invalid run id {run_id[:200]!r}: a run id is {_RULE}; ':' is allowed.")
    return run_id


def parse_path(text: str) -> TinkerPath:
    """Parse ``tinker://<run>/<segment>/<name>``.

    Raises:
        InvalidPath: the text has another form.
    """
    shape = f"{SCHEME}<run>/<weights|sampler_weights|external_weights>/<name>"
    if not text.startswith(SCHEME):
        raise InvalidPath(f"Invalid tinker path {text[:300]!r}: it has to be {shape}.")
    parts = text.removeprefix(SCHEME).split("/")
    if len(parts) != 3:
        raise InvalidPath(f"Invalid tinker path {text[:300]!r}: it has to be {shape}.")
    run_id, segment, name = parts
    try:
        kind = CheckpointKind.from_segment(segment)
        return TinkerPath(validate_run_id(run_id), kind, validate_name(name))
    except (InvalidName, InvalidPath) as error:
        raise InvalidPath(f"Invalid tinker path {text[:300]!r}: {error}") from error
