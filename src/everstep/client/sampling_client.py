"""SamplingClient: samples and logprobs from a checkpoint or a base model."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

from everstep.addresses import route
from everstep.client._operations.async_aliases import result_alias
from everstep.client._operations.sample_stream import SampleStream
from everstep.client._operations.sample_validation import check_request
from everstep.client._operations.sampler import Sampler, create_sampler
from everstep.client._transport.futures import (
    APIFuture,
    BackcompatSamplingClientFuture,
    ConcurrentAPIFuture,
)
from everstep.client._transport.futures import submit as run
from everstep.client._transport.session import Connection, Session
from everstep.client._transport.telemetry import Telemetry
from everstep.client._transport.tokenizer import load_tokenizer
from everstep.wire import types
from everstep.wire.messages.tensors import to_tensor


class SamplingClient:
    """One sampler. Can be pickled, or passed on as a handle. Each copy samples independently.

    Args:
        holder: the session.
        sampling_session_id: the sampler's id.
        base_model: its base model.
        shadow: whether this client is a copy.
        retry_config: has no effect. Kept for scripts that pass one.
        record_stability_info: have the service store the data that ``stable_reinforce`` needs.
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
        self._sampler = Sampler(
            holder,
            sampling_session_id,
            base_model,
            shadow=shadow,
            record_stability_info=record_stability_info,
        )

    def __repr__(self) -> str:
        return f"<SamplingClient {self._sampler.id}: {self._sampler.base_model}>"

    @property
    def holder(self) -> Session:
        """The session that the sampler belongs to."""
        return self._sampler.session

    @property
    def sampling_session_id(self) -> str:
        """The sampler's id."""
        return self._sampler.id

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
        """Create a sampler, or a client of an existing one.

        Args:
            holder: the session.
            model_path: checkpoint to sample from, ``tinker://…``.
            base_model: base model to sample from.
            sampling_session_id: id of an existing sampler.
            retry_config: has no effect. Kept for scripts that pass one.
            record_stability_info: see `SamplingClient`.

        Raises:
            ValueError: no path, model or sampler was given, or the path is not a ``tinker://`` one.
        """
        if model_path is None and base_model is None and sampling_session_id is None:
            raise ValueError("give model_path or base_model")
        if model_path is not None and not model_path.startswith("tinker://"):
            raise ValueError(f"model_path has to begin with tinker://; got {model_path!r}")
        seq_id = holder.next_id("sampler") if sampling_session_id is None else 0

        async def work() -> SamplingClient:
            sampler_id = sampling_session_id
            if sampler_id is None:
                sampler_id = await create_sampler(holder, seq_id, model_path, base_model)
            name = base_model
            if name is None:
                answer = types.GetSamplerResponse
                sampler = await holder.http.call("GET", route("samplers", sampler_id), answer)
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
            prompt: the text that the sequences continue.
            num_samples: number of sequences.
            sampling_params: temperature, top_k, top_p, seed, stop, max_tokens.
            include_prompt_logprobs: score the prompt's tokens as well.
            topk_prompt_logprobs: number of likeliest tokens to return at each prompt position.
            topk_sample_logprobs: number of likeliest tokens to return at each sampled position.
            target_prompt_logprobs: int64 [P - 1, K]: ids to score at each position, -1 for none.
            prompt_alt_tokens_k: number of tokens to draw at each prompt position after the first.
            prompt_logprobs_last_n: score only the last n prompt tokens.

        Returns:
            The sequences. A token that stopped a sequence is part of it.

        Raises:
            ValueError: an argument is out of range, or two of them don't go together.
            RequestFailedError: the service rejected the request. The message says why.
        """
        if target_prompt_logprobs is not None:
            target_prompt_logprobs = to_tensor(target_prompt_logprobs)
        check_request(
            target_prompt_logprobs,
            prompt_alt_tokens_k,
            prompt_logprobs_last_n,
            include_prompt_logprobs,
        )
        request = self._sampler.request(
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
        return ConcurrentAPIFuture.of(self._sampler.sample(request, self.on_queue_state_change))

    def sample_stream(
        self,
        prompt: types.ModelInput,
        sampling_params: types.SamplingParams,
        num_samples: int = 1,
        topk_sample_logprobs: int = 0,
    ) -> SampleStream:
        """Sample sequences, and read their tokens as they are drawn.

        The stream survives a lost connection and a restart of the service, and continues with the
        next token. A service that can't stream returns all tokens at the end.

        Args:
            prompt: the text that the sequences continue.
            sampling_params: temperature, top_k, top_p, seed, stop, max_tokens.
            num_samples: number of sequences.
            topk_sample_logprobs: number of likeliest tokens to return at each sampled position.

        Returns:
            The tokens, in ``for`` or ``async for``. Its ``result()`` is the response of `sample`.
        """
        request = self._sampler.request(
            prompt, num_samples, sampling_params, topk_sample_logprobs=topk_sample_logprobs
        )
        stream = SampleStream()
        stream.begin(self._sampler.stream(request, stream, self.on_queue_state_change))
        return stream

    def compute_logprobs(
        self, prompt: types.ModelInput, prompt_logprobs_last_n: int | None = None
    ) -> APIFuture[list[float | None]]:
        """Compute the logprobs of a text's tokens. None for the first."""
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

    sample_async = result_alias(sample)
    compute_logprobs_async = result_alias(compute_logprobs)

    def get_base_model(self) -> str:
        """Return the name of the base model."""
        return self._sampler.base_model

    async def get_base_model_async(self) -> str:
        """Return the name of the base model."""
        return self._sampler.base_model

    def get_tokenizer(self) -> Any:
        """Load the base model's tokenizer from the service or the hub. Needs transformers."""
        return load_tokenizer(self.holder.http, self._sampler.base_model)

    def get_telemetry(self) -> Telemetry | None:
        """Return the session's telemetry, once the session is open, or None if it is off."""
        return self.holder.telemetry

    def on_queue_state_change(self, queue_state: str, queue_state_reason: str | None) -> None:
        """Log, at most once a minute, that sampling is paused.

        Args:
            queue_state: the state that the service reported.
            queue_state_reason: its reason.
        """
        self._sampler.log_pause(queue_state, queue_state_reason)

    # Copies

    def get_sampler_handle(self) -> str:
        """Return a text from which any process can create a client of this sampler.

        The handle doesn't contain the API key.
        """
        state = json.dumps(self._state(), separators=(",", ":"))
        return base64.urlsafe_b64encode(state.encode()).decode()

    @staticmethod
    def from_sampler_handle(handle: str, *, api_key: str | None = None) -> SamplingClient:
        """Create a client of the sampler that a handle names.

        Args:
            handle: of `get_sampler_handle`.
            api_key: as for `ServiceClient`.

        Raises:
            ValueError: the handle can't be decoded.
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
            "base_model": self._sampler.base_model,
            "record_stability_info": self._sampler.record_stability_info,
        }

    def _rebind(self, other: SamplingClient) -> None:
        """Make this a client of another client's sampler. See `TrainingClient`."""
        self._sampler = other._sampler


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
