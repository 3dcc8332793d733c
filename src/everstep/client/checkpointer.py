"""Checkpointer: saves a loop in the background; old checkpoints go when new ones are whole.

What it does with one save, in this order:

1. The save takes its place among the run's operations in the caller's thread: what is saved is the
   state at that call. Training goes on at once.
2. The service acknowledges it.
3. It is confirmed: the service lists it, with its loop state, and tells what it was trained with.
4. Only then what the policy doesn't keep is deleted, oldest first.

Whatever fails is logged at once and raised by the next call.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from time import monotonic
from types import TracebackType
from typing import Any, Self, TypeVar

from everstep.client import _catalogue, _retention
from everstep.client._catalogue import Place, SavedCheckpoint
from everstep.client._futures import APIFuture
from everstep.client.checkpoint_policy import CheckpointPolicy
from everstep.client.loop_errors import CheckpointError, CheckpointFailed, LoopStateLost, Superseded
from everstep.client.loop_events import Kind, LoopEvent, OnEvent, tell_event
from everstep.client.loop_state import LoopState, Metrics, encode, fingerprint
from everstep.client.rest_client import RestClient
from everstep.client.resume import Resumed, ResumeReport
from everstep.wire import types

T = TypeVar("T")


class SaveFuture(APIFuture[SavedCheckpoint]):
    """A save under way. Its failure is raised here, or else by the checkpointer's next call."""

    _owner: Checkpointer

    def result(self, timeout: float | None = None) -> SavedCheckpoint:
        """Wait until the checkpoint is durable and confirmed; see `APIFuture.result`."""
        try:
            return super().result(timeout)
        except CheckpointError as error:
            self._owner._delivered(error)
            raise

    async def result_async(self, timeout: float | None = None) -> SavedCheckpoint:  # noqa: ASYNC109
        """`result` in a coroutine."""
        try:
            return await super().result_async(timeout)
        except CheckpointError as error:
            self._owner._delivered(error)
            raise


class Checkpointer:
    """Saves a loop's checkpoints in the background.

    Use as a context manager: leaving it waits for the save under way, and raises its failure. All
    methods return at once; so they serve in coroutines as well.

    Args:
        resumed: what `resume_or_create` gave.
        policy: when to save, and what to keep.
        on_event: told of every save, deletion and failure.

    Example:
        >>> with Checkpointer(resumed, CheckpointPolicy(every_steps=50, keep_last=3)) as saves:
        ...     for batch in batches[state.position:]:
        ...         ...
        ...         saves.step(LoopState(step=step, position=position), {"loss": loss})
        ...     saves.finish(LoopState(step=step, position=position), {"loss": loss}).result()
    """

    def __init__(
        self, resumed: Resumed, policy: CheckpointPolicy, on_event: OnEvent | None = None
    ) -> None:
        self.client = resumed.client
        self.policy = policy
        self._on_event = on_event
        self._lock = threading.Lock()
        self.rebase(resumed)

    def rebase(self, resumed: Resumed) -> None:
        """Go on from another checkpoint, as `Recovery` does; earlier failures are of the lost run.

        Args:
            resumed: what the loop goes on from. The client is to be the one from before.
        """
        with self._lock:
            self._report: ResumeReport = resumed.report
            self._token = _catalogue.new_token()
            self._serial = resumed.report.serial
            self._upkeep = _retention.Retention(resumed.report, self._token, self.policy)
            self._flight: APIFuture[Any] | None = None
            self._latest: tuple[str, SaveFuture] | None = None
            self._errors: list[CheckpointError] = []
            self._since = (resumed.state.step, monotonic())
            self.last: SavedCheckpoint | None = None
        self._renew_if_due()  # what the loop goes on from may be about to expire

    # What a loop calls

    def step(self, state: LoopState, metrics: Metrics | None = None) -> bool:
        """Save if the policy says so. Call it after each step of the loop; never waits.

        At most one of these saves is under way: one that is due meanwhile is made at the first
        step after. One that failed is due again.

        Args:
            state: where the loop is now.
            metrics: numbers at this step; among them the policy's.

        Returns:
            Whether a save was begun.

        Raises:
            CheckpointError: an earlier save failed; this call did nothing else.
            ValueError: the state or a metric can't be kept.
        """
        self._raise_earlier()
        if self._flight is not None and not self._flight.done():
            return False
        step, at = self._since
        if self.policy.due(state.step - step, monotonic() - at):
            self._begin(state, metrics or {}, self.policy.ttl_seconds)
            return True
        self._renew_if_due()
        return False

    def save(self, state: LoopState, metrics: Metrics | None = None) -> SaveFuture:
        """Save now, whatever the policy says.

        Saves are made in the order of the calls, and confirmed in that order.

        Args:
            state: where the loop is now.
            metrics: numbers at this step.

        Returns:
            The checkpoint, once it is durable and confirmed.

        Raises:
            CheckpointError: an earlier save failed.
            ValueError: the state or a metric can't be kept.
        """
        self._raise_earlier()
        return self._begin(state, metrics or {}, self.policy.ttl_seconds)

    def finish(self, state: LoopState, metrics: Metrics | None = None) -> SaveFuture:
        """Save the end of the loop; neither it nor what else is kept expires any more.

        Where the last save was of the same state and didn't fail, that one is kept.

        Raises:
            CheckpointError: an earlier save failed.
            ValueError: the state or a metric can't be kept.
        """
        self._raise_earlier()
        last = self._saved_already(state) or self._begin(state, metrics or {}, None)
        upkeep = self._upkeep

        async def work() -> SavedCheckpoint:
            saved = await APIFuture(last.future())  # a failure is told by who waits for this one
            await self._guarded(self._keep_for_good(upkeep), saved.path)
            return saved

        return self._under_way(APIFuture.of(work()))

    def flush(self) -> APIFuture[None]:
        """Wait for what is under way.

        Raises:
            CheckpointError: a save failed.
        """
        flight = self._flight

        async def work() -> None:
            if flight is not None:
                await asyncio.gather(asyncio.wrap_future(flight.future()), return_exceptions=True)
            self._raise_earlier()

        return APIFuture.of(work())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is None:  # else that is what is raised; failures of saves were logged
            self.flush().result()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is None:
            await self.flush()

    # One save

    def _begin(self, state: LoopState, metrics: Metrics, ttl: int | None) -> SaveFuture:
        run_name = self._report.run_name
        metadata = encode(run_name, state, metrics)
        with self._lock:
            name = Place(self._report.generation, self._serial, self._token).name(run_name, state)
            sent = self.client.save_state(name, ttl_seconds=ttl, user_metadata=metadata)
            self._serial += 1
        before, now = self._since, (state.step, monotonic())
        self._since = now

        def failed() -> None:
            if self._since == now:
                self._since = before

        work = self._guarded(self._complete(sent, state, ttl, self._upkeep), name, failed)
        future = self._under_way(APIFuture.of(work))
        self._latest = (fingerprint(state), future)
        return future

    def _saved_already(self, state: LoopState) -> SaveFuture | None:
        """The last save, if it was of this state and has not failed."""
        if self._latest is None or self._latest[0] != fingerprint(state):
            return None
        done = self._latest[1].future()
        failed = done.done() and (done.cancelled() or done.exception() is not None)
        return None if failed else self._latest[1]

    def _under_way(self, work: APIFuture[SavedCheckpoint]) -> SaveFuture:
        future = SaveFuture(work.future())
        future._owner = self
        self._flight = future
        return future

    async def _complete(
        self,
        sent: APIFuture[types.SaveWeightsResponse],
        state: LoopState,
        ttl: int | None,
        upkeep: _retention.Retention,
    ) -> SavedCheckpoint:
        async with upkeep.order:  # taken in the order of the calls, whichever is answered first
            answer = await sent
            rest = self._rest()
            saved, listed = await _retention.confirm(rest, answer.path, self._report.run_name)
            if state.user and not saved.complete:
                raise LoopStateLost(
                    f"{answer.path} is saved, but the service dropped its user_metadata: step, "
                    "epoch and position are in its name, LoopState.user is nowhere. Nothing was "
                    "deleted."
                )
            self._tell("saved", saved.path, saved.state.step)
            if upkeep is not self._upkeep:
                return saved  # of the run that was lost; the loop goes on from another
            self.last = saved
            upkeep.check_alone(listed)
            async for path in upkeep.delete_old(rest, listed):
                self._tell("deleted", path)
            if ttl is not None:
                await upkeep.renew(rest)
            return saved

    def _renew_if_due(self) -> None:
        if self._upkeep.renewal_due():
            what = "renewal of the checkpoints that are kept"
            self._flight = APIFuture.of(self._guarded(self._renew(self._upkeep), what))

    async def _renew(self, upkeep: _retention.Retention) -> None:
        async with upkeep.order:
            await upkeep.renew(self._rest())

    async def _keep_for_good(self, upkeep: _retention.Retention) -> None:
        async with upkeep.order:
            await upkeep.keep_for_good(self._rest())

    def _guarded(
        self,
        work: Coroutine[Any, Any, T],
        what: str,
        then: Callable[[], None] = lambda: None,
    ) -> Coroutine[Any, Any, T]:
        """What keeps a failure for the next call; not for those after the run was rebound."""
        errors = self._errors

        async def guarded() -> T:
            try:
                return await work
            except CheckpointError as error:
                failed = error
            except Exception as error:  # noqa: BLE001  kept, and raised at the next call
                failed = CheckpointFailed(f"{what}: {error}")
                failed.__cause__ = error
            with self._lock:
                errors.append(failed)
            then()
            self._tell("save_failed", detail=str(failed))
            raise failed

        return guarded()

    def _rest(self) -> RestClient:
        return RestClient(self.client.holder.connection)

    # Failures

    def _raise_earlier(self) -> None:
        with self._lock:
            if not self._errors:
                return
            error = self._errors[0]
            if not isinstance(error, Superseded):  # which stays so
                del self._errors[0]
        raise error

    def _delivered(self, error: CheckpointError) -> None:
        with self._lock:
            if error in self._errors and not isinstance(error, Superseded):
                self._errors.remove(error)

    def _tell(
        self,
        kind: Kind,
        path: str | None = None,
        step: int | None = None,
        detail: str | None = None,
    ) -> None:
        tell_event(self._on_event, LoopEvent(kind, self._report.run_name, path, step, detail))
