"""Group names: which checkpoints belong to a group, and which groups are complete.

    <group>.<step>.<tag>.<index>of<size>
    swarm.000000000100.1f0c9a63be52.002of004

A name and its checkpoint come into existence in one request. So no member is ever saved without its
group being known, and services that drop ``user_metadata`` do no harm. The tag is a checksum of the
attempt and of the group that the attempt started from. So members of another start of the job, or
of one that started from other checkpoints, never fill a gap.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from everstep.loops.errors import LoopStateDamaged
from everstep.loops.state import LoopState, decode
from everstep.wire import types

MAX_SIZE = 999
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
    """A complete group: every member exists exactly once.

    Attributes:
        name: of the group.
        step: at which it was saved.
        tag: of the attempt that saved it.
        members: by index.
        time: of its first member, on the service's clock.
    """

    name: str
    step: int
    tag: str
    members: tuple[Member, ...]
    time: datetime

    @property
    def id(self) -> str:
        """Identifies this group and no other."""
        return f"{self.name}.{self.step}.{self.tag}.{len(self.members)}"


@dataclass(frozen=True)
class PartialGroup:
    """The members of a group that exist so far.

    Attributes:
        name: of the group.
        step: at which it was saved.
        tag: of the attempt that saved it.
        size: its number of members once complete.
        found: checkpoints by index. Several if two processes used one index.
    """

    name: str
    step: int
    tag: str
    size: int
    found: dict[int, list[types.Checkpoint]]

    @property
    def time(self) -> datetime:
        """Time of its first member: a group that is completed late is not newer for that."""
        return min(each.time for saved in self.found.values() for each in saved)

    def has(self, path: str) -> bool:
        """Return whether a checkpoint is one of its members."""
        return any(each.tinker_path == path for saved in self.found.values() for each in saved)

    def missing(self) -> list[int]:
        """Return the indices without a checkpoint."""
        return [index for index in range(self.size) if not self.found.get(index)]

    def duplicates(self) -> list[str]:
        """Return the paths of members whose index was used more than once."""
        duplicated = [saved for saved in self.found.values() if len(saved) > 1]
        return [each.tinker_path for saved in duplicated for each in saved]

    def complete(self) -> GroupCheckpoint | None:
        """Return the group if every member exists exactly once and its loop state can be read."""
        if self.missing() or self.duplicates() or set(self.found) != set(range(self.size)):
            return None
        try:
            members = tuple(_member(self.found[index][0], self.step) for index in range(self.size))
        except LoopStateDamaged:
            return None
        return GroupCheckpoint(self.name, self.step, self.tag, members, self.time)


def tag_of(attempt: str, parent: str) -> str:
    """Return the tag of an attempt that started from a group."""
    return hashlib.sha256(f"{attempt}\n{parent}".encode()).hexdigest()[:12]


def member_name(group: str, step: int, tag: str, index: int, size: int) -> str:
    """Return the name of a member's checkpoint."""
    return f"{group}.{step:012d}.{tag}.{index:03d}of{size:03d}"


def partial_groups(listed: Iterable[types.Checkpoint], group: str) -> list[PartialGroup]:
    """Return the groups of a name, complete or not, oldest first."""
    found: dict[_Key, dict[int, list[types.Checkpoint]]] = defaultdict(lambda: defaultdict(list))
    for each in listed:
        kind, _, name = each.checkpoint_id.partition("/")
        match = _NAME.fullmatch(name)
        if kind == "weights" and match is not None and match["group"] == group:
            key = _Key(int(match["step"]), match["tag"], int(match["size"]))
            found[key][int(match["index"])].append(each)
    partial = [
        PartialGroup(group, key.step, key.tag, key.size, dict(members))
        for key, members in found.items()
    ]
    return sorted(partial, key=lambda each: (each.time, each.step, each.tag))


def _member(checkpoint: types.Checkpoint, step: int) -> Member:
    decoded = decode(checkpoint.user_metadata)
    state = decoded[0] if decoded is not None else LoopState(step)
    return Member(checkpoint.tinker_path, state)
