"""Catalog: the checkpoints of a named run, found by name at any service.

A run of the service ends with its session, but a named run continues in another. So its checkpoints
are found in the account's list of checkpoints by their own names:

    <run name>.<generation>.<serial>.s<step>.e<epoch>.p<position>.<token>
    qwen-sft.0002.000017.s1700.e1.p3400.9f3a61c2

The generation counts resumptions and the serial counts saves, so names sort in the order of the
saves. The token belongs to one process, so two concurrent processes never use the same name. Step,
epoch and position are in the name for services that drop ``user_metadata``.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime

from everstep.client.rest_client import RestClient
from everstep.loops.errors import LoopStateDamaged
from everstep.loops.state import RUN, LoopState, decode
from everstep.wire import types

_PAGE_SIZE = 1000
_MAX_LISTINGS = 5
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", re.ASCII)
_NAME = re.compile(
    r"(?P<run>[^.]+)\.(?P<generation>\d{4,})\.(?P<serial>\d{6,})"
    r"\.s(?P<step>\d{1,18})\.e(?P<epoch>\d{1,18})\.p(?P<position>\d{1,18})\.(?P<token>[0-9a-f]{8})",
    re.ASCII,
)


def check_run_name(name: str) -> str:
    """Return a valid run name unchanged. Raises `ValueError` with the rule otherwise."""
    if not _RUN_NAME.fullmatch(name):
        raise ValueError(
            f"a run name is 1 to 40 letters, digits, '_' and '-', starting with a letter or digit; "
            f"got {name!r}"
        )
    return name


def new_token() -> str:
    """Return a token that no other process has."""
    return uuid.uuid4().hex[:8]


@dataclass(frozen=True, order=True)
class SaveId:
    """Identifies a save of a run. Sorts in the order of the saves.

    Attributes:
        generation: number of earlier resumptions of the run.
        serial: number of earlier saves.
        token: of the process that saved it.
    """

    generation: int
    serial: int
    token: str

    def name(self, run_name: str, state: LoopState) -> str:
        """Return the checkpoint's name."""
        return (
            f"{run_name}.{self.generation:04d}.{self.serial:06d}"
            f".s{state.step}.e{state.epoch}.p{state.position}.{self.token}"
        )


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint of a named run, as the service lists it.

    Attributes:
        path: ``tinker://…``, with optimizer state.
        save_id: of the save.
        state: of the loop, without ``user`` if the service dropped it.
        metrics: at the save.
        time: of the save, on the service's clock.
        expires_at: expiry, if the service lists it. None: never.
        complete: whether the service kept the whole loop state.
        damage: why the loop state can't be used. None: it can.
    """

    path: str
    save_id: SaveId
    state: LoopState
    metrics: dict[str, float] = field(default_factory=dict)
    time: datetime | None = None
    expires_at: datetime | None = None
    complete: bool = True
    damage: str | None = None


def read(checkpoint: types.Checkpoint, run_name: str) -> SavedCheckpoint | None:
    """Return a listed checkpoint if it belongs to a named run."""
    kind, _, name = checkpoint.checkpoint_id.partition("/")
    found = _NAME.fullmatch(name)
    if kind != "weights" or found is None or found["run"] != run_name:
        return None
    metadata = checkpoint.user_metadata or {}
    state = LoopState(int(found["step"]), int(found["epoch"]), int(found["position"]))
    save_id = SaveId(int(found["generation"]), int(found["serial"]), found["token"])
    metrics: dict[str, float] = {}
    damage, complete = None, False
    try:
        if (decoded := decode(metadata)) is not None:
            stored, metrics = decoded
            complete = True
            named = (state.step, state.epoch, state.position)
            if named != (stored.step, stored.epoch, stored.position) or (
                metadata.get(RUN) != run_name
            ):
                damage = "the loop state belongs to another checkpoint"
            state = stored
    except LoopStateDamaged as error:
        damage = str(error)
    return SavedCheckpoint(
        checkpoint.tinker_path,
        save_id,
        state,
        metrics,
        checkpoint.time,
        checkpoint.expires_at,
        complete,
        damage,
    )


async def list_all(rest: RestClient) -> list[types.Checkpoint]:
    """List all checkpoints of the account, page by page.

    A deletion between two requests moves others to a page that was read before. So the list is read
    again if the number of checkpoints changes.
    """
    found: dict[str, types.Checkpoint] = {}
    for _ in range(_MAX_LISTINGS):
        totals: set[int] = set()
        offset = 0
        while True:
            page = await rest.list_user_checkpoints(limit=_PAGE_SIZE, offset=offset)
            found.update((each.tinker_path, each) for each in page.checkpoints)
            offset += len(page.checkpoints)
            if page.cursor is not None:
                totals.add(page.cursor.total_count)
            if not page.checkpoints or page.cursor is None or offset >= page.cursor.total_count:
                break
        if len(totals) <= 1:
            break
    return list(found.values())


async def find(rest: RestClient, run_name: str) -> list[SavedCheckpoint]:
    """Return the checkpoints of a named run, oldest first."""
    return in_order(await list_all(rest), run_name)


def in_order(listed: Iterable[types.Checkpoint], run_name: str) -> list[SavedCheckpoint]:
    """Select the checkpoints of a named run, oldest first."""
    found = [saved for each in listed if (saved := read(each, run_name)) is not None]
    return sorted(found, key=lambda saved: saved.save_id)
