"""`sample_stream`: a sample's tokens as they are drawn, through failures of the service."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import everstep
from tests.client.fake_service import GIVE_UP_SECONDS, MODEL, FakeService
from tests.conftest import Service
from tests.faults.keeper import Keeper
from tests.scenario import MODEL as PICO
from tests.scenario import connect

PROMPT = everstep.ModelInput.from_ints([5, 6, 7, 8])
LENGTH = 40
PARAMS = everstep.SamplingParams(max_tokens=LENGTH, seed=9, stop=[])


def sequences(tokens: list[Any], count: int) -> list[list[tuple[int, float]]]:
    found: list[list[tuple[int, float]]] = [[] for _ in range(count)]
    for each in tokens:
        assert each.position == len(found[each.sequence])
        found[each.sequence].append((each.token, each.logprob))
    return found


def held(response: everstep.types.SampleResponse) -> list[list[tuple[int, float]]]:
    return [list(zip(s.tokens, s.logprobs or [], strict=True)) for s in response.sequences]


@pytest.mark.slow
def test_streamed_tokens_equal_the_samples_tokens(service: Service) -> None:
    client = connect(everstep, service.url)
    sampler = client.create_sampling_client(base_model=PICO).result()
    whole = sampler.sample(PROMPT, 3, PARAMS, topk_sample_logprobs=2).result()
    stream = sampler.sample_stream(PROMPT, PARAMS, 3, topk_sample_logprobs=2)
    tokens = list(stream)
    assert sequences(tokens, 3) == held(whole) == held(stream.result())
    assert [t.topk_logprobs for t in tokens if t.sequence == 0] == whole.sequences[0].topk_logprobs
    assert list(stream) == [], "the stream has ended"

    async def read() -> list[Any]:
        return [token async for token in sampler.sample_stream(PROMPT, PARAMS, 3)]

    assert sequences(asyncio.run(read()), 3) == held(whole)
    wrong = sampler.sample_stream(PROMPT, everstep.SamplingParams(max_tokens=9999))
    with pytest.raises(everstep.RequestFailedError, match="exceeds the model's context window"):
        list(wrong)
    client.close().result()


@pytest.mark.slow
def test_stream_survives_a_killed_service(tmp_path: Path) -> None:
    with Keeper(tmp_path / "home") as keeper:
        client = connect(everstep, keeper.url)
        sampler = client.create_sampling_client(base_model=PICO).result()
        params = everstep.SamplingParams(max_tokens=400, seed=9, stop=[])
        whole = held(sampler.sample(PROMPT, 1, params).result())
        stream = sampler.sample_stream(PROMPT, params)
        tokens = [next(stream) for _ in range(5)]
        keeper.kill()
        tokens += [next(stream) for _ in range(5)]
        keeper.kill_worker()
        tokens += list(stream)
        assert sequences(tokens, 1) == whole
        client.close().result()


def test_stream_of_a_service_without_streams_ends_with_all_tokens(
    client: everstep.ServiceClient, fake: FakeService
) -> None:
    sampler = client.create_sampling_client(base_model=MODEL).result(GIVE_UP_SECONDS)
    stream = sampler.sample_stream(PROMPT, PARAMS)
    assert sequences(list(stream), 1) == held(stream.result())
