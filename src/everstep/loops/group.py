"""CheckpointGroup: several training clients save as one, and are restored as one.

Each member's save is its vote, and is durable by itself. The group exists from the moment at which
the last member's checkpoint exists. The service's list decides, which all processes see. So there
is no coordinator whose failure would leave the others in doubt, and nothing to undo:

    a process dies before its save      its vote is missing: the group never exists
    … during its save                   the save is complete or absent, and so is the group
    … after its save                    the others' saves complete the group without it
    … after the last save               the group exists

The members of an incomplete group are deleted once a later group is complete.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from everstep.backoff import Backoff
from everstep.client._transport.errors import BadRequestError, NotFoundError, RequestFailedError
from everstep.client._transport.futures import APIFuture
from everstep.client.rest_client import RestClient
from everstep.client.service_client import ServiceClient
from everstep.client.training_client import TrainingClient
from everstep.loops.catalog import check_run_name, list_all
from everstep.loops.errors import GroupError
from everstep.loops.events import LoopEvent, OnEvent, emit
from everstep.loops.group_names import (
    MAX_SIZE,
    GroupCheckpoint,
    PartialGroup,
    member_name,
    partial_groups,
    tag_of,
)
from everstep.loops.resume import Skipped, load
from everstep.loops.state import LoopState, encode
from everstep.wire import types

_BACKOFF = Backoff(initial=0.1, max=5.0)
_NOT_LOADABLE = (RequestFailedError, NotFoundError, BadRequestError)


@dataclass(frozen=True)
class RestoredGroup:
    """A complete group that was restored.

    Attributes:
        checkpoint: the group.
        clients: of its members, by index.
        states: of their loops.
        skipped: newer groups that don't load, with the reasons.
    """

    checkpoint: GroupCheckpoint
    clients: tuple[TrainingClient, ...]
    states: tuple[LoopState, ...]
    skipped: tuple[Skipped, ...]


class CheckpointGroup:
    """Saves and restores several training clients as one, in one process or in many.

    Args:
        service: the service that has the runs.
        name: of the group: up to 40 letters, digits, ``_`` and ``-``.
        size: number of members.
        attempt: names this start of the job. It is the same in all processes, and changes with each
            restart, as launchers provide it (``f"{SLURM_JOB_ID}.{SLURM_RESTART_COUNT}"``). Optional
            if all members are in this process.
        keep_last: number of complete groups to keep. None: all.
        wait_seconds: time that a save waits for the other members.
        on_event: called when a group is complete, and for deleted and skipped checkpoints.

    Example:
        >>> group = CheckpointGroup(service, "swarm", size=2, attempt=job_id)
        >>> restored = group.restore_member(index).result()
        >>> group.save(index, client, LoopState(step=100)).result()  # waits for the others
    """

    def __init__(
        self,
        service: ServiceClient,
        name: str,
        size: int,
        attempt: str | None = None,
        *,
        keep_last: int | None = None,
        wait_seconds: float = 600.0,
        on_event: OnEvent | None = None,
    ) -> None:
        if not 1 <= size <= MAX_SIZE:
            raise ValueError(f"a group has 1 to {MAX_SIZE} members; got {size}")
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last has to be 1 or more; got {keep_last}")
        if attempt is not None and not attempt:
            raise ValueError("attempt has to name this start of the job; got an empty string")
        self.name = check_run_name(name)
        self.size = size
        self._service = service
        self._attempt = attempt or uuid.uuid4().hex
        self._parent = ""
        self._keep_last = keep_last
        self._wait_seconds = wait_seconds
        self._on_event = on_event

    def save(
        self, index: int, client: TrainingClient, state: LoopState
    ) -> APIFuture[GroupCheckpoint]:
        """Save one member. All members save at the same step.

        The save gets its sequence id at once, and training may continue. If the process exits
        after this call, the others may still complete the group. If a caller doesn't wait for the
        result, ``keep_last`` may delete the group for a newer one before the caller looks.

        Args:
            index: of the member, from 0.
            client: its run.
            state: of its loop. The members agree on its ``step``.

        Returns:
            The group, once all its members are durable, or a newer group of this attempt that has
            replaced it by then.

        Raises:
            GroupError: the group did not become complete in time. The message names the missing
                members.
            ValueError: the index is out of range, or the state can't be stored.
        """
        self._check_index(index)
        tag = tag_of(self._attempt, self._parent)
        sent = client.save_state(
            member_name(self.name, state.step, tag, index, self.size),
            user_metadata=encode(self.name, state, {}),
        )

        async def work() -> GroupCheckpoint:
            saved = await sent
            checkpoint = await self._wait(state.step, tag, saved.path)
            if index == 0:
                await self._delete_old(checkpoint)
            return checkpoint

        return APIFuture.of(work())

    def save_all(
        self, clients: Sequence[TrainingClient], states: Sequence[LoopState] | LoopState
    ) -> APIFuture[GroupCheckpoint]:
        """Save all members, if they are in one process. See `save`."""
        each = [states] * len(clients) if isinstance(states, LoopState) else list(states)
        if len(clients) != self.size or len(each) != self.size:
            raise ValueError(
                f"group {self.name!r} has {self.size} members; got {len(clients)} clients and "
                f"{len(each)} states"
            )
        if len({state.step for state in each}) != 1:
            raise ValueError("the members of a group have to save at the same step")
        saves = [
            self.save(index, client, state)
            for index, (client, state) in enumerate(zip(clients, each, strict=True))
        ]

        async def work() -> GroupCheckpoint:
            return [await save for save in reversed(saves)][-1]

        return APIFuture.of(work())

    def checkpoints(self) -> APIFuture[list[GroupCheckpoint]]:
        """List the complete groups of this name, oldest first."""

        async def work() -> list[GroupCheckpoint]:
            groups = partial_groups(await list_all(self._rest()), self.name)
            return [checkpoint for each in groups if (checkpoint := each.complete()) is not None]

        return APIFuture.of(work())

    def restore(self) -> APIFuture[RestoredGroup | None]:
        """Restore all members into this process, from the newest complete group that loads.

        Returns:
            The group and its clients. None if there is none.

        Raises:
            GroupError: there are groups, but none of them loads, or the newest has another size.
        """
        return APIFuture.of(self._restore(range(self.size)))

    def restore_member(self, index: int) -> APIFuture[RestoredGroup | None]:
        """Restore one member, if each is in its own process.

        All members of the newest complete group are checked first, so that all processes continue
        from the same group. Otherwise none of their later groups would become complete.

        Returns:
            The group and the one client. None if there is no group.

        Raises:
            GroupError: as `restore`. A member that doesn't load is an error here, since the other
                processes may have loaded theirs: delete its checkpoint, and all fall back.
        """
        self._check_index(index)
        return APIFuture.of(self._restore([index]))

    async def _restore(self, indices: Sequence[int]) -> RestoredGroup | None:
        skipped: list[Skipped] = []
        for checkpoint in reversed(await self.checkpoints()):
            if len(checkpoint.members) != self.size:
                raise GroupError(
                    f"The newest group {checkpoint.id} has {len(checkpoint.members)} members, and "
                    f"{self.size} were requested. Start as many, or use another group name."
                )
            try:
                await self._check_members(checkpoint)
                clients = await self._load(checkpoint, indices)
            except _NOT_LOADABLE as error:
                skipped.append(Skipped(checkpoint.id, str(error)))
                detail = f"{checkpoint.id}: {error}"
                event = LoopEvent("skipped", self.name, None, checkpoint.step, detail)
                emit(self._on_event, event)
                continue
            self._parent = checkpoint.id
            states = tuple(checkpoint.members[index].state for index in indices)
            emit(
                self._on_event,
                LoopEvent("resumed", self.name, None, checkpoint.step, checkpoint.id),
            )
            return RestoredGroup(checkpoint, tuple(clients), states, tuple(skipped))
        if skipped:
            reasons = "\n".join(f"  {each.path}: {each.reason}" for each in skipped)
            raise GroupError(f"None of the groups {self.name!r} can be restored:\n{reasons}")
        return None

    async def _load(
        self, checkpoint: GroupCheckpoint, indices: Sequence[int]
    ) -> list[TrainingClient]:
        try:
            return [await load(self._service, checkpoint.members[index].path) for index in indices]
        except RequestFailedError as error:
            if len(indices) == self.size:
                raise
            raise GroupError(f"Group {checkpoint.id} can't be restored here: {error}") from error

    async def _check_members(self, checkpoint: GroupCheckpoint) -> None:
        for member in checkpoint.members:
            await self._rest().get_weights_info_by_tinker_path(member.path)

    async def _wait(self, step: int, tag: str, own: str) -> GroupCheckpoint:
        """Poll the service's list until the group is complete, or was replaced by a newer one.

        Args:
            step: of the group.
            tag: of this attempt.
            own: path of the checkpoint that was saved here.
        """
        rest = self._rest()
        http = rest.holder.http
        begin, attempt = http.now(), 0
        while True:
            groups = partial_groups(await list_all(rest), self.name)
            ours = [g for g in groups if (g.step, g.tag, g.size) == (step, tag, self.size)]
            if ours and (checkpoint := ours[0].complete()) is not None:
                await self._check_members(checkpoint)
                event = LoopEvent("group_whole", self.name, None, step, checkpoint.id)
                emit(self._on_event, event)
                return checkpoint
            if not any(each.has(own) for each in ours):
                later = [g.complete() for g in groups if (g.tag, g.size) == (tag, self.size)]
                if newer := [each for each in later if each is not None and each.step > step]:
                    return newer[-1]
            if ours and (duplicates := ours[0].duplicates()):
                raise GroupError(
                    f"Group {self.name!r} at step {step} has two members of one index: "
                    f"{', '.join(duplicates)}. It can't become complete: give each process its own "
                    "index, and each start of the job its own attempt."
                )
            if http.now() - begin > self._wait_seconds:
                raise GroupError(self._unfinished(groups, ours, step))
            await http.wait(_BACKOFF.delay(attempt))
            attempt += 1

    def _unfinished(self, groups: list[PartialGroup], ours: list[PartialGroup], step: int) -> str:
        missing = ours[0].missing() if ours else list(range(self.size))
        others = [each for each in groups if each not in ours and each.step == step]
        text = (
            f"Group {self.name!r} at step {step} is not complete after {self._wait_seconds:g} s: "
            f"of {self.size} members {', '.join(map(str, missing))} did not save."
        )
        if others:
            text += (
                " Others saved at that step in another attempt, from another group, or with "
                "another size: attempt and size have to be the same in all processes."
            )
        return text

    async def _delete_old(self, newest: GroupCheckpoint) -> None:
        """Delete older groups beyond ``keep_last``, and the members of incomplete ones."""
        if self._keep_last is None:
            return
        rest = self._rest()
        older = [
            each
            for each in partial_groups(await list_all(rest), self.name)
            if each.time < newest.time and (each.step, each.tag) != (newest.step, newest.tag)
        ]
        complete = [each for each in older if each.complete() is not None]
        kept = complete[len(complete) - (self._keep_last - 1) :] if self._keep_last > 1 else []
        for generation in older:
            if generation in kept:
                continue
            for each in [saved for found in generation.found.values() for saved in found]:
                await self._delete(rest, each)

    async def _delete(self, rest: RestClient, checkpoint: types.Checkpoint) -> None:
        try:
            await rest.delete_checkpoint_from_tinker_path(checkpoint.tinker_path)
        except NotFoundError:
            return
        emit(self._on_event, LoopEvent("deleted", self.name, checkpoint.tinker_path))

    def _rest(self) -> RestClient:
        return self._service.create_rest_client()

    def _check_index(self, index: int) -> None:
        if not 0 <= index < self.size:
            raise ValueError(f"group {self.name!r} has members 0 to {self.size - 1}; got {index}")
