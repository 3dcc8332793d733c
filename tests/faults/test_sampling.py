"""Samples on a service that is killed: cancelled ones stay cancelled, others complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from everstep import failpoints
from tests.faults.keeper import Keeper
from tests.scenario import MODEL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def post(keeper: Keeper, route: str, **body: Any) -> Any:
    answer = httpx.post(f"{keeper.url}/api/v1/{route}", json=body, timeout=60)
    assert answer.status_code < 300, answer.text
    return answer.json() if answer.content else None


def sample(keeper: Keeper, sampler: str, seq_id: int, length: int) -> str:
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]}
    params = {"max_tokens": length, "seed": 1, "stop": []}
    body = {"prompt": prompt, "sampling_params": params, "seq_id": seq_id}
    return str(post(keeper, "asample", sampling_session_id=sampler, **body)["request_id"])


def result(keeper: Keeper, request_id: str) -> Any:
    """Poll for a result, also while the service is down."""

    def found() -> Any:
        try:
            body = {"request_id": request_id}
            answer = httpx.post(f"{keeper.url}/api/v1/retrieve_future", json=body, timeout=60)
        except httpx.TransportError:
            return None
        return answer.json() if answer.status_code == 200 else None

    return keeper.wait_until(found)


def test_sample_stays_cancelled_after_a_kill_during_its_cancellation(tmp_path: Path) -> None:
    def arming(start: int) -> dict[str, str]:
        return {failpoints.VARIABLE: "runtime.sample.cancelled=kill"} if start == 0 else {}

    with Keeper(tmp_path / "home", environment=arming) as keeper:
        keeper.wait_ready()
        session = post(keeper, "create_session")["session_id"]
        body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL}
        sampler = post(keeper, "create_sampling_session", **body)["sampling_session_id"]
        expected = result(keeper, sample(keeper, sampler, 0, 5))
        cancelled, kept = sample(keeper, sampler, 1, 2000), sample(keeper, sampler, 2, 5)
        with pytest.raises(httpx.TransportError):
            post(keeper, "cancel_future", request_id=cancelled)
        keeper.wait_until(lambda: keeper.starts > 1)
        assert result(keeper, cancelled)["error"] == "This sample was cancelled by its client."
        keeper.wait_ready()
        post(keeper, "cancel_future", request_id=cancelled)
        assert result(keeper, kept) == expected
        assert sample(keeper, sampler, 1, 2000) == cancelled
