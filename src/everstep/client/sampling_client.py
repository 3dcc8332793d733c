"""SamplingClient: samples and logprobs from a checkpoint or a base model."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from typing import Any

from everstep.client import _operations as ops
from everstep.client._errors import RateLimitError
from everstep.client._futures import APIFuture, ClientFuture
from everstep.client._polling import retrieve
from everstep.client._session import Session
from everstep.wire import types
from everstep.wire.proto import decode_sample_response

_BUSY_SECONDS = 1.0


class SamplingClient:
    """One sampler.

    Attributes:
        sampling_session_id: the sampler's id.
    """

    def __init__(self, session: Session, sampling_session_id: str, base_model: str) -> None:
        self.sampling_session_id = sampling_session_id
        self._session = session
        self._base_model = base_model
        self._numbers = itertools.count()

    @classmethod
    def create(
        cls, session: Session, *, model_path: str | None = None, base_model: str | None = None
    ) -> ClientFuture[SamplingClient]:
        """Create a sampler.

        Raises:
            ValueError: neither a path nor a model was given, or the path is none.
        """
        if model_path is None and base_model is None:
            raise ValueError("give model_path or base_model")
        if model_path is not None and not model_path.startswith("tinker://"):
            raise ValueError(f"model_path has to begin with tinker://; got {model_path!r}")
        number = session.next_id("sampler")

        async def work() -> SamplingClient:
            request = types.CreateSamplingSessionRequest(
                session_id=await session.id(),
                sampling_session_seq_id=number,
                base_model=base_model,
                model_path=model_path,
            )
            answer = await session.http.call(
                "POST",
                "/create_sampling_session",
                types.CreateSamplingSessionResponse,
                json=request.model_dump(mode="json", exclude_none=True),
            )
            sampler_id = answer.sampling_session_id
            name = base_model
            if name is None:
                sampler = await session.http.call(
                    "GET", f"/samplers/{sampler_id}", types.GetSamplerResponse
                )
                name = sampler.base_model
            return cls(session, sampler_id, name)

        return ClientFuture.of(work())

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
            RequestFailedError: the request was wrong; the text says how.
        """
        seq_id = next(self._numbers)
        request = types.SampleRequest(
            num_samples=num_samples,
            prompt=prompt,
            sampling_params=sampling_params,
            sampling_session_id=self.sampling_session_id,
            seq_id=seq_id,
            prompt_logprobs=include_prompt_logprobs,
            topk_prompt_logprobs=topk_prompt_logprobs,
            topk_sample_logprobs=topk_sample_logprobs,
            target_prompt_logprobs=target_prompt_logprobs,
            prompt_alt_tokens_k=prompt_alt_tokens_k,
            prompt_logprobs_last_n=prompt_logprobs_last_n,
        )
        return APIFuture.of(ops.told(self._session, "Sample", None, seq_id, self._sample(request)))

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

        return APIFuture.of(work())

    async def sample_async(self, *args: Any, **kw: Any) -> types.SampleResponse:
        """`sample`; gives the result itself."""
        return await self.sample(*args, **kw)

    async def compute_logprobs_async(self, *args: Any, **kw: Any) -> list[float | None]:
        """`compute_logprobs`; gives the result itself."""
        return await self.compute_logprobs(*args, **kw)

    def get_base_model(self) -> str:
        """Name of the base model."""
        return self._base_model

    def get_tokenizer(self) -> Any:
        """The base model's tokenizer, from the hub or a directory of its name."""
        return ops.tokenizer(self._base_model)

    async def _sample(self, request: types.SampleRequest) -> types.SampleResponse:
        while True:
            try:
                future = await ops.submit(self._session, "/asample", body=request)
                break
            except RateLimitError:
                await asyncio.sleep(_BUSY_SECONDS)
        response = await retrieve(
            self._session.http, future.request_id, decode_sample_response, None
        )
        ids = future.sample_sequence_ids or [""] * len(response.sequences)
        named = [
            replace(sequence, sequence_id=name)
            for sequence, name in zip(response.sequences, ids, strict=True)
        ]
        return replace(response, sequences=named)
