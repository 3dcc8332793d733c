"""Versions: the numbered objects of a bucket that hold the versions of a key.

    <key>/<number>              a version
    <key>/<number>-<nonce>      a copy of a blob, or of a quarantined file

The newest version counts. Odd numbers hold content, even numbers are tombstones.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from obstore import ObjectMeta

_OBJECT = re.compile(r"(.+)/(\d{20})(?:-[0-9a-f]{32})?", re.ASCII | re.DOTALL)


class Version(NamedTuple):
    """A version of a key, as a bucket lists it."""

    number: int
    path: str
    size: int
    modified: datetime

    @property
    def deleted(self) -> bool:
        """Whether it is a tombstone."""
        return self.number % 2 == 0


def version_path(key: str, number: int) -> str:
    """Return the path of a version's object."""
    return f"{key}/{number:020d}"


def next_number(versions: Sequence[Version]) -> int:
    """Return the next odd number."""
    newest = versions[-1].number if versions else 0
    return newest + 1 + newest % 2


def newest_of(versions: Sequence[Version]) -> Version | None:
    """Return the newest version, or None if there is none or it is a tombstone."""
    return versions[-1] if versions and not versions[-1].deleted else None


def versions_by_key(listed: Iterable[ObjectMeta]) -> dict[str, list[Version]]:
    """Group the versions in a listing by key, oldest first."""
    found: dict[str, list[Version]] = defaultdict(list)
    for each in listed:
        match = _OBJECT.fullmatch(each["path"])
        if match is not None:
            version = Version(int(match[2]), each["path"], each["size"], each["last_modified"])
            found[match[1]].append(version)
    return {key: sorted(versions) for key, versions in found.items()}
