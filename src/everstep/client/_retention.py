"""What a checkpointer does after a save: confirm it, look for another process, delete, renew."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from time import monotonic

from everstep.client import _catalogue
from everstep.client._catalogue import SavedCheckpoint
from everstep.client._errors import APIStatusError, NotFoundError
from everstep.client.checkpoint_policy import CheckpointPolicy
from everstep.client.loop_errors import CheckpointNotConfirmed, Superseded
from everstep.client.rest_client import RestClient
from everstep.client.resume import ResumeReport

_log = logging.getLogger("everstep.client")
_CONFIRM_DELAYS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""A list may lag behind what was acknowledged, at services that are many machines."""
_NOT_THERE = (404, 405, 501)


async def confirm(
    rest: RestClient, path: str, run_name: str
) -> tuple[SavedCheckpoint, list[SavedCheckpoint]]:
    """Make sure that an acknowledged checkpoint is there, as far as the protocol can say.

    Returns:
        It as the service lists it, and all of the run.

    Raises:
        CheckpointNotConfirmed: it isn't listed, its loop state is damaged, or the service can't
            say what it was trained with.
    """
    for delay in _CONFIRM_DELAYS:
        if delay:
            await rest.holder.http.wait(delay)
        listed = await _catalogue.find(rest, run_name)
        saved = next((each for each in listed if each.path == path), None)
        if saved is not None:
            break
    else:
        raise CheckpointNotConfirmed(
            f"{path} was acknowledged, but the service does not list it. Nothing was deleted."
        )
    if saved.damage is not None:
        raise CheckpointNotConfirmed(f"{path} was saved, but {saved.damage}. Nothing was deleted.")
    try:
        await rest.get_weights_info_by_tinker_path(path)
    except APIStatusError as error:
        raise CheckpointNotConfirmed(
            f"{path} is listed, but the service can't read it: {error}. Nothing was deleted."
        ) from error
    return saved, listed


class Retention:
    """Which of a run's checkpoints go, and when those that stay would expire.

    Args:
        report: what the run was resumed from.
        token: of this process.
        policy: what to keep.

    Attributes:
        order: held by what is done after a save, so that one comes after the other.
    """

    def __init__(self, report: ResumeReport, token: str, policy: CheckpointPolicy) -> None:
        self._run_name = report.run_name
        self._mine = (report.generation, token)
        self._known = {each.path for each in report.known}
        self._skipped = {each.path for each in report.skipped}
        self._policy = policy
        self._kept = policy.kept(self._ours(report.known))
        self._renewed_at = float("-inf") if self._kept else monotonic()
        self._expires = policy.ttl_seconds is not None
        self.order = asyncio.Lock()

    def check_alone(self, listed: Sequence[SavedCheckpoint]) -> None:
        """See whether another process saves under the same run name.

        The one that resumed later goes on; among two that resumed at once, the one whose token
        sorts last. So exactly one goes on.

        Raises:
            Superseded: that is another one.
        """
        newest = max(
            ((each.place.generation, each.place.token) for each in listed if self._is_new(each)),
            default=self._mine,
        )
        if newest > self._mine:
            raise Superseded(
                f"Another process has taken over run {self._run_name!r} (generation {newest[0]}, "
                f"{newest[1]}). This one is to stop; its checkpoints are left as they are."
            )

    async def delete_old(
        self, rest: RestClient, listed: Sequence[SavedCheckpoint]
    ) -> AsyncIterator[str]:
        """Delete what the policy doesn't keep, oldest first; the newest is known to be whole.

        Those of another process and those that could not be loaded are left alone.

        Yields:
            The path of each that was deleted.
        """
        ours = self._ours(listed)
        self._kept = self._policy.kept(ours)
        stay = {each.path for each in self._kept}
        for each in ours:
            if each.path in stay:
                continue
            try:
                await rest.delete_checkpoint_from_tinker_path(each.path)
            except NotFoundError:
                continue  # it has expired, or someone else deleted it
            yield each.path

    def renewal_due(self) -> bool:
        """Whether it is time to say that the run goes on."""
        ttl = self._policy.ttl_seconds
        return self._expires and ttl is not None and monotonic() - self._renewed_at > ttl / 4

    async def renew(self, rest: RestClient) -> None:
        """Have those that are kept live on; each has its full time to live from now."""
        if self.renewal_due():
            self._renewed_at = monotonic()
            await self._set_ttl(rest, self._policy.ttl_seconds)

    async def keep_for_good(self, rest: RestClient) -> None:
        """Have those that are kept expire no more."""
        await self._set_ttl(rest, None)

    async def _set_ttl(self, rest: RestClient, ttl: int | None) -> None:
        for each in self._kept:
            if not self._expires and each.expires_at is None:
                continue
            try:
                await rest.set_checkpoint_ttl_from_tinker_path(each.path, ttl)
            except APIStatusError as error:
                if error.status_code not in _NOT_THERE:
                    raise
                _log.warning("%s: its time to live can't be changed: %s", each.path, error)

    def _ours(self, listed: Sequence[SavedCheckpoint]) -> list[SavedCheckpoint]:
        return [
            each
            for each in listed
            if each.path not in self._skipped and each.damage is None and self._is_ours(each)
        ]

    def _is_new(self, checkpoint: SavedCheckpoint) -> bool:
        return checkpoint.path not in self._known

    def _is_ours(self, checkpoint: SavedCheckpoint) -> bool:
        place = checkpoint.place
        return not self._is_new(checkpoint) or (place.generation, place.token) == self._mine
