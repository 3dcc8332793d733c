"""Training passes: cut into requests, sent in one turn, put together again."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import zstandard

from everstep.client import _operations as ops
from everstep.client._chunks import combine, split
from everstep.client._custom_loss import CustomLoss, custom_loss, forward_data
from everstep.client._futures import APIFuture
from everstep.client._polling import retrieve
from everstep.client._session import Session
from everstep.client.loss_handle import LossHandle
from everstep.wire import types
from everstep.wire.proto import (
    PROTOBUF,
    decode_forward_backward_output,
    encode_forward_backward_request,
)

Chunks = list[list[types.Datum]]
Config = Mapping[str, float | str] | None


class Passes:
    """Sends the passes of one run.

    Args:
        session: the session.
        turns: the run's places.
        model_id: the run.
    """

    def __init__(self, session: Session, turns: ops.Turns, model_id: str) -> None:
        self._session = session
        self._turns = turns
        self._model_id = model_id

    def run(
        self, data: Sequence[types.Datum], loss_fn: str, config: Config, *, forward_only: bool
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """Run a pass with a loss of the service."""
        chunks = self._chunks(data)
        first = self._turns.take(len(chunks))
        work = self._run(chunks, loss_fn, config, first, forward_only)
        return self._told("Forward" if forward_only else "ForwardBackward", first, work)

    def run_custom(
        self, data: Sequence[types.Datum], loss_fn: CustomLoss | LossHandle
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """Run a pass with a loss of the caller; see `TrainingClient.forward_backward_custom`."""
        if isinstance(loss_fn, LossHandle):
            if loss_fn.session_id != self._session.opened:
                raise ValueError(f"loss {loss_fn.name!r} was created in another session")
            loss_fn.check(data)
            if loss_fn.loss_id is not None:
                config = {"loss_id": loss_fn.loss_id}
                return self.run(data, "custom", config, forward_only=False)
        chunks = self._chunks(forward_data(data))
        first = self._turns.take(2 * len(chunks))
        return self._told("ForwardBackward", first, self._run_custom(data, chunks, loss_fn, first))

    async def _run_custom(
        self, data: Sequence[types.Datum], chunks: Chunks, loss_fn: CustomLoss, first: int
    ) -> types.ForwardBackwardOutput:
        second = first + len(chunks)
        try:
            forward = await self._run(chunks, "cross_entropy", None, first, forward_only=True)
            weighted, metrics = await asyncio.to_thread(custom_loss, data, forward, loss_fn)
        except BaseException:
            # The backward's places are taken: what changes nothing goes there, so that later
            # operations don't wait for them.
            await self._run(chunks, "cross_entropy", None, second, forward_only=True)
            raise
        left = iter(weighted)
        again = [[next(left) for _ in chunk] for chunk in chunks]
        backward = await self._run(again, "cross_entropy", None, second, forward_only=False)
        surrogate = backward.metrics["loss:sum"]
        metrics = {**backward.metrics, **metrics, "surrogate_loss:sum": surrogate}
        return types.ForwardBackwardOutput(
            backward.loss_fn_output_type, backward.loss_fn_outputs, metrics
        )

    async def _run(
        self, chunks: Chunks, loss_fn: str, config: Config, first: int, forward_only: bool
    ) -> types.ForwardBackwardOutput:
        """Send the chunks in one turn, the first one last, and put their results together."""
        compressed = self._session.config.proto_compress_fwdbwd
        headers = {"Content-Type": PROTOBUF} | ({"Content-Encoding": "zstd"} if compressed else {})

        async def send(index: int) -> types.UntypedAPIFuture:
            body = types.ForwardBackwardInput.model_validate(
                {"data": chunks[index], "loss_fn": loss_fn, "loss_fn_config": config}
            )
            request = types.ForwardBackwardRequest(
                forward_backward_input=body, model_id=self._model_id, seq_id=first + index
            )
            content = encode_forward_backward_request(request, forward_only=forward_only)
            if compressed:
                content = zstandard.compress(content)
            return await ops.submit(
                self._session, "/forward_backward", content=content, headers=headers
            )

        async def send_all() -> list[types.UntypedAPIFuture]:
            parallel = self._session.config.parallel_fwdbwd_chunks
            return await ops.send_chunks(send, len(chunks), parallel=parallel)

        futures = await ops.in_turn(self._turns, first, len(chunks), send_all)
        decode = decode_forward_backward_output
        results = await asyncio.gather(
            *(retrieve(self._session.http, f.request_id, decode, None) for f in futures)
        )
        return combine(results)

    def _chunks(self, data: Sequence[types.Datum]) -> Chunks:
        config = self._session.config
        return split(data, config.fwdbwd_max_chunk_len, config.fwdbwd_max_chunk_bytes_count)

    def _told(
        self,
        request_type: str,
        first: int,
        work: Coroutine[Any, Any, types.ForwardBackwardOutput],
    ) -> APIFuture[types.ForwardBackwardOutput]:
        told = ops.told(self._session, request_type, self._model_id, first, work)
        return APIFuture.of(told)
