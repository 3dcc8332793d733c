"""RunMonitor: checks periodically whether a service still has a run."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging

from everstep.client._transport.errors import APIStatusError, TinkerError
from everstep.client._transport.futures import submit
from everstep.client._transport.session import Session
from everstep.client.rest_client import RestClient
from everstep.client.training_client import TrainingClient

_log = logging.getLogger("everstep.client")
_GONE = (404, 410)


async def session_loss_reason(session: Session) -> str | None:
    """Return why a session no longer exists. None: it exists."""
    session_id = await session.id()
    body = {"session_id": session_id, "type": "session_heartbeat"}
    answer = await session.http.send("POST", "/session_heartbeat", json=body)
    if answer.status_code in _GONE:
        return f"session {session_id} is gone ({answer.status_code})"
    return None


async def run_loss_reason(client: TrainingClient) -> str | None:
    """Return why a run is lost, according to its service. None: it isn't.

    Raises:
        TinkerError: the service gives no usable answer.
    """
    try:
        run = await RestClient(client.holder.connection).get_training_run(client.model_id)
    except APIStatusError as error:
        if error.status_code not in _GONE:
            raise
        if not await _is_known(client):
            return f"run {client.model_id} is gone ({error.status_code})"
    else:
        if run.corrupted:
            return f"run {client.model_id} is corrupted"
    return await session_loss_reason(client.holder)


async def _is_known(client: TrainingClient) -> bool:
    """Return whether the service knows the run. Not all services list runs."""
    body = {"model_id": client.model_id, "type": "get_info"}
    try:
        await client.holder.http.request("POST", "/get_info", json=body)
    except APIStatusError as error:
        if error.status_code not in (400, *_GONE):
            raise
        return False
    return True


class RunMonitor:
    """Watches one run in the background.

    Args:
        client: of the run. If it is rebound, the new run is watched.
        seconds: interval between two checks.

    Attributes:
        lost: why the run is lost. None: it isn't, as far as is known.
    """

    def __init__(self, client: TrainingClient, seconds: float) -> None:
        self.lost: str | None = None
        self._client = client
        self._seconds = seconds
        self._watching: concurrent.futures.Future[None] | None = None

    @property
    def watching(self) -> bool:
        """Whether the monitor is running."""
        return self._watching is not None

    def start(self) -> None:
        """Start watching, or watch again after a loss."""
        self.stop()
        self.lost = None
        self._watching = submit(self._watch())

    def stop(self) -> None:
        """Stop watching."""
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None

    async def _watch(self) -> None:
        while self.lost is None:
            await asyncio.sleep(self._seconds)
            try:
                self.lost = await run_loss_reason(self._client)
            except TinkerError as error:  # an unreachable service has not lost the run
                _log.debug("%s could not be checked: %s", self._client.model_id, error)
