"""CheckpointGroup: several training clients save as one, and are restored as one.

Each member's save is its vote, and is durable by itself. The group is there from the moment at
which the last member's checkpoint is: what all processes see in the service's list decides, not one
of them. So there is no coordinator whose end would leave the others in doubt, and nothing to undo:

    a process ends before its save      its vote is missing: the group never comes to be
    … in its save                       the save is whole or absent, and the group with it
    … after its save                    the others' saves complete the group without it
    … after the last save               the group is there

What is left of a group that never came to be is deleted once a later one is whole.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from everstep.client._catalogue import check_run_name, list_all
from everstep.client._errors import BadRequestError, NotFoundError, RequestFailedError
from everstep.client._futures import APIFuture
from everstep.client._group_names import (
    LARGEST,
    Generation,
    GroupCheckpoint,
    generations,
    member_name,
    tag_of,
)
from everstep.client.loop_errors import GroupError
from everstep.client.loop_events import LoopEvent, OnEvent, tell_event
from everstep.client.loop_state import LoopState, encode
from everstep.client.rest_client import RestClient
from everstep.client.resume import Skipped, load
from everstep.client.service_client import ServiceClient
from everstep.client.training_client import TrainingClient
from everstep.wire import types

_LONGEST_DELAY = 5.0
_NOT_LOADABLE = (RequestFailedError, NotFoundError, BadRequestError)


@dataclass(frozen=True)
class RestoredGroup:
    """A group that was restored as a whole.

    Attributes:
        checkpoint: the group.
        clients: of its members, by index.
        states: of their loops.
        skipped: newer groups that don't load, and why.
    """

    checkpoint: GroupCheckpoint
    clients: tuple[TrainingClient, ...]
    states: tuple[LoopState, ...]
    skipped: tuple[Skipped, ...]


class CheckpointGroup:
    """Saves and restores several training clients as one, in one process or in many.

    Args:
        service: where the runs are.
        name: of the group: up to 40 letters, digits, ``_`` and ``-``.
        size: how many members it has.
        attempt: names this start of the job: the same in all its processes, another after each
            restart, as launchers give one (``f"{SLURM_JOB_ID}.{SLURM_RESTART_COUNT}"``). May be
            left out where all members are in this process.
        keep_last: keep so many whole groups; None: all.
        wait_seconds: how long a save waits for the other members.
        on_event: told when a group is whole, and what is deleted or skipped.

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
        if not 1 <= size <= LARGEST:
            raise ValueError(f"a group has 1 to {LARGEST} members; got {size}")
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last has to be 1 or more; got {keep_last}")
        if attempt is not None and not attempt:
            raise ValueError("attempt has to name this start of the job; got an empty text")
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
        """Save one member; all members save at the same step.

        The save takes its place at once, and training may go on. Nothing is decided by one member:
        when its process ends after this call, the others may still complete the group. Who doesn't
        wait for the result may find that ``keep_last`` has deleted the group for a newer one.

        Args:
            index: of the member, from 0.
            client: its run.
            state: of its loop; ``step`` is what the members agree on.

        Returns:
            The group, once all its members are durable; the newer one that replaced it, if this
            attempt's next is whole by then.

        Raises:
            GroupError: it did not become whole in time; the text says what is missing.
            ValueError: the index is none of the group's, or the state can't be kept.
        """
        self._check_index(index)
        tag = tag_of(self._attempt, self._parent)
        sent = client.save_state(
            member_name(self.name, state.step, tag, index, self.size),
            user_metadata=encode(self.name, state, {}),
        )

        async def work() -> GroupCheckpoint:
            saved = await sent
            whole = await self._wait(state.step, tag, saved.path)
            if index == 0:
                await self._delete_old(whole)
            return whole

        return APIFuture.of(work())

    def save_all(
        self, clients: Sequence[TrainingClient], states: Sequence[LoopState] | LoopState
    ) -> APIFuture[GroupCheckpoint]:
        """Save all members, where they are in one process; see `save`."""
        each = [states] * len(clients) if isinstance(states, LoopState) else list(states)
        if len(clients) != self.size or len(each) != self.size:
            raise ValueError(
                f"group {self.name!r} has {self.size} members; got {len(clients)} clients and "
                f"{len(each)} states"
            )
        if len({state.step for state in each}) != 1:
            raise ValueError("the members of a group save at the same step")
        saves = [
            self.save(index, client, state)
            for index, (client, state) in enumerate(zip(clients, each, strict=True))
        ]

        async def work() -> GroupCheckpoint:
            return [await save for save in reversed(saves)][-1]

        return APIFuture.of(work())

    def checkpoints(self) -> APIFuture[list[GroupCheckpoint]]:
        """The groups of this name that are whole, the oldest first."""

        async def work() -> list[GroupCheckpoint]:
            begun = generations(await list_all(self._rest()), self.name)
            return [whole for each in begun if (whole := each.whole()) is not None]

        return APIFuture.of(work())

    def restore(self) -> APIFuture[RestoredGroup | None]:
        """Restore all members into this process, from the newest group that loads as a whole.

        Returns:
            The group and its clients; None when there is none.

        Raises:
            GroupError: there are groups, and none of them loads; or the newest has another size.
        """
        return APIFuture.of(self._restore(range(self.size)))

    def restore_member(self, index: int) -> APIFuture[RestoredGroup | None]:
        """Restore one member, where each is in a process of its own.

        All members of the newest whole group are looked at first, so that all processes go on from
        the same group; if they didn't, none of their later groups would become whole.

        Returns:
            The group and the one client; None when there is no group.

        Raises:
            GroupError: as `restore`. A member that doesn't load is an error here, since the other
                processes may have loaded theirs: delete its checkpoint, and all fall back.
        """
        self._check_index(index)
        return APIFuture.of(self._restore([index]))

    async def _restore(self, indices: Sequence[int]) -> RestoredGroup | None:
        skipped: list[Skipped] = []
        for whole in reversed(await self.checkpoints()):
            if len(whole.members) != self.size:
                raise GroupError(
                    f"The newest group {whole.id} has {len(whole.members)} members, and "
                    f"{self.size} are asked for. Start as many, or use another group name."
                )
            try:
                await self._look_at(whole)
                clients = await self._load(whole, indices)
            except _NOT_LOADABLE as error:
                skipped.append(Skipped(whole.id, str(error)))
                detail = f"{whole.id}: {error}"
                event = LoopEvent("skipped", self.name, None, whole.step, detail)
                tell_event(self._on_event, event)
                continue
            self._parent = whole.id
            states = tuple(whole.members[index].state for index in indices)
            tell_event(self._on_event, LoopEvent("resumed", self.name, None, whole.step, whole.id))
            return RestoredGroup(whole, tuple(clients), states, tuple(skipped))
        if skipped:
            told = "\n".join(f"  {each.path}: {each.reason}" for each in skipped)
            raise GroupError(f"None of the groups {self.name!r} can be restored:\n{told}")
        return None

    async def _load(self, whole: GroupCheckpoint, indices: Sequence[int]) -> list[TrainingClient]:
        try:
            return [await load(self._service, whole.members[index].path) for index in indices]
        except RequestFailedError as error:
            if len(indices) == self.size:
                raise
            raise GroupError(f"Group {whole.id} can't be restored here: {error}") from error

    async def _look_at(self, whole: GroupCheckpoint) -> None:
        for member in whole.members:
            await self._rest().get_weights_info_by_tinker_path(member.path)

    async def _wait(self, step: int, tag: str, own: str) -> GroupCheckpoint:
        """Look at the service's list until the group is whole, or was and is replaced.

        Args:
            step: of the group.
            tag: of this attempt.
            own: the path of what was saved here.
        """
        rest = self._rest()
        http = rest.holder.http
        begin, delay = http.now(), 0.1
        while True:
            begun = generations(await list_all(rest), self.name)
            ours = [g for g in begun if (g.step, g.tag, g.size) == (step, tag, self.size)]
            if ours and (whole := ours[0].whole()) is not None:
                await self._look_at(whole)
                event = LoopEvent("group_whole", self.name, None, step, whole.id)
                tell_event(self._on_event, event)
                return whole
            if not any(each.has(own) for each in ours):
                later = [g.whole() for g in begun if (g.tag, g.size) == (tag, self.size)]
                if newer := [each for each in later if each is not None and each.step > step]:
                    return newer[-1]
            if ours and (doubled := ours[0].doubled()):
                raise GroupError(
                    f"Group {self.name!r} at step {step} has two members of one index: "
                    f"{', '.join(doubled)}. It will not be whole; give each process its own index, "
                    "and each start of the job its own attempt."
                )
            if http.now() - begin > self._wait_seconds:
                raise GroupError(self._unfinished(begun, ours, step))
            await http.wait(delay)
            delay = min(2 * delay, _LONGEST_DELAY)

    def _unfinished(self, begun: list[Generation], ours: list[Generation], step: int) -> str:
        missing = ours[0].missing() if ours else list(range(self.size))
        others = [each for each in begun if each not in ours and each.step == step]
        text = (
            f"Group {self.name!r} at step {step} is not whole after {self._wait_seconds:g} s: of "
            f"{self.size} members {', '.join(map(str, missing))} did not save."
        )
        if others:
            text += (
                " Others saved at that step in another attempt, from another group, or with "
                "another size: attempt and size have to be the same in all processes."
            )
        return text

    async def _delete_old(self, newest: GroupCheckpoint) -> None:
        """Delete older groups beyond ``keep_last``, and what is left of unfinished ones."""
        if self._keep_last is None:
            return
        rest = self._rest()
        older = [
            each
            for each in generations(await list_all(rest), self.name)
            if each.time < newest.time and (each.step, each.tag) != (newest.step, newest.tag)
        ]
        whole = [each for each in older if each.whole() is not None]
        kept = whole[len(whole) - (self._keep_last - 1) :] if self._keep_last > 1 else []
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
        tell_event(self._on_event, LoopEvent("deleted", self.name, checkpoint.tinker_path))

    def _rest(self) -> RestClient:
        return self._service.create_rest_client()

    def _check_index(self, index: int) -> None:
        if not 0 <= index < self.size:
            raise ValueError(f"group {self.name!r} has members 0 to {self.size - 1}; got {index}")
