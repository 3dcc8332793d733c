"""Copies of sampling clients in other processes: pickled, or by a handle."""

from __future__ import annotations

import base64
import json
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest

import everstep
from tests.client.fake_service import GIVE_UP_SECONDS, MODEL, Answered, FakeService, Reply

PROMPT = everstep.ModelInput.from_ints([1, 2, 3])
PARAMS = everstep.SamplingParams(max_tokens=3)
BLOCK = 1_000_000_000


def sampler(client: everstep.ServiceClient) -> everstep.SamplingClient:
    return client.create_sampling_client(base_model=MODEL).result(GIVE_UP_SECONDS)


def sample(client: everstep.SamplingClient) -> list[int]:
    answer = client.sample(PROMPT, 1, PARAMS).result(GIVE_UP_SECONDS)
    return list(answer.sequences[0].tokens)


def sent_seq_ids(fake: FakeService) -> list[int]:
    return [request.seq_id or 0 for request in fake.to("/asample")]


def test_pickled_client_samples_in_another_process(
    fake: FakeService, client: everstep.ServiceClient
) -> None:
    original = sampler(client)
    assert sample(original) == [0, 1, 2]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(sample, original).result(60) == [0, 1, 2]
    mine, theirs = sent_seq_ids(fake)
    assert mine == 0
    assert theirs >= BLOCK, "a copy counts in its own block"
    assert {request.body["sampling_session_id"] for request in fake.to("/asample")} == {
        original.sampling_session_id
    }


def test_copies_use_distinct_sequence_ids(
    fake: FakeService, client: everstep.ServiceClient
) -> None:
    original = sampler(client)
    copies = [pickle.loads(pickle.dumps(original)) for _ in range(3)]
    for copy in copies:
        sample(copy)
        sample(copy)
    assert len(set(sent_seq_ids(fake))) == 6
    assert len({number // BLOCK for number in sent_seq_ids(fake)}) == 3


def test_copy_asks_for_a_block_if_the_service_assigns_them(
    fake: FakeService, client: everstep.ServiceClient
) -> None:
    fake.config = {"sample_join_sampling_session": True}
    fake.script("/join_sampling_session", Answered(Reply(200, {"client_counter": 7})))
    copy = pickle.loads(pickle.dumps(sampler(client)))
    sample(copy)
    sample(copy)
    assert sent_seq_ids(fake) == [7 * BLOCK, 7 * BLOCK + 1]


def test_handle_does_not_contain_the_key(fake: FakeService, client: everstep.ServiceClient) -> None:
    handle = sampler(client).get_sampler_handle()
    assert "tml-test" not in json.dumps(json.loads(base64.urlsafe_b64decode(handle)))
    copy = everstep.SamplingClient.from_sampler_handle(handle, api_key="tml-other")
    assert copy.get_base_model() == MODEL
    assert sample(copy) == [0, 1, 2]
    assert fake.to("/asample")[-1].headers["x-api-key"] == "tml-other"


def test_invalid_handle_is_rejected() -> None:
    with pytest.raises(ValueError, match="not a sampler's handle"):
        everstep.SamplingClient.from_sampler_handle("bm90IGpzb24=")


def test_cancelled_sample_is_cancelled_at_the_service(
    fake: FakeService, client: everstep.ServiceClient
) -> None:
    flags = {"sample_cancel_enabled": True, "refresh_interval_sec": 300}
    fake.script("/client/dynamic_config", Answered(Reply(200, flags)))
    again = {"type": "try_again", "request_id": "request-0", "queue_state": "active"}
    fake.script("/retrieve_future", *[Answered(Reply(408, again))] * 1000)
    future = sampler(client).sample(PROMPT, 1, PARAMS)
    fake.arrived("/retrieve_future")
    assert future.future().cancel()
    cancelled = fake.arrived("/cancel_future")
    assert cancelled[0].body == {"request_id": "request-0"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"prompt_logprobs_last_n": 2}, "include_prompt_logprobs"),
        ({"prompt_logprobs_last_n": 0, "include_prompt_logprobs": True}, "1 or greater"),
        ({"prompt_alt_tokens_k": -1}, "0 or greater"),
        (
            {"target_prompt_logprobs": everstep.TensorData([1.0, 2.0], "float32", [2])},
            "int64 tensor",
        ),
    ],
)
def test_invalid_sample_arguments_are_rejected_before_sending(
    fake: FakeService, client: everstep.ServiceClient, arguments: dict[str, object], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        sampler(client).sample(PROMPT, 1, PARAMS, **arguments)  # type: ignore[arg-type]
    assert fake.to("/asample") == []


def test_response_that_ignores_an_argument_raises(
    client: everstep.ServiceClient,
) -> None:
    with pytest.raises(RuntimeError, match="prompt_alt_tokens"):
        sampler(client).sample(PROMPT, 1, PARAMS, prompt_alt_tokens_k=2).result(GIVE_UP_SECONDS)
    scored = sampler(client).compute_logprobs(PROMPT, prompt_logprobs_last_n=1)
    with pytest.raises(RuntimeError, match="prompt_logprobs_last_n"):
        scored.result(GIVE_UP_SECONDS)
