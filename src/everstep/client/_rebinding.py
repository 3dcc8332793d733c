"""Rebinding: a client that the user holds becomes one of another run, in place."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any

from everstep.client._errors import BadRequestError, NotFoundError
from everstep.client._futures import APIFuture

if TYPE_CHECKING:
    from everstep.client.sampling_client import SamplingClient
    from everstep.client.training_client import TrainingClient

_log = logging.getLogger("everstep.client")


class Samplers:
    """The sampling clients that were made from a run and are still in use."""

    def __init__(self) -> None:
        self._made: weakref.WeakKeyDictionary[SamplingClient, str | None] = (
            weakref.WeakKeyDictionary()
        )

    def note(self, sampler: SamplingClient, path: str | None = None) -> SamplingClient:
        """Remember one.

        Args:
            sampler: that was made.
            path: of its checkpoint; None: it samples from an unnamed save.
        """
        self._made[sampler] = path
        return sampler

    def note_created(self, future: APIFuture[SamplingClient], path: str) -> None:
        """Remember one that is being made."""

        def created(done: Any) -> None:
            if not done.cancelled() and done.exception() is None:
                self.note(done.result(), path)

        future.future().add_done_callback(created)

    async def rebind(self, client: TrainingClient) -> None:
        """Have each sample again: from its own checkpoint, or from the run's weights as they are.

        The latter of an unnamed save, which ends with its session. One whose own checkpoint is no
        more stays as it is, and fails: other weights in their place would go unnoticed.

        Raises:
            TinkerError: the service can't say.
        """
        for sampler, path in list(self._made.items()):
            if path is None:
                become(sampler, await client.save_weights_and_get_sampling_client())
                continue
            try:
                become(sampler, await client.create_sampling_client(path))
            except (NotFoundError, BadRequestError) as error:
                _log.warning("%s can't be sampled from any more: %s", path, error)


def become(client: TrainingClient | SamplingClient, other: TrainingClient | SamplingClient) -> None:
    """Make a client the client of another run or sampler; who holds it needn't know."""
    assert type(client) is type(other)
    client.__dict__.update(other.__dict__)


async def rebind(client: TrainingClient, other: TrainingClient) -> None:
    """Make a client the client of another run, and have the samplers made from it follow."""
    samplers = client._samplers
    become(client, other)
    client._samplers = samplers
    await samplers.rebind(client)
