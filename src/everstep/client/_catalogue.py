"""The checkpoints of a named run: their names, and how they are found at any service.

A run of the service ends with its session; a named run goes on in another. So its checkpoints are
found by their own names, in the account's list of checkpoints:

    <run name>.<generation>.<serial>.s<step>.e<epoch>.p<position>.<token>
    qwen-sft.0002.000017.s1700.e1.p3400.9f3a61c2

The generation counts resumptions, the serial counts saves: names sort as the saves were made. The
token is of one process, so that two at once never take the same name. Step, epoch and position
stand there as well so that a service that drops ``user_metadata`` keeps at least those.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime

from everstep.client.loop_errors import LoopStateDamaged
from everstep.client.loop_state import RUN, LoopState, decode
from everstep.client.rest_client import RestClient
from everstep.wire import types

_PAGE = 1000
_LISTINGS = 5
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", re.ASCII)
_NAME = re.compile(
    r"(?P<run>[^.]+)\.(?P<generation>\d{4,})\.(?P<serial>\d{6,})"
    r"\.s(?P<step>\d{1,18})\.e(?P<epoch>\d{1,18})\.p(?P<position>\d{1,18})\.(?P<token>[0-9a-f]{8})",
    re.ASCII,
)


def check_run_name(name: str) -> str:
    """Return a run's name as it is; raises `ValueError`, which says the rule."""
    if not _RUN_NAME.fullmatch(name):
        raise ValueError(
            f"a run name is 1 to 40 letters, digits, '_' and '-', not beginning with '_' or '-'; "
            f"got {name!r}"
        )
    return name


def new_token() -> str:
    """A token that no other process has."""
    return uuid.uuid4().hex[:8]


@dataclass(frozen=True, order=True)
class Place:
    """A checkpoint's place among those of its run; sorts as the saves were made.

    Attributes:
        generation: how often the run was resumed before.
        serial: how many saves came before.
        token: of the process that saved it.
    """

    generation: int
    serial: int
    token: str

    def name(self, run_name: str, state: LoopState) -> str:
        """The checkpoint's name."""
        return (
            f"{run_name}.{self.generation:04d}.{self.serial:06d}"
            f".s{state.step}.e{state.epoch}.p{state.position}.{self.token}"
        )


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint of a named run, as the service lists it.

    Attributes:
        path: ``tinker://…``, with optimizer state.
        place: among the run's checkpoints.
        state: of the loop; without ``user`` where the service dropped it.
        metrics: at the save.
        time: of the save, on the service's clock.
        expires_at: when it expires, as far as the service tells; None: never.
        complete: whether the service kept the whole loop state.
        damage: why the loop state can't be used; None: it can.
    """

    path: str
    place: Place
    state: LoopState
    metrics: dict[str, float] = field(default_factory=dict)
    time: datetime | None = None
    expires_at: datetime | None = None
    complete: bool = True
    damage: str | None = None


def read(checkpoint: types.Checkpoint, run_name: str) -> SavedCheckpoint | None:
    """A listed checkpoint, if it is one of a named run."""
    kind, _, name = checkpoint.checkpoint_id.partition("/")
    found = _NAME.fullmatch(name)
    if kind != "weights" or found is None or found["run"] != run_name:
        return None
    metadata = checkpoint.user_metadata or {}
    state = LoopState(int(found["step"]), int(found["epoch"]), int(found["position"]))
    place = Place(int(found["generation"]), int(found["serial"]), found["token"])
    metrics: dict[str, float] = {}
    damage, complete = None, False
    try:
        if (told := decode(metadata)) is not None:
            told_state, metrics = told
            complete = True
            if (state.step, state.epoch, state.position) != (
                told_state.step,
                told_state.epoch,
                told_state.position,
            ) or metadata.get(RUN) != run_name:
                damage = "the loop state belongs to another checkpoint"
            state = told_state
    except LoopStateDamaged as error:
        damage = str(error)
    return SavedCheckpoint(
        checkpoint.tinker_path,
        place,
        state,
        metrics,
        checkpoint.time,
        checkpoint.expires_at,
        complete,
        damage,
    )


async def list_all(rest: RestClient) -> list[types.Checkpoint]:
    """All checkpoints of the account, through the pages.

    What is deleted meanwhile moves others to a page that was read already; so where the number of
    checkpoints changes, they are listed again.
    """
    found: dict[str, types.Checkpoint] = {}
    for _ in range(_LISTINGS):
        totals: set[int] = set()
        offset = 0
        while True:
            page = await rest.list_user_checkpoints(limit=_PAGE, offset=offset)
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
    """The checkpoints of a named run, oldest first."""
    return in_order(await list_all(rest), run_name)


def in_order(listed: Iterable[types.Checkpoint], run_name: str) -> list[SavedCheckpoint]:
    """Those of a named run, oldest first."""
    found = [saved for each in listed if (saved := read(each, run_name)) is not None]
    return sorted(found, key=lambda saved: saved.place)
