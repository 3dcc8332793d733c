"""Deletion of runs and sessions: calls of REST clients that only Everstep's services answer."""

from __future__ import annotations

from everstep.addresses import route
from everstep.client._operations.async_aliases import result_alias
from everstep.client._transport.futures import APIFuture
from everstep.client._transport.session import Connection
from everstep.wire.messages.deletion import DeletionResponse

_IN_USE = 409


class DeletionCalls:
    """Calls that delete runs and sessions.

    Attributes:
        holder: the connection.
    """

    holder: Connection

    def delete_training_run(
        self, training_run_id: str, *, dry_run: bool = False
    ) -> APIFuture[DeletionResponse]:
        """Delete a run permanently, with its checkpoints, operations and samplers.

        Copies of its checkpoints and runs that began from them stay. Needs an Everstep service.

        Args:
            training_run_id: the run.
            dry_run: only return what would be deleted.

        Returns:
            What is deleted. A deletion that is repeated returns what the first one did.

        Raises:
            ConflictError: the client of its session is alive, or another run is loading one of
                its checkpoints. It is not retried.
            NotFoundError: there is no such run.
        """
        return self._delete("training_runs", training_run_id, dry_run)

    def delete_session(
        self, session_id: str, *, dry_run: bool = False
    ) -> APIFuture[DeletionResponse]:
        """Delete a session permanently, with its runs, samplers and custom losses.

        Takes ``dry_run``, and raises, as `delete_training_run` does.
        """
        return self._delete("sessions", session_id, dry_run)

    def _delete(self, kind: str, key: str, dry_run: bool) -> APIFuture[DeletionResponse]:
        path = route("everstep", kind, key)
        params = {"dry_run": "true"} if dry_run else {}
        future: APIFuture[DeletionResponse] = self.holder.call(
            "DELETE", path, DeletionResponse, params=params, hand_back=(_IN_USE,)
        )
        return future

    delete_training_run_async = result_alias(delete_training_run)
    delete_session_async = result_alias(delete_session)
