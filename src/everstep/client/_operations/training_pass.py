"""Training passes: split into chunks, sent as one operation, and combined again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any

import zstandard

from everstep.client._operations import submit as ops
from everstep.client._operations.chunking import combine, datum_bytes, split
from everstep.client._operations.custom_loss import CustomLoss, custom_loss, forward_data
from everstep.client._operations.loss_handle import LossHandle
from everstep.client._transport.errors import TinkerError
from everstep.client._transport.futures import APIFuture
from everstep.client._transport.long_poll import RequestInfo, retrieve
from everstep.client._transport.queue_state import QueueObserver
from everstep.client._transport.session import Session
from everstep.wire import types
from everstep.wire.base import convert
from everstep.wire.codecs import PROTOBUF

Chunks = list[list["types.Datum"]]
Config = Mapping[str, float | str] | None
Metrics = dict[str, float]


@dataclass(frozen=True)
class _Part:
    """One encoded request of a pass, and its size in bytes before compression."""

    content: bytes
    size: int


class TrainingPasses:
    """Sends the training passes of one run.

    Args:
        session: the session.
        queue: the run's submit queue.
        model_id: the run.
    """

    def __init__(self, session: Session, queue: ops.SubmitQueue, model_id: str) -> None:
        self._session = session
        self._queue = queue
        self._model_id = model_id

    def run(
        self,
        data: Sequence[types.Datum],
        loss_fn: str,
        config: Config,
        observer: QueueObserver,
        *,
        forward_only: bool,
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """Run a pass with one of the service's losses.

        Args:
            data: the examples.
            loss_fn: name of the loss.
            config: the loss's settings.
            observer: called when the service pauses the operation.
            forward_only: compute no gradients.
        """
        request_info = _info("Forward" if forward_only else "ForwardBackward", observer)
        chunks = self._chunks(as_datums(data))
        first, parts = self._queue.claim(
            lambda first: self._encode(chunks, loss_fn, config, first, forward_only=forward_only),
            len(chunks),
        )
        return self._report(request_info, first, self._run(parts, first, request_info))

    def run_custom(
        self,
        data: Sequence[types.Datum],
        loss_fn: CustomLoss | LossHandle,
        observer: QueueObserver,
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """Run a pass with the caller's loss. See `TrainingClient.forward_backward_custom`."""
        if isinstance(loss_fn, LossHandle):
            if loss_fn.session_id != self._session.opened:
                raise ValueError(f"loss {loss_fn.name!r} was created in another session")
            data = as_datums(data)
            loss_fn.check(data)
            if loss_fn.loss_id is not None:
                config = {"loss_id": loss_fn.loss_id}
                return self.run(data, "custom", config, observer, forward_only=False)
        datums = as_datums(data)
        chunks = self._chunks(forward_data(datums))
        first, parts = self._queue.claim(
            lambda first: self._forward(chunks, first), 2 * len(chunks)
        )
        evaluate = partial(custom_loss, datums, loss_fn=loss_fn, given=data)
        work = self._run_custom(evaluate, chunks, parts, first, observer)
        return self._report(_info("ForwardBackward", observer), first, work)

    def _report(
        self,
        request_info: RequestInfo,
        seq_id: int,
        work: Coroutine[Any, Any, types.ForwardBackwardOutput],
    ) -> APIFuture[types.ForwardBackwardOutput]:
        request_type = request_info.request_type
        return APIFuture.of(ops.reported(self._session, request_type, self._model_id, seq_id, work))

    async def _run_custom(
        self,
        evaluate: Callable[[types.ForwardBackwardOutput], tuple[list[types.Datum], Metrics]],
        chunks: Chunks,
        parts: Sequence[_Part],
        first: int,
        observer: QueueObserver,
    ) -> types.ForwardBackwardOutput:
        second = first + len(chunks)
        try:
            forward = await self._run(parts, first, _info("Forward", observer))
            weighted, metrics = await asyncio.to_thread(evaluate, forward)
            remaining = iter(weighted)
            weighted_chunks = [[next(remaining) for _ in chunk] for chunk in chunks]
            parts = self._encode(weighted_chunks, "cross_entropy", None, second, forward_only=False)
        except BaseException:
            # The backward's sequence ids are claimed. Passes without gradients use them up, so
            # that later operations don't wait for them. The loss's error is the one to raise.
            with contextlib.suppress(TinkerError):
                await self._send(self._forward(chunks, second), second)
            raise
        backward = await self._run(parts, second, _info("ForwardBackward", observer))
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
        """Encode a request for each chunk.

        Raises:
            ValueError: a request can't be encoded.
        """
        from everstep.wire.codecs.proto import encode_forward_backward_request

        parts = []
        for seq_id, chunk in enumerate(chunks, start=first):
            body = types.ForwardBackwardInput.model_validate(
                {
                    "data": chunk,
                    "loss_fn": loss_fn,
                    "loss_fn_config": None if config is None else dict(config),
                }
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
        self, parts: Sequence[_Part], first: int, request_info: RequestInfo
    ) -> types.ForwardBackwardOutput:
        """Send the requests and combine their results."""
        from everstep.wire.codecs.proto import decode_forward_backward_output as decode

        futures = await self._send(parts, first)
        connection = self._session.connection
        results = [
            retrieve(connection, each.request_id, request_info, decode, None, each.following)
            for each in futures
        ]
        return combine([await results[0]] if len(results) == 1 else await asyncio.gather(*results))

    async def _send(self, parts: Sequence[_Part], first: int) -> list[ops.Accepted]:
        """Send the requests as one entry of the queue. See `submit.send_chunks`."""
        config = self._session.config
        headers = {"Content-Type": PROTOBUF}
        if config.proto_compress_fwdbwd:
            headers["Content-Encoding"] = "zstd"

        async def send(index: int) -> ops.Accepted:
            part = parts[index]
            async with self._session.connection.budgets.passes.reserve(part.size):
                return await ops.submit_followed(
                    self._session, "/forward_backward", part.content, headers
                )

        async def send_all() -> list[ops.Accepted]:
            return await ops.send_chunks(send, len(parts), parallel=config.parallel_fwdbwd_chunks)

        return await self._queue.send(first, len(parts), send_all)

    def _chunks(self, data: Sequence[types.Datum]) -> Chunks:
        config = self._session.config
        return split(data, config.fwdbwd_max_chunk_len, config.fwdbwd_max_chunk_bytes_count)


def as_datums(data: Iterable[Any]) -> list[types.Datum]:
    """Return a caller's examples as datums, whoever's class they are.

    Raises:
        TypeError: one is no datum.
        ValueError: one has a field with a wrong value. The text names it.
    """
    return [convert(types.Datum, each, f"data[{index}]") for index, each in enumerate(data)]


def _info(request_type: str, observer: QueueObserver) -> RequestInfo:
    return RequestInfo(request_type, monotonic(), observer)
