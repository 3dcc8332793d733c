"""Checkpointer: saves a loop in the background, and deletes old checkpoints after new ones.

The steps of one save, in order:

1. The save gets its sequence id in the caller's thread, so it contains the state at that call.
   Training continues at once.
2. The service acknowledges it.
3. It is confirmed: the service lists it with its loop state, and returns its adapter settings.
4. Checkpoints that the policy does not keep are deleted, oldest first.

A failure is logged at once and raised by the next call.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from time import monotonic
from types import TracebackType
from typing import Any, Self, TypeVar

from everstep.client._transport.futures import APIFuture
from everstep.client.rest_client import RestClient
from everstep.loops import catalog, retention
from everstep.loops.catalog import SavedCheckpoint, SaveId
from everstep.loops.errors import CheckpointError, CheckpointFailed, LoopStateLost, Superseded
from everstep.loops.events import Kind, LoopEvent, OnEvent, emit
from everstep.loops.policy import CheckpointPolicy
from everstep.loops.resume import Resumed, ResumeReport
from everstep.loops.state import LoopState, Metrics, encode, fingerprint
from everstep.wire import types

T = TypeVar("T")


class SaveFuture(APIFuture[SavedCheckpoint]):
    """A save in progress. Its failure is raised here, or else by the checkpointer's next call."""

    _owner: Checkpointer

    def result(self, timeout: float | None = None) -> SavedCheckpoint:
        """Wait until the checkpoint is durable and confirmed. See `APIFuture.result`."""
        try:
            return super().result(timeout)
        except CheckpointError as error:
            self._owner._mark_raised(error)
            raise

    async def result_async(self, timeout: float | None = None) -> SavedCheckpoint:  # noqa: ASYNC109
        """`result` in a coroutine."""
        try:
            return await super().result_async(timeout)
        except CheckpointError as error:
            self._owner._mark_raised(error)
            raise


class Checkpointer:
    """Saves a loop's checkpoints in the background.

    Use it as a context manager, which waits at its end for the save in progress and raises its
    failure. All methods return at once, so they can be called in coroutines as well.

    Args:
        resumed: result of `resume_or_create`.
        policy: when to save, and which checkpoints to keep.
        on_event: called for every save, deletion and failure.

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
        """Continue from another checkpoint, as `Recovery` does. Earlier failures are discarded.

        Args:
            resumed: the state to continue from, with the same client as before.
        """
        with self._lock:
            self._report: ResumeReport = resumed.report
            self._token = catalog.new_token()
            self._serial = resumed.report.serial
            self._retention = retention.Retention(resumed.report, self._token, self.policy)
            self._in_flight: APIFuture[Any] | None = None
            self._latest: tuple[str, SaveFuture] | None = None
            self._errors: list[CheckpointError] = []
            self._since = (resumed.state.step, monotonic())
            self.last: SavedCheckpoint | None = None
        self._renew_if_due()  # the checkpoint that was resumed may be about to expire

    # Called by the loop

    def step(self, state: LoopState, metrics: Metrics | None = None) -> bool:
        """Save if the policy says so. Call it after each step of the loop. It never waits.

        At most one of these saves is in progress. One that becomes due in that time is made at the
        first step after it. A failed one is due again.

        Args:
            state: the loop's current state.
            metrics: numbers at this step, including the policy's metric.

        Returns:
            Whether a save was started.

        Raises:
            CheckpointError: an earlier save failed. This call did nothing else.
            ValueError: the state or a metric can't be stored.
        """
        self._raise_pending()
        if self._in_flight is not None and not self._in_flight.done():
            return False
        step, at = self._since
        if self.policy.due(state.step - step, monotonic() - at):
            self._begin(state, metrics or {}, self.policy.ttl_seconds)
            return True
        self._renew_if_due()
        return False

    def save(self, state: LoopState, metrics: Metrics | None = None) -> SaveFuture:
        """Save now, whatever the policy says.

        Saves are made and confirmed in the order of the calls.

        Args:
            state: the loop's current state.
            metrics: numbers at this step.

        Returns:
            The checkpoint, once it is durable and confirmed.

        Raises:
            CheckpointError: an earlier save failed.
            ValueError: the state or a metric can't be stored.
        """
        self._raise_pending()
        return self._begin(state, metrics or {}, self.policy.ttl_seconds)

    def finish(self, state: LoopState, metrics: Metrics | None = None) -> SaveFuture:
        """Save the end of the loop, and clear the expiry of all checkpoints that are kept.

        If the last save had the same state and didn't fail, that checkpoint is used.

        Raises:
            CheckpointError: an earlier save failed.
            ValueError: the state or a metric can't be stored.
        """
        self._raise_pending()
        last = self._saved_already(state) or self._begin(state, metrics or {}, None)
        run_retention = self._retention

        async def work() -> SavedCheckpoint:
            saved = await APIFuture(last.future())  # the future returned here raises a failure
            await self._capture_failure(self._clear_expiry(run_retention), saved.path)
            return saved

        return self._track(APIFuture.of(work()))

    def flush(self) -> APIFuture[None]:
        """Wait for the save in progress.

        Raises:
            CheckpointError: a save failed.
        """
        flight = self._in_flight

        async def work() -> None:
            if flight is not None:
                await asyncio.gather(asyncio.wrap_future(flight.future()), return_exceptions=True)
            self._raise_pending()

        return APIFuture.of(work())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is None:  # otherwise that exception is raised, and failed saves were logged
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
            name = SaveId(self._report.generation, self._serial, self._token).name(run_name, state)
            sent = self.client.save_state(name, ttl_seconds=ttl, user_metadata=metadata)
            self._serial += 1
        before, now = self._since, (state.step, monotonic())
        self._since = now

        def failed() -> None:
            if self._since == now:
                self._since = before

        work = self._capture_failure(
            self._complete(sent, state, ttl, self._retention), name, failed
        )
        future = self._track(APIFuture.of(work))
        self._latest = (fingerprint(state), future)
        return future

    def _saved_already(self, state: LoopState) -> SaveFuture | None:
        """Return the last save, if it has this state and has not failed."""
        if self._latest is None or self._latest[0] != fingerprint(state):
            return None
        done = self._latest[1].future()
        failed = done.done() and (done.cancelled() or done.exception() is not None)
        return None if failed else self._latest[1]

    def _track(self, work: APIFuture[SavedCheckpoint]) -> SaveFuture:
        future = SaveFuture(work.future())
        future._owner = self
        self._in_flight = future
        return future

    async def _complete(
        self,
        sent: APIFuture[types.SaveWeightsResponse],
        state: LoopState,
        ttl: int | None,
        run_retention: retention.Retention,
    ) -> SavedCheckpoint:
        async with run_retention.order:  # acquired in the order of the calls
            answer = await sent
            rest = self._rest()
            saved, listed = await retention.confirm(rest, answer.path, self._report.run_name)
            if state.user and not saved.complete:
                raise LoopStateLost(
                    f"{answer.path} was saved, but the service dropped its user_metadata: step, "
                    "epoch and position are in its name, LoopState.user is lost. Nothing was "
                    "deleted."
                )
            self._emit("saved", saved.path, saved.state.step)
            if run_retention is not self._retention:
                return saved  # of a lost run, which the loop no longer trains
            self.last = saved
            run_retention.raise_if_superseded(listed)
            async for path in run_retention.delete_old(rest, listed, saved):
                self._emit("deleted", path)
            if ttl is not None:
                await run_retention.renew(rest)
            return saved

    def _renew_if_due(self) -> None:
        if self._retention.renewal_due():
            activity = "renewal of the retained checkpoints"
            self._in_flight = APIFuture.of(
                self._capture_failure(self._renew(self._retention), activity)
            )

    async def _renew(self, run_retention: retention.Retention) -> None:
        async with run_retention.order:
            await run_retention.renew(self._rest())

    async def _clear_expiry(self, run_retention: retention.Retention) -> None:
        async with run_retention.order:
            await run_retention.clear_expiry(self._rest())

    def _capture_failure(
        self,
        work: Coroutine[Any, Any, T],
        activity: str,
        then: Callable[[], None] = lambda: None,
    ) -> Coroutine[Any, Any, T]:
        """Wrap a coroutine so that its failure is raised by the next call.

        A failure is dropped if the checkpointer was rebased in the meantime.
        """
        errors = self._errors

        async def guarded() -> T:
            try:
                return await work
            except CheckpointError as error:
                failed = error
            except Exception as error:  # noqa: BLE001  raised by the next call
                failed = CheckpointFailed(f"{activity}: {error}")
                failed.__cause__ = error
            with self._lock:
                errors.append(failed)
            then()
            self._emit("save_failed", detail=str(failed))
            raise failed

        return guarded()

    def _rest(self) -> RestClient:
        return RestClient(self.client.holder.connection)

    # Failures

    def _raise_pending(self) -> None:
        with self._lock:
            if not self._errors:
                return
            error = self._errors[0]
            if not isinstance(error, Superseded):  # which is permanent
                del self._errors[0]
        raise error

    def _mark_raised(self, error: CheckpointError) -> None:
        with self._lock:
            if error in self._errors and not isinstance(error, Superseded):
                self._errors.remove(error)

    def _emit(
        self,
        kind: Kind,
        path: str | None = None,
        step: int | None = None,
        detail: str | None = None,
    ) -> None:
        emit(self._on_event, LoopEvent(kind, self._report.run_name, path, step, detail))
