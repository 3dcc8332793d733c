"""Retention: the work after a save: confirm it, check for another process, delete, renew."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from time import monotonic

from everstep.backoff import Backoff
from everstep.client._transport.errors import APIStatusError, NotFoundError
from everstep.client.rest_client import RestClient
from everstep.loops import catalog
from everstep.loops.catalog import SavedCheckpoint
from everstep.loops.errors import CheckpointNotConfirmed, Superseded
from everstep.loops.policy import CheckpointPolicy
from everstep.loops.resume import ResumeReport

_log = logging.getLogger("everstep.client")
_CONFIRM_ATTEMPTS = 7
_CONFIRM_BACKOFF = Backoff(initial=0.5, max=16.0)
"""At services of many machines, a list may lag behind an acknowledged save."""
_NOT_SUPPORTED = (404, 405, 501)


async def confirm(
    rest: RestClient, path: str, run_name: str
) -> tuple[SavedCheckpoint, list[SavedCheckpoint]]:
    """Check that an acknowledged checkpoint exists, as far as the protocol allows.

    Returns:
        The checkpoint as the service lists it, and all checkpoints of the run.

    Raises:
        CheckpointNotConfirmed: the checkpoint isn't listed, its loop state is damaged, or the
            service can't return its adapter settings.
    """
    for attempt in range(_CONFIRM_ATTEMPTS):
        if attempt:
            await rest.holder.http.wait(_CONFIRM_BACKOFF.delay(attempt - 1))
        listed = await catalog.find(rest, run_name)
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
    """Decides which of a run's checkpoints are deleted, and renews the expiry of the others.

    Args:
        report: how the run was resumed.
        token: of this process.
        policy: which checkpoints to keep.

    Attributes:
        order: lock that keeps the work after several saves in order.
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

    def raise_if_superseded(self, listed: Sequence[SavedCheckpoint]) -> None:
        """Check whether another process saves under the same run name.

        The process that resumed later continues. Of two that resumed at once, the one whose token
        sorts last continues. So exactly one continues.

        Raises:
            Superseded: another process continues.
        """
        newest = max(
            (
                (each.save_id.generation, each.save_id.token)
                for each in listed
                if self._is_new(each)
            ),
            default=self._mine,
        )
        if newest > self._mine:
            raise Superseded(
                f"Another process has taken over run {self._run_name!r} (generation {newest[0]}, "
                f"{newest[1]}). This process has to stop; its checkpoints are kept."
            )

    async def delete_old(
        self, rest: RestClient, listed: Sequence[SavedCheckpoint], newest: SavedCheckpoint
    ) -> AsyncIterator[str]:
        """Delete the checkpoints that the policy does not keep, oldest first.

        Checkpoints of another process, and those that could not be loaded, are not deleted.

        Args:
            rest: client of the service.
            listed: all checkpoints of the run. Saves in progress may be among them. They don't
                count until they are confirmed themselves.
            newest: the one that is confirmed.

        Yields:
            The path of each deleted checkpoint.
        """
        ours = [each for each in self._ours(listed) if each.save_id <= newest.save_id]
        self._kept = self._policy.kept(ours)
        stay = {each.path for each in self._kept}
        for each in ours:
            if each.path in stay:
                continue
            try:
                await rest.delete_checkpoint_from_tinker_path(each.path)
            except NotFoundError:
                continue  # it has expired, or was deleted by someone else
            yield each.path

    def renewal_due(self) -> bool:
        """Return whether the expiry has to be renewed."""
        ttl = self._policy.ttl_seconds
        return self._expires and ttl is not None and monotonic() - self._renewed_at > ttl / 4

    async def renew(self, rest: RestClient) -> None:
        """Renew the expiry of the kept checkpoints: each gets its full time to live from now."""
        if self.renewal_due():
            self._renewed_at = monotonic()
            await self._set_ttl(rest, self._policy.ttl_seconds)

    async def clear_expiry(self, rest: RestClient) -> None:
        """Clear the expiry of the checkpoints that are kept."""
        await self._set_ttl(rest, None)

    async def _set_ttl(self, rest: RestClient, ttl: int | None) -> None:
        for each in self._kept:
            if not self._expires and each.expires_at is None:
                continue
            try:
                await rest.set_checkpoint_ttl_from_tinker_path(each.path, ttl)
            except APIStatusError as error:
                if error.status_code not in _NOT_SUPPORTED:
                    raise
                _log.warning("the time to live of %s can't be changed: %s", each.path, error)

    def _ours(self, listed: Sequence[SavedCheckpoint]) -> list[SavedCheckpoint]:
        return [
            each
            for each in listed
            if each.path not in self._skipped and each.damage is None and self._is_ours(each)
        ]

    def _is_new(self, checkpoint: SavedCheckpoint) -> bool:
        return checkpoint.path not in self._known

    def _is_ours(self, checkpoint: SavedCheckpoint) -> bool:
        save_id = checkpoint.save_id
        return not self._is_new(checkpoint) or (save_id.generation, save_id.token) == self._mine
