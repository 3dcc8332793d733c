"""Sampler: submits samples to one sampler of a service and retrieves their results."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from time import monotonic
from typing import Any

from everstep.client._operations import submit as ops
from everstep.client._operations.sample_stream import SampleStream
from everstep.client._operations.sample_validation import check_response, with_sequence_ids
from everstep.client._operations.sampler_seq_ids import SamplerSeqIds
from everstep.client._transport.byte_budget import prompt_bytes
from everstep.client._transport.errors import APIError, APIStatusError, RateLimitError
from everstep.client._transport.long_poll import RequestInfo, retrieve
from everstep.client._transport.queue_state import PauseLog, QueueObserver
from everstep.client._transport.session import Session
from everstep.wire import types
from everstep.wire.base import convert

_log = logging.getLogger("everstep.client")
_HEADERS = ops.JSON | {"X-Tinker-Sampling-Backpressure": "1"}
_BUSY = (429,)
_BUSY_SECONDS = 1.0
_BUSY_SECONDS_LARGE = 5.0
_LARGE_PROMPT_BYTES = 128 * 1024
_RESAMPLE_SECONDS = 0.5
_GONE = 410


class Sampler:
    """One sampler of a service, as one client uses it.

    Args:
        session: the session.
        sampling_session_id: the sampler's id.
        base_model: its base model.
        shadow: whether the client is a copy of the one that created the sampler.
        record_stability_info: see `SamplingClient`.
    """

    def __init__(
        self,
        session: Session,
        sampling_session_id: str,
        base_model: str,
        *,
        shadow: bool,
        record_stability_info: bool,
    ) -> None:
        self.session = session
        self.id = sampling_session_id
        self.base_model = base_model
        self.record_stability_info = record_stability_info
        self.log_pause = PauseLog(f"Sampling from {sampling_session_id}")
        self._seq_ids = SamplerSeqIds(session, sampling_session_id, shadow=shadow)
        self._slots: asyncio.Semaphore | None = None
        self._paused_until = 0.0

    def request(
        self,
        prompt: types.ModelInput,
        num_samples: int,
        sampling_params: types.SamplingParams,
        **options: Any,
    ) -> types.SampleRequest:
        """Build a request with the client's next sequence id.

        Raises:
            TypeError: the prompt or the parameters are no such objects.
            ValueError: an argument has a wrong value.
        """
        prompt = convert(types.ModelInput, prompt, "prompt")
        sampling_params = convert(types.SamplingParams, sampling_params, "sampling_params")
        return types.SampleRequest(
            num_samples=num_samples,
            prompt=prompt,
            sampling_params=sampling_params,
            sampling_session_id=self.id,
            seq_id=self._seq_ids.next(),
            record_stability_info=self.record_stability_info,
            **options,
        )

    async def sample(
        self, request: types.SampleRequest, observer: QueueObserver
    ) -> types.SampleResponse:
        """Sample, and report it to hooks, traces and telemetry."""
        return await self._reported(request, self._sample(request, observer))

    async def stream(
        self, request: types.SampleRequest, stream: SampleStream, observer: QueueObserver
    ) -> types.SampleResponse:
        """Sample, feeding tokens to a stream as they are drawn. Reported as `sample` is."""
        return await self._reported(request, self._stream(request, stream, observer))

    async def _reported(
        self, request: types.SampleRequest, work: Coroutine[Any, Any, types.SampleResponse]
    ) -> types.SampleResponse:
        seq_id = request.seq_id or 0
        return await ops.reported(self.session, "Sample", None, seq_id, work, self.id)

    async def _stream(
        self, request: types.SampleRequest, stream: SampleStream, observer: QueueObserver
    ) -> types.SampleResponse:
        async with self._slot():
            future = await self._submit(request)
            try:
                await stream.follow(self.session.http, future.request_id)
            except asyncio.CancelledError:
                self._cancel_in_background(future.request_id)
                raise
            response = with_sequence_ids(future, await self._retrieve(future, observer))
        stream.complete(response)
        return response

    async def _sample(
        self, request: types.SampleRequest, observer: QueueObserver
    ) -> types.SampleResponse:
        async with self._slot():
            while True:
                future = await self._submit(request)
                try:
                    response = await self._retrieve(future, observer)
                except APIStatusError as error:
                    if error.status_code != _GONE:
                        raise
                    # The service no longer has the sample: draw a new one, under a new sequence id.
                    await self.session.http.wait(_RESAMPLE_SECONDS)
                    request = request.model_copy(update={"seq_id": self._seq_ids.next()})
                else:
                    break
        check_response(request, response)
        return with_sequence_ids(future, response)

    def _slot(self) -> asyncio.Semaphore:
        """Return the semaphore that bounds the client's concurrent samples."""
        if self._slots is None:
            self._slots = asyncio.Semaphore(self.session.config.sample_max_concurrent_requests)
        return self._slots

    async def _submit(self, request: types.SampleRequest) -> types.UntypedAPIFuture:
        """Send a sample, and wait while the service has no capacity for it (429)."""
        seq_id = await self._seq_ids.seq_id(request.seq_id or 0)
        request = request.model_copy(update={"seq_id": seq_id})
        http = self.session.http
        size = prompt_bytes(request.prompt)
        content = ops.encode_json(request)
        async with self.session.connection.budgets.samples.reserve(size):
            while True:
                while (pause := self._paused_until - http.now()) > 0:
                    await http.wait(pause)
                try:
                    return await ops.submit(
                        self.session, "/asample", content, _HEADERS, hand_back=_BUSY
                    )
                except RateLimitError:
                    pause = _BUSY_SECONDS if size <= _LARGE_PROMPT_BYTES else _BUSY_SECONDS_LARGE
                    self._paused_until = http.now() + pause

    async def _retrieve(
        self, future: types.UntypedAPIFuture, observer: QueueObserver
    ) -> types.SampleResponse:
        from everstep.wire.codecs.proto import decode_sample_response

        request_info = RequestInfo("Sample", monotonic(), observer)
        connection = self.session.connection
        try:
            return await retrieve(
                connection, future.request_id, request_info, decode_sample_response, None
            )
        except asyncio.CancelledError:
            self._cancel_in_background(future.request_id)
            raise

    def _cancel_in_background(self, request_id: str) -> None:
        """Ask the service to stop a sample whose result nobody waits for."""
        if self.session.connection.dynamic.sample_cancel_enabled:
            self.session.in_background(self._cancel(request_id))

    async def _cancel(self, request_id: str) -> None:
        try:
            await self.session.http.send("POST", "/cancel_future", json={"request_id": request_id})
        except APIError as error:
            _log.debug("sample %s not cancelled: %s", request_id, error)


async def create_sampler(
    session: Session, seq_id: int, model_path: str | None, base_model: str | None
) -> str:
    """Create a sampler on a checkpoint or a base model. Returns its id."""
    request = types.CreateSamplingSessionRequest(
        session_id=await session.id(),
        sampling_session_seq_id=seq_id,
        base_model=base_model,
        model_path=model_path,
    )
    answer = await session.http.call(
        "POST",
        "/create_sampling_session",
        types.CreateSamplingSessionResponse,
        json=request.model_dump(mode="json", exclude_none=True),
    )
    return answer.sampling_session_id
