"""The names by which checkpoints belong to a group, and which groups are whole.

    <group>.<step>.<tag>.<index>of<size>
    swarm.000000000100.1f0c9a63be52.002of004

A name comes into being with its checkpoint, in one request: so there is no moment at which a
member is saved and its group isn't known, and a service that drops ``user_metadata`` does no harm.
The tag is made of the attempt and of the group that the attempt began from: members of another
start of the job, or of one that began from other checkpoints, never fill a gap.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from everstep.client.loop_errors import LoopStateDamaged
from everstep.client.loop_state import LoopState, decode
from everstep.wire import types

LARGEST = 999
_NAME = re.compile(
    r"(?P<group>[^.]+)\.(?P<step>\d{12,18})\.(?P<tag>[0-9a-f]{12})"
    r"\.(?P<index>\d{3})of(?P<size>\d{3})",
    re.ASCII,
)


@dataclass(frozen=True)
class Member:
    """One training client's checkpoint in a group.

    Attributes:
        path: of the checkpoint, with optimizer state.
        state: of its loop.
    """

    path: str
    state: LoopState


@dataclass(frozen=True, order=True)
class _Key:
    step: int
    tag: str
    size: int


@dataclass(frozen=True)
class GroupCheckpoint:
    """A whole group: every member is there, exactly once.

    Attributes:
        name: of the group.
        step: at which it was saved.
        tag: of the attempt that saved it.
        members: by their index.
        time: of its first member, on the service's clock.
    """

    name: str
    step: int
    tag: str
    members: tuple[Member, ...]
    time: datetime

    @property
    def id(self) -> str:
        """Names this group and no other."""
        return f"{self.name}.{self.step}.{self.tag}.{len(self.members)}"


@dataclass(frozen=True)
class Generation:
    """What there is of a group that was begun, whole or not.

    Attributes:
        step: at which it was saved.
        tag: of the attempt that saved it.
        size: how many members it is to have.
        found: checkpoints by index; several where two processes were given one index.
    """

    name: str
    step: int
    tag: str
    size: int
    found: dict[int, list[types.Checkpoint]]

    @property
    def time(self) -> datetime:
        """Of its first member: one that is completed late is no newer for that."""
        return min(each.time for saved in self.found.values() for each in saved)

    def has(self, path: str) -> bool:
        """Whether a checkpoint is one of its members."""
        return any(each.tinker_path == path for saved in self.found.values() for each in saved)

    def missing(self) -> list[int]:
        """The indices that nothing was saved for."""
        return [index for index in range(self.size) if not self.found.get(index)]

    def doubled(self) -> list[str]:
        """The paths of members of which there are several."""
        several = [saved for saved in self.found.values() if len(saved) > 1]
        return [each.tinker_path for saved in several for each in saved]

    def whole(self) -> GroupCheckpoint | None:
        """The group, if every member is there exactly once and its loop state can be read."""
        if self.missing() or self.doubled() or set(self.found) != set(range(self.size)):
            return None
        try:
            members = tuple(_member(self.found[index][0], self.step) for index in range(self.size))
        except LoopStateDamaged:
            return None
        return GroupCheckpoint(self.name, self.step, self.tag, members, self.time)


def tag_of(attempt: str, parent: str) -> str:
    """The tag of an attempt that began from a group."""
    return hashlib.sha256(f"{attempt}\n{parent}".encode()).hexdigest()[:12]


def member_name(group: str, step: int, tag: str, index: int, size: int) -> str:
    """The name of a member's checkpoint."""
    return f"{group}.{step:012d}.{tag}.{index:03d}of{size:03d}"


def generations(listed: Iterable[types.Checkpoint], group: str) -> list[Generation]:
    """What there is of a group, the oldest first."""
    found: dict[_Key, dict[int, list[types.Checkpoint]]] = defaultdict(lambda: defaultdict(list))
    for each in listed:
        kind, _, name = each.checkpoint_id.partition("/")
        match = _NAME.fullmatch(name)
        if kind == "weights" and match is not None and match["group"] == group:
            key = _Key(int(match["step"]), match["tag"], int(match["size"]))
            found[key][int(match["index"])].append(each)
    begun = [
        Generation(group, key.step, key.tag, key.size, dict(members))
        for key, members in found.items()
    ]
    return sorted(begun, key=lambda each: (each.time, each.step, each.tag))


def _member(checkpoint: types.Checkpoint, step: int) -> Member:
    told = decode(checkpoint.user_metadata)
    state = told[0] if told is not None else LoopState(step)
    return Member(checkpoint.tinker_path, state)
