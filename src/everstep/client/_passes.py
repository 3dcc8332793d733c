"""Training passes: cut into requests, sent in one turn, put together again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import monotonic

import zstandard

from everstep.client import _operations as ops
from everstep.client._chunks import combine, datum_bytes, split
from everstep.client._custom_loss import CustomLoss, custom_loss, forward_data
from everstep.client._errors import TinkerError
from everstep.client._futures import APIFuture
from everstep.client._polling import Asked, retrieve
from everstep.client._queue import QueueObserver
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


@dataclass(frozen=True)
class _Part:
    """One request of a pass, ready to be sent, and its size before compression."""

    content: bytes
    size: int


class Passes:
    """Sends the passes of one run.

    Args:
        session: the session.
        turns: the run's places.
        model_id: the run.
        observer: is told when the service lets them wait.
    """

    def __init__(
        self, session: Session, turns: ops.Turns, model_id: str, observer: QueueObserver
    ) -> None:
        self._session = session
        self._turns = turns
        self._model_id = model_id
        self._observer = observer

    def run(
        self, data: Sequence[types.Datum], loss_fn: str, config: Config, *, forward_only: bool
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """Run a pass with a loss of the service."""
        asked = self._asked("Forward" if forward_only else "ForwardBackward")
        chunks = self._chunks(data)
        first, parts = self._turns.place(
            lambda first: self._encode(chunks, loss_fn, config, first, forward_only=forward_only),
            len(chunks),
        )
        work = self._run(parts, first, asked)
        told = ops.told(self._session, asked.request_type, self._model_id, first, work)
        return APIFuture.of(told)

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
        first, parts = self._turns.place(
            lambda first: self._forward(chunks, first), 2 * len(chunks)
        )
        work = self._run_custom(data, chunks, parts, loss_fn, first)
        told = ops.told(self._session, "ForwardBackward", self._model_id, first, work)
        return APIFuture.of(told)

    async def _run_custom(
        self,
        data: Sequence[types.Datum],
        chunks: Chunks,
        parts: Sequence[_Part],
        loss_fn: CustomLoss,
        first: int,
    ) -> types.ForwardBackwardOutput:
        second = first + len(chunks)
        try:
            forward = await self._run(parts, first, self._asked("Forward"))
            weighted, metrics = await asyncio.to_thread(custom_loss, data, forward, loss_fn)
            left = iter(weighted)
            again = [[next(left) for _ in chunk] for chunk in chunks]
            parts = self._encode(again, "cross_entropy", None, second, forward_only=False)
        except BaseException:
            # The backward's places are taken: what changes nothing goes there, so that later
            # operations don't wait for them. The error that is told is the loss's.
            with contextlib.suppress(TinkerError):
                await self._send(self._forward(chunks, second), second)
            raise
        backward = await self._run(parts, second, self._asked("ForwardBackward"))
        surrogate = backward.metrics["loss:sum"]
        metrics = {**backward.metrics, **metrics, "surrogate_loss:sum": surrogate}
        return types.ForwardBackwardOutput(
            backward.loss_fn_output_type, backward.loss_fn_outputs, metrics
        )

    def _forward(self, chunks: Chunks, first: int) -> list[_Part]:
        return self._encode(chunks, "cross_entropy", None, first, forward_only=True)

    def _encode(
        self, chunks: Chunks, loss_fn: str, config: Config, first: int, *, forward_only: bool
    ) -> list[_Part]:
        """A request for each chunk.

        Raises:
            ValueError: one can't be sent.
        """
        parts = []
        for seq_id, chunk in enumerate(chunks, start=first):
            body = types.ForwardBackwardInput.model_validate(
                {"data": chunk, "loss_fn": loss_fn, "loss_fn_config": config}
            )
            request = types.ForwardBackwardRequest(
                forward_backward_input=body, model_id=self._model_id, seq_id=seq_id
            )
            content = encode_forward_backward_request(request, forward_only=forward_only)
            if self._session.config.proto_compress_fwdbwd:
                content = zstandard.compress(content)
            parts.append(_Part(content, sum(datum_bytes(datum) for datum in chunk)))
        return parts

    async def _run(
        self, parts: Sequence[_Part], first: int, asked: Asked
    ) -> types.ForwardBackwardOutput:
        """Send the parts and put their results together."""
        futures = await self._send(parts, first)
        decode = decode_forward_backward_output
        connection = self._session.connection
        results = await asyncio.gather(
            *(retrieve(connection, f.request_id, asked, decode, None) for f in futures)
        )
        return combine(results)

    async def _send(self, parts: Sequence[_Part], first: int) -> list[types.UntypedAPIFuture]:
        """Send the parts in one turn, the first one last."""
        config = self._session.config
        headers = {"Content-Type": PROTOBUF}
        if config.proto_compress_fwdbwd:
            headers["Content-Encoding"] = "zstd"

        async def send(index: int) -> types.UntypedAPIFuture:
            part = parts[index]
            async with self._session.connection.budgets.passes.reserve(part.size):
                return await ops.submit(self._session, "/forward_backward", part.content, headers)

        async def send_all() -> list[types.UntypedAPIFuture]:
            return await ops.send_chunks(send, len(parts), parallel=config.parallel_fwdbwd_chunks)

        return await ops.in_turn(self._turns, first, len(parts), send_all)

    def _chunks(self, data: Sequence[types.Datum]) -> Chunks:
        config = self._session.config
        return split(data, config.fwdbwd_max_chunk_len, config.fwdbwd_max_chunk_bytes_count)

    def _asked(self, request_type: str) -> Asked:
        return Asked(request_type, monotonic(), self._observer)
