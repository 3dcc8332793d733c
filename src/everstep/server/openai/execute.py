"""Completion execution: accepts a plan's samples and awaits or streams their results.

The samples are cancelled when the client disconnects or one of them fails, unless the request has
an idempotency key, with which the client may request them again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Request

from everstep.ledger import Operation
from everstep.logs import get_logger
from everstep.runtime import OperationFailed, Runtime
from everstep.runtime.sampling.openai import sample_seq_id
from everstep.server.errors import UNEXPECTED, openai_error
from everstep.server.openai.choices import Choice
from everstep.server.openai.plan import Plan
from everstep.server.openai.responses import Form, usage
from everstep.server.requests import stopping_of
from everstep.wire.codecs.proto import decode_sample_response
from everstep.wire.errors import ErrorCategory
from everstep.wire.messages.outputs import SampleResponse
from everstep.wire.messages.streams import DrawnTokens

_log = get_logger("everstep.server")
_DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client has disconnected."""


async def accept(runtime: Runtime, request: Request, plan: Plan) -> list[str]:
    """Accept a plan's samples and return their request ids. On an error none of them is drawn.

    Raises:
        Rejected: a sample can't be accepted.
        OperationFailed: a sample is invalid.
    """
    key = _key(request)
    accepted: list[str] = []
    try:
        for index in range(len(plan.prompts)):
            sample = plan.sample(index, sample_seq_id(key, index))
            accepted.append((await runtime.submit(sample)).request_id)
        for request_id in accepted:
            if (ended := await runtime.wait(request_id, 0)) is not None:
                _response(ended)  # raises an invalid sample's failure, before a stream begins
    except BaseException:
        await _cancel(runtime, request, accepted)
        raise
    return accepted


async def answer(
    runtime: Runtime, request: Request, plan: Plan, form: Form, request_ids: Sequence[str]
) -> dict[str, Any]:
    """Wait for the samples and return the whole answer.

    Raises:
        OperationFailed: a sample failed.
        ClientGone: the client disconnected, and the samples are cancelled.
    """
    waiting = asyncio.gather(*(_finished(runtime, each) for each in request_ids))
    disconnecting = asyncio.ensure_future(_disconnected(request))
    either: list[asyncio.Future[Any]] = [waiting, disconnecting]
    responses: list[SampleResponse] = []
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise ClientGone
        responses = waiting.result()
    finally:
        disconnecting.cancel()
        if not responses:
            waiting.cancel()
            await _cancel(runtime, request, request_ids)
    choices = []
    for index, response in enumerate(responses):
        for number, sequence in enumerate(response.sequences):
            choice = Choice(index * plan.request.n + number, plan, form)
            _fill(choice, plan, index, response, number)
            choices.append(choice.whole(sequence.stop_reason))
    return {**form.head(stream=False), "choices": choices, "usage": _usage(plan, responses)}


async def chunks(
    runtime: Runtime, request: Request, plan: Plan, form: Form, request_ids: Sequence[str]
) -> AsyncGenerator[bytes]:
    """Stream the answer as server-sent events. A disconnect cancels the samples."""
    head = form.head(stream=True)
    if plan.request.wants_usage:
        head["usage"] = None  # in all but the last
    responses: list[SampleResponse] = []
    try:
        async with aclosing(_merged(runtime, plan, form, request_ids, responses)) as parts:
            async for choice in parts:
                yield _event({**head, "choices": [choice]})
        if plan.request.wants_usage:
            yield _event({**head, "choices": [], "usage": _usage(plan, responses)})
        yield _DONE
    except OperationFailed as failure:
        yield _event(openai_error(status_of(failure), failure.message))
    except Exception as error:  # noqa: BLE001  the status is sent: only an event can report it
        _log.error("completion stream failed", error=repr(error), exc_info=error)
        yield _event(openai_error(500, UNEXPECTED))
    finally:
        if len(responses) < len(request_ids):
            await asyncio.shield(_cancel(runtime, request, request_ids))


def status_of(failure: OperationFailed) -> int:
    """Return the HTTP status of a failed sample."""
    return 400 if failure.category == ErrorCategory.USER else 500


async def _merged(
    runtime: Runtime,
    plan: Plan,
    form: Form,
    request_ids: Sequence[str],
    responses: list[SampleResponse],
) -> AsyncGenerator[dict[str, Any]]:
    """Yield the choices' parts of all prompts as they arrive, and fill ``responses``."""
    parts: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    async def follow(index: int, request_id: str) -> None:
        try:
            async with aclosing(_parts(runtime, plan, form, index, request_id, responses)) as own:
                async for part in own:
                    parts.put_nowait(part)
        finally:
            parts.put_nowait(None)

    tasks = [asyncio.create_task(follow(*each)) for each in enumerate(request_ids)]
    try:
        running = len(tasks)
        while running:
            part = await parts.get()
            if part is None:
                running -= 1
            else:
                yield part
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _parts(
    runtime: Runtime,
    plan: Plan,
    form: Form,
    index: int,
    request_id: str,
    responses: list[SampleResponse],
) -> AsyncGenerator[dict[str, Any]]:
    """Yield the parts of one prompt's choices."""
    n = plan.request.n
    choices = [Choice(index * n + number, plan, form) for number in range(n)]
    # The prompt comes first, and its logprobs are known with the last token.
    at_the_end = plan.echo and plan.top is not None
    for choice in choices:
        if (opening := choice.opening()) is not None:
            yield opening
        if plan.echo and not at_the_end:
            choice.push_all(plan.prompts[index], None, None)
            choice.begin()
    ended = False
    async for event in await runtime.follow(request_id):
        if isinstance(event, DrawnTokens):
            for drawn in () if at_the_end else event.tokens:
                choice = choices[drawn.sequence]
                choice.push(drawn.token, drawn.logprob, drawn.topk_logprobs or ())
                if (part := choice.piece()) is not None:
                    yield part
            continue
        response = _response(event)
        responses.append(response)
        ended = True
        for number, (choice, sequence) in enumerate(zip(choices, response.sequences, strict=True)):
            if at_the_end:
                _fill(choice, plan, index, response, number)
            choice.end()
            if (part := choice.piece()) is not None:
                yield part
            yield choice.last(sequence.stop_reason)
    if not ended:
        raise OperationFailed("The service is stopping; try again.", ErrorCategory.SERVER)


def _fill(choice: Choice, plan: Plan, index: int, response: SampleResponse, number: int) -> None:
    """Add all tokens to a choice, and the prompt's where it is echoed."""
    if plan.echo:
        scores = response.prompt_logprobs, response.topk_prompt_logprobs
        choice.push_all(plan.prompts[index], *scores)
        choice.begin()
    sequence = response.sequences[number]
    choice.push_all(sequence.tokens, sequence.logprobs, sequence.topk_logprobs)


async def _finished(runtime: Runtime, request_id: str) -> SampleResponse:
    while (operation := await runtime.wait(request_id, runtime.settings.poll_seconds)) is None:
        continue
    return _response(operation)


def _response(operation: Operation) -> SampleResponse:
    if operation.failure is not None:
        raise OperationFailed(operation.failure.message, ErrorCategory(operation.failure.category))
    return decode_sample_response(operation.result or b"")


async def _disconnected(request: Request) -> None:
    """Return when the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def _cancel(runtime: Runtime, request: Request, request_ids: Sequence[str]) -> None:
    """Cancel samples that nobody reads. Samples that a stop interrupts continue after it."""
    if stopping_of(request).is_set() or _key(request) is not None:
        return
    for request_id in request_ids:
        await runtime.sampling.cancel(request_id)


def _key(request: Request) -> str | None:
    """Return the key with which the client may repeat the request and get the same samples."""
    return request.headers.get("idempotency-key")


def _usage(plan: Plan, responses: Sequence[SampleResponse]) -> dict[str, int]:
    drawn = sum(len(each.tokens) for response in responses for each in response.sequences)
    return usage(sum(map(len, plan.prompts)), drawn)


def _event(content: dict[str, Any]) -> bytes:
    return (
        b"data: " + json.dumps(content, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"
    )
