"""Recovery: brings a run back that its service has lost, and lets the loop go on.

A service may answer that a run is corrupted, that it or its session is gone (404, 410), or fail it
with its worker. Then a run is created from the last good checkpoint, the client that the user
holds becomes the client of that run, and so do the sampling clients made from it; the loop is
called again with the state at the checkpoint.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self, TypeVar

from everstep.client import _catalogue
from everstep.client._errors import TinkerError
from everstep.client._futures import APIFuture
from everstep.client._rebinding import rebind
from everstep.client.checkpointer import Checkpointer
from everstep.client.loop_errors import RecoveryFailed, RunLost
from everstep.client.loop_events import Kind, LoopEvent, OnEvent, tell_event
from everstep.client.loop_state import LoopState
from everstep.client.recovery_policy import RecoveryPolicy, Verdict, judge, told_of
from everstep.client.resume import Resumed, restore
from everstep.client.run_monitor import RunMonitor, why_lost, why_session_lost
from everstep.client.service_client import ServiceClient

T = TypeVar("T")


class Recovery:
    """Runs a loop, and brings its run back when the service loses it.

    Args:
        service: where the run is.
        resumed: what `resume_or_create` gave. Its client stays valid: it is rebound in place.
        checkpointer: of the loop; it goes on with the new run.
        policy: what to go on from, and when to give up.
        on_event: told of losses, attempts and recoveries.

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
        """Call a loop until it returns; again with an earlier state when its run was lost.

        Args:
            loop: goes on from the state that it is given. What it raises is raised here, except
                when it means that the run is lost.

        Returns:
            What the loop returns.

        Raises:
            RecoveryFailed: the run could not be brought back within the policy's bounds.
        """
        while True:
            try:
                return loop(self.state)
            except Exception as error:  # noqa: BLE001  judged by `recover`
                self.recover(error).result()

    async def run_async(self, loop: Callable[[LoopState], Awaitable[T]]) -> T:
        """`run` for a coroutine function."""
        while True:
            try:
                return await loop(self.state)
            except Exception as error:  # noqa: BLE001  judged by `recover`
                await self.recover(error)

    def check(self) -> None:
        """Raise `RunLost` if the run was found to be lost while nothing failed."""
        if self._monitor is not None and self._monitor.lost is not None:
            raise RunLost(self._monitor.lost)

    def recover(self, error: Exception) -> APIFuture[Resumed]:
        """Bring the run back after a failure, for loops that don't use `run`.

        Args:
            error: what the loop met.

        Returns:
            The client, which is the one from before, and where the loop goes on.

        Raises:
            Exception: ``error`` itself, when it doesn't mean that the run is lost.
            RecoveryFailed: it could not be brought back within the policy's bounds.
        """
        return APIFuture.of(self._recover(error))

    def __enter__(self) -> Self:
        if self._monitor is not None:
            self._monitor.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._monitor is not None:
            self._monitor.stop()

    async def _recover(self, error: Exception) -> Resumed:
        reason = await self._why(error)
        self._tell("lost", detail=reason)
        http = self.client.holder.http
        if self._checkpointer.last is not None:
            self._attempts = 0  # the loop came further than last time
        while True:
            self._attempts += 1
            if self._attempts == 1:
                self._since = http.now()
            waited = http.now() - self._since
            if self._attempts > self.policy.attempts or waited > self.policy.seconds:
                raise self._given_up(reason, waited) from error
            await http.wait(self.policy.delay(self._attempts))
            self._tell("attempt", detail=f"{self._attempts} of {self.policy.attempts}")
            try:
                resumed = await self._restore()
                break
            except TinkerError as again:
                if judge(again) is not Verdict.LOST:
                    raise
                error, reason = again, str(again)
        self._tell("recovered", resumed.report.path, resumed.state.step)
        return resumed

    async def _why(self, error: Exception) -> str:
        """Why the run is lost; raises the error itself when it isn't."""
        verdict = judge(error)
        if verdict is Verdict.LOST:
            return told_of(error)
        if verdict is Verdict.DOUBTFUL:
            try:
                found = await why_lost(self.client)
            except TinkerError as unclear:
                found = str(unclear) if judge(unclear) is Verdict.LOST else None
            if found is not None:
                return f"{found}: {told_of(error)}"
        raise error

    async def _restore(self) -> Resumed:
        if await why_session_lost(self._service.holder):
            self._service.holder = await self._service.holder.again()
        run_name = self._report.run_name
        known = await _catalogue.find(self._service.create_rest_client(), run_name)
        candidates = self.policy.candidates(known)
        fresh = await restore(
            self._service, run_name, self._report.spec, known, candidates, self._on_event
        )
        await rebind(self.client, fresh.client)
        resumed = Resumed(self.client, fresh.state, fresh.report)
        self.state, self._report = resumed.state, resumed.report
        self._checkpointer.rebase(resumed)
        if self._monitor is not None and self._monitor.watching:
            self._monitor.start()
        return resumed

    def _given_up(self, reason: str, waited: float) -> RecoveryFailed:
        tries = self._attempts - 1
        text = (
            f"Run {self._report.run_name!r} was not brought back in {tries} attempts and "
            f"{waited:.0f} s: {reason}"
        )
        self._tell("gave_up", detail=text)
        return RecoveryFailed(text)

    def _tell(
        self,
        kind: Kind,
        path: str | None = None,
        step: int | None = None,
        detail: str | None = None,
    ) -> None:
        tell_event(self._on_event, LoopEvent(kind, self._report.run_name, path, step, detail))
