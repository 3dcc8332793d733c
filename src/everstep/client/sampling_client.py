"""SamplingClient: samples and logprobs from a checkpoint or a base model."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import Callable, Coroutine
from time import monotonic
from typing import Any

from everstep.client import _operations as ops
from everstep.client._budgets import prompt_bytes
from everstep.client._errors import APIError, APIStatusError, RateLimitError
from everstep.client._futures import APIFuture, BackcompatSamplingClientFuture, ConcurrentAPIFuture
from everstep.client._futures import submit as run
from everstep.client._polling import Asked, retrieve
from everstep.client._queue import PauseLog
from everstep.client._sample_checks import check_request, check_response, named
from everstep.client._sample_stream import SampleStream
from everstep.client._sampler_numbers import SamplerNumbers
from everstep.client._session import Connection, Session
from everstep.client._telemetry import Telemetry
from everstep.client._tokenizers import load_tokenizer
from everstep.client._twins import gives_result
from everstep.wire import types
from everstep.wire.proto import decode_sample_response

_log = logging.getLogger("everstep.client")
_HEADERS = ops.JSON | {"X-Tinker-Sampling-Backpressure": "1"}
_BUSY = (429,)
_BUSY_SECONDS = 1.0
_BUSY_SECONDS_LARGE = 5.0
_LARGE_PROMPT_BYTES = 128 * 1024
_AGAIN_SECONDS = 0.5
_GONE = 410


class SamplingClient:
    """One sampler. Can be pickled, or passed on as a handle; each copy samples by itself.

    Args:
        holder: the session.
        sampling_session_id: the sampler's id.
        base_model: its base model.
        shadow: whether this is a copy.
        retry_config: has no effect; kept for scripts that pass one.
        record_stability_info: have the service keep what ``stable_reinforce`` needs.
    """

    def __init__(
        self,
        holder: Session,
        *,
        sampling_session_id: str,
        base_model: str,
        shadow: bool = False,
        retry_config: Any = None,
        record_stability_info: bool = False,
    ) -> None:
        self.holder = holder
        self.sampling_session_id = sampling_session_id
        self._base_model = base_model
        self._record_stability_info = record_stability_info
        self._numbers = SamplerNumbers(holder, sampling_session_id, shadow=shadow)
        self._places: asyncio.Semaphore | None = None
        self._paused_until = 0.0
        self._pauses = PauseLog(f"Sampling from {sampling_session_id}")

    @staticmethod
    def create(
        holder: Session,
        *,
        model_path: str | None = None,
        base_model: str | None = None,
        sampling_session_id: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
    ) -> BackcompatSamplingClientFuture[SamplingClient]:
        """Create a sampler, or a client of one that is there.

        Raises:
            ValueError: neither a path, nor a model, nor a sampler was given, or the path is none.
        """
        if model_path is None and base_model is None and sampling_session_id is None:
            raise ValueError("give model_path or base_model")
        if model_path is not None and not model_path.startswith("tinker://"):
            raise ValueError(f"model_path has to begin with tinker://; got {model_path!r}")
        number = holder.next_id("sampler") if sampling_session_id is None else 0

        async def work() -> SamplingClient:
            sampler_id = sampling_session_id
            if sampler_id is None:
                sampler_id = await _create(holder, number, model_path, base_model)
            name = base_model
            if name is None:
                answer = types.GetSamplerResponse
                sampler = await holder.http.call("GET", f"/samplers/{sampler_id}", answer)
                name = sampler.base_model
            return SamplingClient(
                holder,
                sampling_session_id=sampler_id,
                base_model=name,
                record_stability_info=record_stability_info,
            )

        return BackcompatSamplingClientFuture.of(work())

    def sample(
        self,
        prompt: types.ModelInput,
        num_samples: int,
        sampling_params: types.SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: types.TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> APIFuture[types.SampleResponse]:
        """Sample sequences.

        Args:
            prompt: what they continue.
            num_samples: how many.
            sampling_params: temperature, top_k, top_p, seed, stop, max_tokens.
            include_prompt_logprobs: score the prompt's tokens as well.
            topk_prompt_logprobs: how many likeliest tokens at each prompt position.
            topk_sample_logprobs: how many at each sampled position.
            target_prompt_logprobs: int64 [P - 1, K]: ids to score at each position, -1 for none.
            prompt_alt_tokens_k: how many tokens to draw at each prompt position after the first.
            prompt_logprobs_last_n: score only the last n prompt tokens.

        Returns:
            The sequences; a token that stopped one belongs to it.

        Raises:
            ValueError: what is asked for can't be.
            RequestFailedError: the request was wrong; the text says how.
        """
        check_request(
            target_prompt_logprobs,
            prompt_alt_tokens_k,
            prompt_logprobs_last_n,
            include_prompt_logprobs,
        )
        request = self._request(
            prompt,
            num_samples,
            sampling_params,
            prompt_logprobs=include_prompt_logprobs,
            topk_prompt_logprobs=topk_prompt_logprobs,
            topk_sample_logprobs=topk_sample_logprobs,
            target_prompt_logprobs=target_prompt_logprobs,
            prompt_alt_tokens_k=prompt_alt_tokens_k,
            prompt_logprobs_last_n=prompt_logprobs_last_n,
        )
        return ConcurrentAPIFuture.of(self._told(request, self._sample(request)))

    def sample_stream(
        self,
        prompt: types.ModelInput,
        sampling_params: types.SamplingParams,
        num_samples: int = 1,
        topk_sample_logprobs: int = 0,
    ) -> SampleStream:
        """Sample sequences, and read their tokens as they are drawn.

        A lost connection or a restart of the service is a pause in the stream: it goes on with
        the next token. A service that can't stream gives all tokens at the end.

        Args:
            prompt: what the sequences continue.
            sampling_params: temperature, top_k, top_p, seed, stop, max_tokens.
            num_samples: how many.
            topk_sample_logprobs: how many likeliest tokens at each sampled position.

        Returns:
            The tokens, in ``for`` or ``async for``; what `sample` gives is its ``result()``.
        """
        request = self._request(
            prompt, num_samples, sampling_params, topk_sample_logprobs=topk_sample_logprobs
        )
        stream = SampleStream()
        stream.begin(self._told(request, self._stream(request, stream)))
        return stream

    def compute_logprobs(
        self, prompt: types.ModelInput, prompt_logprobs_last_n: int | None = None
    ) -> APIFuture[list[float | None]]:
        """The logprobs of a text's tokens; None for the first."""
        sampled = self.sample(
            prompt,
            1,
            types.SamplingParams(max_tokens=1),
            include_prompt_logprobs=True,
            prompt_logprobs_last_n=prompt_logprobs_last_n,
        )

        async def work() -> list[float | None]:
            return (await sampled).prompt_logprobs or []

        return ConcurrentAPIFuture.of(work())

    sample_async = gives_result(sample)
    compute_logprobs_async = gives_result(compute_logprobs)

    def get_base_model(self) -> str:
        """Name of the base model."""
        return self._base_model

    async def get_base_model_async(self) -> str:
        """`get_base_model`."""
        return self._base_model

    def get_tokenizer(self) -> Any:
        """The base model's tokenizer, from the service or the hub; needs transformers."""
        return load_tokenizer(self.holder.http, self._base_model)

    def get_telemetry(self) -> Telemetry | None:
        """The session's telemetry, once the session is open; None where it is off."""
        return self.holder.telemetry

    # Copies

    def get_sampler_handle(self) -> str:
        """A text from which any process can make a client of this sampler; without the key."""
        state = json.dumps(self._state(), separators=(",", ":"))
        return base64.urlsafe_b64encode(state.encode()).decode()

    @staticmethod
    def from_sampler_handle(handle: str, *, api_key: str | None = None) -> SamplingClient:
        """A client of the sampler behind a handle.

        Args:
            handle: of `get_sampler_handle`.
            api_key: as for `ServiceClient`.

        Raises:
            ValueError: it is no handle.
        """
        try:
            state = json.loads(base64.urlsafe_b64decode(handle))
        except ValueError as error:
            raise ValueError("this is not a sampler's handle") from error
        return _copy(state, api_key)

    def __reduce__(self) -> tuple[Callable[..., SamplingClient], tuple[dict[str, Any], str | None]]:
        return _copy, (self._state(), self.holder.connection.given_key)

    def _state(self) -> dict[str, Any]:
        return {
            "base_url": self.holder.http.base_url,
            "headers": dict(self.holder.connection.headers),
            "session_id": run(self.holder.id()).result(),
            "sampling_session_id": self.sampling_session_id,
            "base_model": self._base_model,
            "record_stability_info": self._record_stability_info,
        }

    # Sampling

    def _request(
        self,
        prompt: types.ModelInput,
        num_samples: int,
        sampling_params: types.SamplingParams,
        **more: Any,
    ) -> types.SampleRequest:
        """A request of this client, with its next number."""
        return types.SampleRequest(
            num_samples=num_samples,
            prompt=prompt,
            sampling_params=sampling_params,
            sampling_session_id=self.sampling_session_id,
            seq_id=self._numbers.next(),
            record_stability_info=self._record_stability_info,
            **more,
        )

    async def _told(
        self, request: types.SampleRequest, work: Coroutine[Any, Any, types.SampleResponse]
    ) -> types.SampleResponse:
        seq_id, sampler_id = request.seq_id or 0, request.sampling_session_id
        return await ops.told(self.holder, "Sample", None, seq_id, work, sampler_id)

    async def _stream(
        self, request: types.SampleRequest, stream: SampleStream
    ) -> types.SampleResponse:
        async with self._place():
            future = await self._submit(request)
            try:
                await stream.follow(self.holder.http, future.request_id)
            except asyncio.CancelledError:
                self._give_up(future.request_id)
                raise
            response = named(future, await self._retrieve(future))
        stream.complete(response)
        return response

    def _place(self) -> asyncio.Semaphore:
        """One of the places for requests that are under way."""
        if self._places is None:
            self._places = asyncio.Semaphore(self.holder.config.sample_max_concurrent_requests)
        return self._places

    async def _sample(self, request: types.SampleRequest) -> types.SampleResponse:
        async with self._place():
            while True:
                future = await self._submit(request)
                try:
                    response = await self._retrieve(future)
                except APIStatusError as error:
                    if error.status_code != _GONE:
                        raise
                    # The service no longer has it: this is a new sample, not a retry.
                    await self.holder.http.wait(_AGAIN_SECONDS)
                    request = request.model_copy(update={"seq_id": self._numbers.next()})
                else:
                    break
        check_response(request, response)
        return named(future, response)

    async def _submit(self, request: types.SampleRequest) -> types.UntypedAPIFuture:
        """Send a sample until the service has a place for it."""
        seq_id = await self._numbers.seq_id(request.seq_id or 0)
        request = request.model_copy(update={"seq_id": seq_id})
        http = self.holder.http
        size = prompt_bytes(request.prompt)
        content = ops.encoded(request)
        async with self.holder.connection.budgets.samples.reserve(size):
            while True:
                while (pause := self._paused_until - http.now()) > 0:
                    await http.wait(pause)
                try:
                    return await ops.submit(
                        self.holder, "/asample", content, _HEADERS, hand_back=_BUSY
                    )
                except RateLimitError:
                    pause = _BUSY_SECONDS if size <= _LARGE_PROMPT_BYTES else _BUSY_SECONDS_LARGE
                    self._paused_until = http.now() + pause

    async def _retrieve(self, future: types.UntypedAPIFuture) -> types.SampleResponse:
        asked = Asked("Sample", monotonic(), self.on_queue_state_change)
        try:
            return await retrieve(
                self.holder.connection, future.request_id, asked, decode_sample_response, None
            )
        except asyncio.CancelledError:
            self._give_up(future.request_id)
            raise

    def _give_up(self, request_id: str) -> None:
        """Have the service stop a sample whose result nobody wants any more."""
        if self.holder.connection.dynamic.sample_cancel_enabled:
            self.holder.in_background(self._cancel(request_id))

    async def _cancel(self, request_id: str) -> None:
        try:
            await self.holder.http.send("POST", "/cancel_future", json={"request_id": request_id})
        except APIError as error:
            _log.debug("sample %s not cancelled: %s", request_id, error)

    def on_queue_state_change(self, queue_state: str, queue_state_reason: str | None) -> None:
        """Say in the log, at most once a minute, that sampling is paused.

        Args:
            queue_state: what the service said while it was asked for a result.
            queue_state_reason: why.
        """
        self._pauses(queue_state, queue_state_reason)


async def _create(
    holder: Session, number: int, model_path: str | None, base_model: str | None
) -> str:
    request = types.CreateSamplingSessionRequest(
        session_id=await holder.id(),
        sampling_session_seq_id=number,
        base_model=base_model,
        model_path=model_path,
    )
    answer = await holder.http.call(
        "POST",
        "/create_sampling_session",
        types.CreateSamplingSessionResponse,
        json=request.model_dump(mode="json", exclude_none=True),
    )
    return answer.sampling_session_id


def _copy(state: dict[str, Any], api_key: str | None) -> SamplingClient:
    connection = Connection(state["base_url"], api_key, state["headers"])
    session = Session.joined(connection, state["session_id"])
    return SamplingClient(
        session,
        sampling_session_id=state["sampling_session_id"],
        base_model=state["base_model"],
        shadow=True,
        record_stability_info=state["record_stability_info"],
    )
