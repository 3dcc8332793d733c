"""Loss handles: traced, checked, evaluated locally, or uploaded as the official SDK does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tinker.lib.public_interfaces import custom_loss as official

import everstep
from everstep.client._operations.loss_handle import encode, trace
from everstep.types import TensorData
from tests.client.fake_service import GIVE_UP_SECONDS, Answered, FakeService, Reply, logprob

RANKS: dict[str, everstep.types.CustomLossInputRank] = {"logprobs": 1, "advantages": 1}


def weighted(logprobs: Any, advantages: Any) -> Any:
    ratio = torch.clamp(torch.exp(logprobs - logprobs.detach()), 0.8, float("inf"))
    loss = -(ratio * advantages[: logprobs.shape[0]] + 0.5 * logprobs).sum()
    return loss, {"custom/mean:mean": loss * 1.0, "custom/total:sum": logprobs.sum()}


def indexed(logprobs: Any) -> Any:
    loss = -torch.cat((logprobs[1:], logprobs[..., :1]), dim=0).to(dtype=torch.float32).mean()
    return loss, {}


def datum(count: int = 3, **more: Any) -> everstep.Datum:
    inputs = {"target_tokens": list(range(1, count + 1)), "advantages": [0.5] * count, **more}
    return everstep.Datum(
        model_input=everstep.ModelInput.from_ints(list(range(count))), loss_fn_inputs=inputs
    )


@pytest.mark.parametrize(("fn", "ranks"), [(weighted, RANKS), (indexed, {"logprobs": 1})])
def test_encoded_loss_equals_that_of_the_official_sdk(fn: Any, ranks: dict[str, Any]) -> None:
    theirs = official.encode_graph(official.trace_loss(fn, ranks, "session"))
    ours = trace(fn, ranks, "session")
    assert encode(ours).model_dump() == theirs.model_dump()
    assert ours.key == trace(fn, ranks, "another").key


def bad(source: str) -> Callable[..., Any]:
    scope: dict[str, Any] = {"torch": torch, "outside": torch.ones(1), "print": print}
    exec(source, scope)
    return scope["loss"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("source", "ranks", "text"),
    [
        ("def loss(x): return x.sum(), {}", {"x": 1}, "logprobs first"),
        ("def loss(logprobs, *rest): return logprobs.sum(), {}", {"logprobs": 1}, "rest"),
        ("def loss(logprobs, k=1): return logprobs.sum(), {}", {"logprobs": 1}, "k"),
        ("def loss(logprobs, a): return logprobs.sum(), {}", {"logprobs": 1}, "input_ranks"),
        ("def loss(logprobs): return logprobs.sum(), {}", {"logprobs": 0}, "rank 1"),
        ("def loss(logprobs): return logprobs.sum()", {"logprobs": 1}, "return"),
        ("def loss(logprobs): return 1.0, {}", {"logprobs": 1}, "tensor as its loss"),
        ("def loss(logprobs): return logprobs.sum(), []", {"logprobs": 1}, "as a dict"),
        ("def loss(logprobs): return logprobs.sum(), {'m': logprobs}", {"logprobs": 1}, "custom/"),
        (
            "def loss(logprobs): return logprobs.sum(), {'custom/m:sum': 1.0}",
            {"logprobs": 1},
            "not a tensor",
        ),
        ("def loss(logprobs): return logprobs.sum().item(), {}", {"logprobs": 1}, "item"),
        ("def loss(logprobs): return logprobs.nothing(), {}", {"logprobs": 1}, "not a method"),
        (
            "def loss(logprobs):\n  logprobs.sum().backward()\n  return logprobs.sum(), {}",
            {"logprobs": 1},
            "backward",
        ),
        (
            "def loss(logprobs):\n  if logprobs.sum() > 0: return logprobs.sum(), {}\n"
            "  return logprobs.mean(), {}",
            {"logprobs": 1},
            "traced",
        ),
        ("def loss(logprobs): return (logprobs * outside).sum(), {}", {"logprobs": 1}, "outside"),
    ],
)
def test_disallowed_loss_is_rejected(source: str, ranks: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        trace(bad(source), ranks, "session")


def test_disallowed_loss_is_rejected_by_the_call_itself(
    client: everstep.ServiceClient,
) -> None:
    with pytest.raises(ValueError, match="outside"):
        client.create_custom_loss(
            bad("def loss(logprobs): return (logprobs * outside).sum(), {}"), {"logprobs": 1}
        )


def test_local_loss_sends_its_gradient(
    fake: FakeService, client: everstep.ServiceClient, run: everstep.TrainingClient
) -> None:
    handle = client.create_custom_loss(weighted, RANKS).result(GIVE_UP_SECONDS)
    assert handle.loss_id is None
    result = run.forward_backward_custom([datum(3), datum(2)], handle).result(GIVE_UP_SECONDS)
    forward, backward = fake.to("/forward_backward")
    assert forward.body["forward_only"] and not backward.body["forward_only"]
    assert set(forward.body["data"][0]["loss_fn_inputs"]) == {"target_tokens", "weights"}
    # -dC/dlogp = exp(0) * advantage + 0.5
    assert backward.body["data"][0]["loss_fn_inputs"]["weights"] == pytest.approx([1.0] * 3)
    logprobs = [[logprob(token) for token in range(1, n + 1)] for n in (3, 2)]
    losses = [-sum(0.5 + 0.5 * value for value in row) for row in logprobs]
    assert result.metrics["loss:sum"] == pytest.approx(sum(losses))
    assert result.metrics["custom/mean:mean"] == pytest.approx(sum(losses) / 2)
    assert result.metrics["custom/total:sum"] == pytest.approx(sum(map(sum, logprobs)))


def test_server_side_loss_is_uploaded_once_and_named(
    fake: FakeService, client: everstep.ServiceClient, run: everstep.TrainingClient
) -> None:
    events: list[everstep.RequestEvent] = []
    client.holder.hooks = (events.append,)
    client.holder.config.custom_loss_server_side = True
    fake.script("/create_custom_loss", Answered(Reply(200, {"request_id": "loss"})))
    created = {"loss_id": "loss-1", "type": "create_custom_loss"}
    fake.script(
        "/retrieve_future",
        Answered(Reply(200, created)),
        where=lambda request: request.body["request_id"] == "loss",
    )
    handle = client.create_custom_loss(weighted, RANKS).result(GIVE_UP_SECONDS)
    uploaded = fake.to("/create_custom_loss")[0].body
    assert (uploaded["name"], uploaded["custom_loss_seq_id"]) == ("weighted", 0)
    (event,) = events
    assert (event.request_type, event.seq_id, event.polls) == ("CreateCustomLoss", 0, 1)
    run.forward_backward_custom([datum()], handle).result(GIVE_UP_SECONDS)
    (sent,) = fake.to("/forward_backward")
    assert sent.body["loss_fn"] == "custom"
    assert sent.body["loss_fn_config_v2"] == {"loss_id": "loss-1"}


def test_datum_without_an_input_is_rejected_before_sending(
    fake: FakeService, client: everstep.ServiceClient, run: everstep.TrainingClient
) -> None:
    handle = client.create_custom_loss(weighted, RANKS).result(GIVE_UP_SECONDS)
    lacking = everstep.Datum(
        model_input=everstep.ModelInput.from_ints([1]), loss_fn_inputs={"target_tokens": [1]}
    )
    with pytest.raises(ValueError, match="datum 1 has no 'advantages'"):
        run.forward_backward_custom([datum(), lacking], handle)
    flat = datum(advantages=TensorData([1.0, 2.0, 3.0], "float32", [3, 1]))
    with pytest.raises(ValueError, match="rank 2"):
        run.forward_backward_custom([flat], handle)
    stranger = trace(weighted, RANKS, "another session")
    with pytest.raises(ValueError, match="another session"):
        run.forward_backward_custom([datum()], stranger)
    assert fake.to("/forward_backward") == []
    run.forward_backward([datum()], "cross_entropy").result(GIVE_UP_SECONDS)
