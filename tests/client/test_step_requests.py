"""What a step costs on the wire: requests and bytes, which no clock disturbs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import tinker

import everstep
from tests.client.fake_service import GIVE_UP_SECONDS, MODEL, FakeService, Recorded
from tests.scenario import connect, disconnect

STEPS = 5
TOKENS = 64
SUBMITS, POLL = ("/forward_backward", "/optim_step"), "/retrieve_future"


def train(sdk: Any, service: FakeService, *, awaited: bool) -> list[Recorded]:
    """Train, and return the requests of the steps."""
    client = connect(sdk, service.url)
    try:
        run = client.create_lora_training_client(MODEL, rank=4).result(GIVE_UP_SECONDS)
        before = len(service.requests)
        data = [
            sdk.Datum(
                model_input=sdk.ModelInput.from_ints(list(range(TOKENS))),
                loss_fn_inputs={"target_tokens": list(range(TOKENS)), "weights": [1.0] * TOKENS},
            )
        ]
        futures = []
        for _ in range(STEPS):
            futures += [run.forward_backward(data, "cross_entropy")]
            futures += [run.optim_step(sdk.AdamParams(learning_rate=0.1))]
            if awaited:
                for future in futures:
                    future.result(GIVE_UP_SECONDS)
        for future in futures:
            future.result(GIVE_UP_SECONDS)
    finally:
        disconnect(service.url)
    return [each for each in service.requests[before:] if each.path in (*SUBMITS, POLL)]


@pytest.mark.parametrize("awaited", [True, False], ids=["awaited", "queued"])
@pytest.mark.parametrize(("sdk", "most"), [(everstep, 3_130), (tinker, 4_400)])
def test_step_is_two_submits_and_two_polls(
    fake: FakeService, sdk: Any, most: int, awaited: bool
) -> None:
    requests = train(sdk, fake, awaited=awaited)
    paths = Counter(each.path for each in requests)
    assert paths == {**dict.fromkeys(SUBMITS, STEPS), POLL: 2 * STEPS}
    assert 0 < sum(each.size for each in requests) <= most * STEPS
