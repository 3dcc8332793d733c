"""Carrying out a plan: samples are accepted like any others, and awaited or followed.

They are cancelled when nobody reads any more.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Request

from everstep.ledger import Operation
from everstep.runtime import OperationFailed, Runtime
from everstep.runtime.text_completions import place
from everstep.server.common import stopping_of
from everstep.server.openai.answers import Form, error_body, usage
from everstep.server.openai.choices import Choice
from everstep.server.openai.plan import Plan
from everstep.wire.errors import ErrorCategory
from everstep.wire.outputs import SampleResponse
from everstep.wire.proto import decode_sample_response
from everstep.wire.streams import DrawnTokens

_DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """Nobody waits for the answer."""


async def accept(runtime: Runtime, plan: Plan, idempotency_key: str | None) -> list[str]:
    """Have a plan's samples accepted; returns their request ids.

    Raises:
        Rejected: a sample can't be taken.
    """
    samples = [
        plan.sample(index, place(idempotency_key, index)) for index in range(len(plan.prompts))
    ]
    return [(await runtime.submit(sample)).request_id for sample in samples]


async def answer(
    runtime: Runtime, request: Request, plan: Plan, form: Form, request_ids: Sequence[str]
) -> dict[str, Any]:
    """The whole answer.

    Raises:
        OperationFailed: a sample failed.
        ClientGone: the client left; the samples are cancelled.
    """
    waiting = asyncio.gather(*(_finished(runtime, each) for each in request_ids))
    leaving = asyncio.ensure_future(_left(request))
    either: list[asyncio.Future[Any]] = [waiting, leaving]
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise ClientGone
        responses = waiting.result()
    finally:
        leaving.cancel()
        if not waiting.done():
            waiting.cancel()
            await _cancel(runtime, request, request_ids)
    choices = []
    for index, response in enumerate(responses):
        for number, sequence in enumerate(response.sequences):
            choice = Choice(index * plan.request.n + number, plan, form)
            if plan.echo:
                choice.push_all(
                    plan.prompts[index], response.prompt_logprobs, response.topk_prompt_logprobs
                )
                choice.begin()
            choice.push_all(sequence.tokens, sequence.logprobs, sequence.topk_logprobs)
            choices.append(choice.whole(sequence.stop_reason))
    return {**form.head(stream=False), "choices": choices, "usage": _usage(plan, responses)}


async def chunks(
    runtime: Runtime, request: Request, plan: Plan, form: Form, request_ids: Sequence[str]
) -> AsyncGenerator[bytes]:
    """The answer as server-sent events. Samples whose reader leaves are cancelled."""
    head = form.head(stream=True)
    responses: list[SampleResponse] = []
    try:
        async with aclosing(_merged(runtime, plan, form, request_ids, responses)) as parts:
            async for choice in parts:
                yield _event({**head, "choices": [choice]})
        if plan.request.wants_usage:
            yield _event({**head, "choices": [], "usage": _usage(plan, responses)})
        yield _DONE
    except OperationFailed as failure:
        yield _event(error_body(status_of(failure), failure.message))
    finally:
        if len(responses) < len(request_ids):
            await asyncio.shield(_cancel(runtime, request, request_ids))


def status_of(failure: OperationFailed) -> int:
    """The HTTP status of a failed sample."""
    return 400 if failure.category == ErrorCategory.USER else 500


async def _merged(
    runtime: Runtime,
    plan: Plan,
    form: Form,
    request_ids: Sequence[str],
    responses: list[SampleResponse],
) -> AsyncGenerator[dict[str, Any]]:
    """The choices' parts of all prompts, as they come; fills ``responses``."""
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
    """The parts of one prompt's choices."""
    n = plan.request.n
    choices = [Choice(index * n + number, plan, form) for number in range(n)]
    for choice in choices:
        if (opening := choice.opening()) is not None:
            yield opening
        if plan.echo:
            choice.push_all(plan.prompts[index], None, None)
            choice.begin()
    ended = False
    async for event in await runtime.follow(request_id):
        if isinstance(event, DrawnTokens):
            for drawn in event.tokens:
                choice = choices[drawn.sequence]
                choice.push(drawn.token, drawn.logprob, drawn.topk_logprobs or ())
                if (part := choice.piece()) is not None:
                    yield part
            continue
        response = _response(event)
        responses.append(response)
        ended = True
        for choice, sequence in zip(choices, response.sequences, strict=True):
            choice.end()
            if (part := choice.piece()) is not None:
                yield part
            yield choice.last(sequence.stop_reason)
    if not ended:
        raise OperationFailed("The service is stopping; try again.", ErrorCategory.SERVER)


async def _finished(runtime: Runtime, request_id: str) -> SampleResponse:
    while (operation := await runtime.wait(request_id, runtime.settings.poll_seconds)) is None:
        continue
    return _response(operation)


def _response(operation: Operation) -> SampleResponse:
    if operation.failure is not None:
        raise OperationFailed(operation.failure.message, ErrorCategory(operation.failure.category))
    return decode_sample_response(operation.result or b"")


async def _left(request: Request) -> None:
    """Return when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def _cancel(runtime: Runtime, request: Request, request_ids: Sequence[str]) -> None:
    """Cancel what nobody reads; what only a stop of the service ends goes on after it."""
    if stopping_of(request).is_set():
        return
    for request_id in request_ids:
        await runtime.sampling.cancel(request_id)


def _usage(plan: Plan, responses: Sequence[SampleResponse]) -> dict[str, int]:
    drawn = sum(len(each.tokens) for response in responses for each in response.sequences)
    return usage(sum(map(len, plan.prompts)), drawn)


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"
