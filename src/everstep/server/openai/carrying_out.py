"""Carrying out a plan: samples are accepted like any others, and awaited or followed.

They are cancelled when nobody reads any more, or one of them failed: except where the request has
an idempotency key, by which the client may ask for them again.
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


async def accept(runtime: Runtime, request: Request, plan: Plan) -> list[str]:
    """Have a plan's samples accepted; returns their request ids.

    Raises:
        Rejected: a sample can't be taken; none of them is drawn then.
        OperationFailed: a sample is wrong; likewise.
    """
    key = _key(request)
    accepted: list[str] = []
    try:
        for index in range(len(plan.prompts)):
            sample = plan.sample(index, place(key, index))
            accepted.append((await runtime.submit(sample)).request_id)
        for request_id in accepted:
            if (ended := await runtime.wait(request_id, 0)) is not None:
                _response(ended)  # raises what is wrong with it, before a stream begins
    except BaseException:
        await _cancel(runtime, request, accepted)
        raise
    return accepted


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
    responses: list[SampleResponse] = []
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise ClientGone
        responses = waiting.result()
    finally:
        leaving.cancel()
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
    """The answer as server-sent events. Samples whose reader leaves are cancelled."""
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
    # The prompt stands in front, and its logprobs are known with the last token.
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
    """Give a choice all of its tokens, and the prompt's where they are echoed."""
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


async def _left(request: Request) -> None:
    """Return when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def _cancel(runtime: Runtime, request: Request, request_ids: Sequence[str]) -> None:
    """Cancel what nobody reads; what only a stop of the service ends goes on after it."""
    if stopping_of(request).is_set() or _key(request) is not None:
        return
    for request_id in request_ids:
        await runtime.sampling.cancel(request_id)


def _key(request: Request) -> str | None:
    """By what the client may send the request again, and get what was drawn for this one."""
    return request.headers.get("idempotency-key")


def _usage(plan: Plan, responses: Sequence[SampleResponse]) -> dict[str, int]:
    drawn = sum(len(each.tokens) for response in responses for each in response.sequences)
    return usage(sum(map(len, plan.prompts)), drawn)


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"
