"""Recovery: restores a run that its service has lost, and lets the loop continue.

A service may report that a run is corrupted, that it or its session is gone (404, 410), or fail it
with its worker. Recovery then creates a run from the last good checkpoint. The user's training
client, and the sampling clients made from it, become clients of that run. The loop is called again
with the state at the checkpoint.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Self, TypeVar

from everstep.client._transport.errors import TinkerError
from everstep.client._transport.futures import APIFuture
from everstep.client.service_client import ServiceClient
from everstep.loops import catalog
from everstep.loops.checkpointer import Checkpointer
from everstep.loops.errors import RecoveryFailed, RunLost
from everstep.loops.events import Kind, LoopEvent, OnEvent, emit
from everstep.loops.failure_classification import FailureClass, RecoveryPolicy, classify, describe
from everstep.loops.resume import Resumed, restore
from everstep.loops.run_monitor import RunMonitor, run_loss_reason, session_loss_reason
from everstep.loops.state import LoopState

T = TypeVar("T")


class Recovery:
    """Runs a loop, and restores its run when the service loses it.

    Args:
        service: the service that has the run.
        resumed: result of `resume_or_create`. Its client stays valid: it is rebound in place.
        checkpointer: of the loop. It continues with the new run.
        policy: which checkpoint to continue from, and when to give up.
        on_event: called for losses, attempts and recoveries.

    Example:
        >>> def loop(state: LoopState) -> None:
        ...     for step in range(state.step, 1000):
        ...         client.forward_backward(batch(step), "cross_entropy")
        ...         client.optim_step(params).result()
        ...         saves.step(LoopState(step=step + 1))
        >>> with Recovery(service, resumed, saves) as recovery:
        ...     recovery.run(loop)
    """

    def __init__(
        self,
        service: ServiceClient,
        resumed: Resumed,
        checkpointer: Checkpointer,
        policy: RecoveryPolicy | None = None,
        on_event: OnEvent | None = None,
    ) -> None:
        self.client = resumed.client
        self.state = resumed.state
        self.policy = policy or RecoveryPolicy()
        self._service = service
        self._checkpointer = checkpointer
        self._on_event = on_event
        self._report = resumed.report
        self._attempts = 0
        self._since = 0.0
        watch = self.policy.watch_seconds
        self._monitor = None if watch is None else RunMonitor(self.client, watch)

    def run(self, loop: Callable[[LoopState], T]) -> T:
        """Call a loop until it returns, and again with an earlier state if its run was lost.

        Args:
            loop: continues from the state that it gets. Its exceptions are raised here, except
                those that mean that the run is lost.

        Returns:
            The loop's return value.

        Raises:
            RecoveryFailed: the run could not be recovered within the policy's bounds.
        """
        while True:
            try:
                return loop(self.state)
            except Exception as error:  # noqa: BLE001  classified by `recover`
                self.recover(error).result()

    async def run_async(self, loop: Callable[[LoopState], Awaitable[T]]) -> T:
        """`run` for a coroutine function."""
        while True:
            try:
                return await loop(self.state)
            except Exception as error:  # noqa: BLE001  classified by `recover`
                await self.recover(error)

    def check(self) -> None:
        """Raise `RunLost` if the monitor has found that the run is lost."""
        if self._monitor is not None and self._monitor.lost is not None:
            raise RunLost(self._monitor.lost)

    def recover(self, error: Exception) -> APIFuture[Resumed]:
        """Recover the run after a failure, for loops that don't use `run`.

        Args:
            error: the loop's exception.

        Returns:
            The same client as before, and the state to continue from.

        Raises:
            Exception: ``error`` itself, if it doesn't mean that the run is lost.
            RecoveryFailed: the run could not be recovered within the policy's bounds.
        """
        return APIFuture.of(self._recover(error))

    def __enter__(self) -> Self:
        if self._monitor is not None:
            self._monitor.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._monitor is not None:
            self._monitor.stop()

    async def _recover(self, error: Exception) -> Resumed:
        reason = await self._loss_reason(error)
        self._emit("lost", detail=reason)
        http = self.client.holder.http
        if self._checkpointer.last is not None:
            self._attempts = 0  # the loop made progress since the last loss
        while True:
            self._attempts += 1
            if self._attempts == 1:
                self._since = http.now()
            waited = http.now() - self._since
            if self._attempts > self.policy.attempts or waited > self.policy.seconds:
                raise self._give_up(reason, waited) from error
            await http.wait(self.policy.delay(self._attempts))
            self._emit("attempt", detail=f"{self._attempts} of {self.policy.attempts}")
            try:
                resumed = await self._restore()
                break
            except TinkerError as again:
                if classify(again) is not FailureClass.LOST:
                    raise
                error, reason = again, str(again)
        self._emit("recovered", resumed.report.path, resumed.state.step)
        return resumed

    async def _loss_reason(self, error: Exception) -> str:
        """Return why the run is lost. Raises the error itself if it isn't."""
        failure = classify(error)
        if failure is FailureClass.LOST:
            return describe(error)
        if failure is FailureClass.DOUBTFUL:
            try:
                found = await run_loss_reason(self.client)
            except TinkerError as unclear:
                found = str(unclear) if classify(unclear) is FailureClass.LOST else None
            if found is not None:
                return f"{found}: {describe(error)}"
        raise error

    async def _restore(self) -> Resumed:
        if await session_loss_reason(self._service.holder):
            self._service.holder = await self._service.holder.replacement()
        run_name = self._report.run_name
        known = await catalog.find(self._service.create_rest_client(), run_name)
        candidates = self.policy.candidates(known)
        fresh = await restore(
            self._service, run_name, self._report.spec, known, candidates, self._on_event
        )
        await self.client._rebind(fresh.client)
        resumed = Resumed(self.client, fresh.state, fresh.report)
        self.state, self._report = resumed.state, resumed.report
        self._checkpointer.rebase(resumed)
        if self._monitor is not None and self._monitor.watching:
            self._monitor.start()
        return resumed

    def _give_up(self, reason: str, waited: float) -> RecoveryFailed:
        tries = self._attempts - 1
        text = (
            f"Run {self._report.run_name!r} was not recovered in {tries} attempts and "
            f"{waited:.0f} s: {reason}"
        )
        self._emit("gave_up", detail=text)
        return RecoveryFailed(text)

    def _emit(
        self,
        kind: Kind,
        path: str | None = None,
        step: int | None = None,
        detail: str | None = None,
    ) -> None:
        emit(self._on_event, LoopEvent(kind, self._report.run_name, path, step, detail))
