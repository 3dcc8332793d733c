"""Run: the state of one training run on the client's side."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from time import monotonic
from typing import Any

from everstep.client._operations import submit as ops
from everstep.client._operations.training_pass import TrainingPasses
from everstep.client._transport.futures import APIFuture
from everstep.client._transport.long_poll import RequestInfo
from everstep.client._transport.queue_state import PauseLog, QueueObserver
from everstep.client._transport.session import Session
from everstep.wire import types

BuildRequest = Callable[[str, int], "types.Request"]
"""Builds a request from the run's id and the sequence id."""


class Run:
    """One training run: its ids, its model, and the queue of its operations.

    Args:
        session: the session that the run belongs to.
        model_seq_id: the run's number in the session.
        model_id: the run's id.
        info: the run's model.
    """

    def __init__(
        self, session: Session, model_seq_id: int, model_id: str, info: types.GetInfoResponse
    ) -> None:
        self.session = session
        self.model_seq_id = model_seq_id
        self.model_id = model_id
        self.info = info
        self.log_pause = PauseLog(f"Training of {model_id}")
        self._queue = ops.SubmitQueue()
        self.passes = TrainingPasses(session, self._queue, model_id)

    def submit(
        self,
        request_type: str,
        path: str,
        build: BuildRequest,
        answer: type[ops.Answer],
        observer: QueueObserver,
    ) -> APIFuture[ops.Answer]:
        """Submit an operation whose result is JSON. See `claim`."""
        seq_id, work = self.claim(request_type, path, build, answer, observer)
        return APIFuture.of(self.reported(request_type, seq_id, work))

    def claim(
        self,
        request_type: str,
        path: str,
        build: BuildRequest,
        answer: type[ops.Answer],
        observer: QueueObserver,
    ) -> tuple[int, Coroutine[Any, Any, ops.Answer]]:
        """Claim a sequence id for a request, in the calling thread.

        Args:
            request_type: ``OptimStep``, ``SaveWeights``, ….
            path: of the request, a POST.
            build: builds the request.
            answer: the type of the result.
            observer: called when the service pauses the operation.

        Returns:
            The sequence id, and a coroutine that sends the request in its turn and returns the
            result.

        Raises:
            ValueError: the request can't be encoded. No sequence id was claimed.
        """
        request_info = RequestInfo(request_type, monotonic(), observer)
        seq_id, content = self._queue.claim(
            lambda seq_id: ops.encode_json(build(self.model_id, seq_id))
        )

        async def send() -> ops.Answer:
            accepted = await self._queue.send(
                seq_id, 1, lambda: ops.submit_followed(self.session, path, content)
            )
            return await ops.json_result(self.session, accepted, request_info, answer)

        return seq_id, send()

    def claim_unnamed_save(
        self, kind: types.SamplingClientKind, observer: QueueObserver
    ) -> tuple[int, Coroutine[Any, Any, str]]:
        """Claim a sequence id for an unnamed save for sampling.

        Returns:
            The sequence id, and a coroutine that returns the id of the save's sampler.
        """
        seq_id, sent = self.claim(
            "SaveWeightsForSampler",
            "/save_weights_for_sampler",
            lambda model_id, seq_id: types.SaveWeightsForSamplerRequest(
                model_id=model_id,
                sampling_session_seq_id=self.session.next_id("sampler"),
                kind=kind,
                seq_id=seq_id,
            ),
            types.SaveWeightsForSamplerResponseInternal,
            observer,
        )

        async def sampler_id() -> str:
            answer = await sent
            if answer.sampling_session_id is None:
                raise ValueError("the service returned no sampling session for an unnamed save")
            return answer.sampling_session_id

        return seq_id, sampler_id()

    async def reported(
        self, request_type: str, seq_id: int, work: Coroutine[Any, Any, ops.T]
    ) -> ops.T:
        """Await an operation of this run and report it. See `submit.reported`."""
        return await ops.reported(self.session, request_type, self.model_id, seq_id, work)
