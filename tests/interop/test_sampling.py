"""Sampling with the unmodified official client, on real server processes."""

from __future__ import annotations

import asyncio
import pickle
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker

import everstep
from tests.conftest import Service
from tests.faults.keeper import Keeper
from tests.interop.sdks import Releases
from tests.scenario import MODEL, connect, train

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
PROMPT = tinker.ModelInput.from_ints([5, 6, 7, 8, 9])
PARAMS = tinker.SamplingParams(max_tokens=6, seed=3, stop=[])
ENDLESS = tinker.SamplingParams(max_tokens=2000, seed=1, stop=[])


def tokens(response: Any) -> list[list[int]]:
    return [list(sequence.tokens) for sequence in response.sequences]


@pytest.fixture(scope="module")
def client(service: Service) -> Any:
    return connect(tinker, service.url)


@pytest.fixture
def sampler(client: Any) -> Any:
    return client.create_sampling_client(base_model=MODEL).result()


def test_client_polls_for_all_samples_at_once_joins_and_cancels(client: Any, sampler: Any) -> None:
    config = client.holder.get_client_config()
    assert config.sample_use_retrieve_futures
    assert config.sample_join_sampling_session
    assert client.holder._client_dynamic_config.sample_cancel_enabled
    expected = tokens(sampler.sample(PROMPT, 2, PARAMS).result())
    assert sampler._futures_poller is not None
    assert sampler._futures_poller._cursor == 1
    copies = [pickle.loads(pickle.dumps(sampler)) for _ in range(2)]
    for copy in copies:
        assert tokens(copy.sample(PROMPT, 2, PARAMS).result()) == expected
    assert sorted(copy._cloned_sampler_id for copy in copies) == [1, 2]


def test_cancelled_sample_stops(sampler: Any) -> None:
    async def cancel() -> None:
        long = asyncio.ensure_future(
            asyncio.wrap_future(sampler.sample(PROMPT, 8, ENDLESS).future())
        )
        await asyncio.wrap_future(sampler.sample(PROMPT, 1, PARAMS).future())
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long

    asyncio.run(cancel())
    assert len(tokens(sampler.sample(PROMPT, 1, PARAMS).result())[0]) == 6


def test_inflight_samplers_follow_later_saves(client: Any) -> None:
    run = client.create_lora_training_client(MODEL, rank=4, seed=3).result()
    first = run.save_weights_and_get_sampling_client(kind="inflight").result()
    fixed = run.save_weights_and_get_sampling_client().result()
    params = tinker.SamplingParams(max_tokens=20, seed=3, stop=[])
    old = tokens(first.sample(PROMPT, 1, params).result())
    train(tinker, run, 3)
    second = run.save_weights_and_get_sampling_client(kind="inflight").result()
    new = tokens(second.sample(PROMPT, 1, params).result())
    assert new != old
    assert tokens(first.sample(PROMPT, 1, params).result()) == new
    assert tokens(fixed.sample(PROMPT, 1, params).result()) == old


@pytest.mark.parametrize("sdk", [everstep, tinker], ids=["ours", "official"])
def test_burst_above_the_inflight_limit_survives_a_kill(sdk: Any, tmp_path: Path) -> None:
    with Keeper(tmp_path / "home", "max_inflight_samples=64") as keeper:
        client = connect(sdk, keeper.url)
        sampler = client.create_sampling_client(base_model=MODEL).result()
        prompt = sdk.ModelInput.from_ints([5, 6, 7, 8, 9])
        params = sdk.SamplingParams(max_tokens=6, seed=3, stop=[])
        expected = tokens(sampler.sample(prompt, 1, params).result())
        burst = [sampler.sample(prompt, 1, params) for _ in range(300)]
        assert tokens(burst[0].result(120)) == expected
        keeper.kill()
        assert [tokens(each.result(300)) for each in burst] == [expected] * 300
        client.close("success").result()


@pytest.mark.parametrize("version", ["0.34.0", "0.38.0"])
def test_releases_that_poll_and_cancel_do_so(
    version: str, service: Service, releases: Releases
) -> None:
    report = releases.run(version, "tests.interop.polling_program:main", url=service.url)
    assert report["polls"]
    assert report["numbers"] == [1, 2]
    assert report["same"] == [True, True, True]


def test_config_enables_polling_and_cancelling_for_releases_that_can(service: Service) -> None:
    for version, enabled in (("0.30.4", False), ("0.34.0", True), ("", False), ("newest", False)):
        body = {"sdk_version": version}
        config = httpx.post(f"{service.url}/api/v1/client/config", json=body).json()
        dynamic = httpx.post(f"{service.url}/api/v1/client/dynamic_config", json=body).json()
        assert config["sample_use_retrieve_futures"] is enabled
        assert config["sample_join_sampling_session"] is enabled
        assert dynamic["sample_cancel_enabled"] is enabled
