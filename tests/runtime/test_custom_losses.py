"""Custom losses: durable, part of a session, and replayed with their passes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

import everstep
from everstep.client._operations.loss_handle import encode, trace
from everstep.engine import Model
from everstep.ledger import Ledger, NewOperation
from everstep.runtime import ids
from everstep.runtime.payloads import payload_json
from tests.runtime.local import Local
from tests.scenario import data


def weighted(logprobs: Any, weights: Any) -> Any:
    loss = -(torch.sigmoid(logprobs) * weights).sum()
    return loss, {"custom/weight:mean": weights.mean(), "custom/tokens:sum": weights.sum()}


def body(fn: Any = weighted) -> dict[str, Any]:
    handle = trace(fn, {"logprobs": 1, "weights": 1}, "session")
    return {
        "name": handle.name,
        "inputs": [item.model_dump() for item in handle.inputs],
        "graph": encode(handle).model_dump(mode="json"),
    }


def create(service: Local, number: int = 0, **changes: Any) -> str:
    """Send a loss; returns the request's id."""
    sent = {"session_id": service.session(), "custom_loss_seq_id": number, **body(), **changes}
    answer = service.post("create_custom_loss", **sent)
    assert answer.get("model_id") is None
    return str(answer["request_id"])


def datums(shift: int = 0) -> list[dict[str, Any]]:
    return [each.model_dump(mode="json") for each in data(everstep, 2, shift)]


def use(service: Local, run: str, loss_id: Any, shift: int = 0) -> Any:
    """A pass that uses a loss, and its result."""
    config = {"loss_id": loss_id}
    sent = {"data": datums(shift), "loss_fn": "custom", "loss_fn_config": config}
    return service.do(run, "forward_backward", forward_backward_input=sent)


STEP = {"adam_params": {"learning_rate": 0.01, "weight_decay": 0.1}}


def test_loss_is_created_once_and_used(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run, reference = service.new_run(), service.new_run()
        first = create(service)
        assert create(service) == first, "a retry"
        created = service.result(first)
        assert created == {
            "loss_id": f"{service.session()}:loss:0",
            "type": "create_custom_loss",
        }
        result = use(service, run, created["loss_id"])
        weights = [w for each in datums() for w in each["loss_fn_inputs"]["weights"]["data"]]
        assert result["metrics"]["custom/tokens:sum"] == sum(weights)
        assert result["metrics"]["loss:sum"] < 0
        assert len(result["loss_fn_outputs"]) == 2
        assert use(service, reference, created["loss_id"]) == result
        other = body(lambda logprobs, weights: (-(logprobs * weights).sum(), {}))
        status, text = service.refused(
            "create_custom_loss", session_id=service.session(), custom_loss_seq_id=0, **other
        )
        assert (status, "used before" in text) == (400, True)


def test_runs_with_custom_losses_replay_exactly(home: Path, pico: Model) -> None:
    def rounds(service: Local, run: str, loss_id: str, *shifts: int) -> list[Any]:
        return [
            each
            for shift in shifts
            for each in (use(service, run, loss_id, shift), service.do(run, "optim_step", **STEP))
        ]

    with Local(home, pico) as service:
        run, reference = service.new_run(), service.new_run()
        request_id = create(service)
        loss_id = service.result(request_id)["loss_id"]
        expected = rounds(service, reference, loss_id, 0, 1, 2)
        seen = rounds(service, run, loss_id, 0, 1)
    with service.after() as service:
        assert service.result(request_id)["loss_id"] == loss_id, "futures outlive the service"
        assert create(service) == request_id, "and so do retries"
        assert seen + rounds(service, run, loss_id, 2) == expected


def test_accepted_loss_is_created_after_restart(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        session = service.session()

    async def accept() -> str:
        ledger = await Ledger.open(home / "ledger.sqlite")
        scope = ids.loss_scope(session)
        payload = payload_json(body())
        new = NewOperation(scope, 0, ids.CREATE_CUSTOM_LOSS, payload, None, session)
        operation, _ = await ledger.accept(new)
        await ledger.close()
        return operation.request_id

    request_id = asyncio.run(accept())
    with service.after() as service:
        loss_id = service.result(request_id)["loss_id"]
        use(service, service.new_run(), loss_id)


def test_invalid_graph_fails_and_cannot_be_used(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run, reference = service.new_run(), service.new_run()
        graph = body()["graph"]
        graph["nodes"][2]["target"] = "os.system"
        failure = service.result(create(service, graph=graph))
        assert failure["category"] == "user"
        assert "'os.system' may not be called" in failure["error"]
        answer = use(service, run, f"{service.session()}:loss:0")
        assert (answer["category"], "was not created" in answer["error"]) == ("user", True)
        assert service.train(run, 0) == service.train(reference, 0), "and left no gradient"
        loss_id = service.result(create(service, 1))["loss_id"]
        assert "metrics" in use(service, run, loss_id)


def test_loss_that_exhausts_memory_fails_alone(home: Path, pico: Model) -> None:
    huge = body()
    call: dict[str, Any] = {"op": "call_function", "kwargs": {}}
    made = {**call, "name": "huge", "target": "torch.ones"}
    total = {**call, "op": "call_method", "name": "total", "target": "sum"}
    added = {**call, "name": "added", "target": "operator.add"}
    *nodes, output = huge["graph"]["nodes"]
    (result,) = output["args"]
    (loss, metrics) = result["tuple"]
    nodes += [
        {**made, "args": [[10**6, 10**6]]},
        {**total, "args": [{"ref": "huge"}]},
        {**added, "args": [loss, {"ref": "total"}]},
        {**output, "args": [{"tuple": [{"ref": "added"}, metrics]}]},
    ]
    huge["graph"] = {"format": 1, "nodes": nodes}
    with Local(home, pico) as service:
        run, reference = service.new_run(), service.new_run()
        loss_id = service.result(create(service, **huge))["loss_id"]
        answer = use(service, run, loss_id)
        assert answer["category"] == "user"
        assert "takes too much for one datum: at node 'huge'" in answer["error"]
        assert service.train(run, 0) == service.train(reference, 0)


@pytest.mark.parametrize(
    "loss_id",
    [
        *("", "x", "other:loss:0", "{session}:loss:7", "{session}:loss:-1", "{session}:loss:²"),
        *("{session}:train:0", "{session}:loss:" + "9" * 50, 3.0),
    ],
)
def test_unknown_loss_fails_the_pass(home: Path, pico: Model, loss_id: Any) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        create(service)
        named = loss_id.format(session=service.session()) if isinstance(loss_id, str) else loss_id
        answer = use(service, run, named)
        assert answer["category"] == "user"
        assert "loss_id" in answer["error"] or "does not exist in this run's" in answer["error"]
        service.train(run, 0)


def test_loss_belongs_to_its_session(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        loss_id = service.result(create(service))["loss_id"]
        service._session, service._runs = None, 0
        run = service.new_run()
        assert "does not exist in this run's session" in use(service, run, loss_id)["error"]


def test_client_cannot_send_a_graph_in_a_pass(home: Path, pico: Model) -> None:
    """A pass carries the stored graph, never one from the request."""
    with Local(home, pico) as service:
        run = service.new_run()
        loss_id = service.result(create(service))["loss_id"]
        config = {"loss_id": loss_id, "program": "{}"}
        sent = {"data": datums(), "loss_fn": "custom", "loss_fn_config": config}
        answer = service.do(run, "forward_backward", forward_backward_input=sent)
        assert "and nothing else" in answer["error"]


def test_loss_needs_an_open_session(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        sent = {"custom_loss_seq_id": 0, **body()}
        assert service.refused("create_custom_loss", session_id="nobody", **sent)[0] == 404
        for bad in ({"custom_loss_seq_id": -1}, {"graph": {"format": 2, "nodes": []}}):
            wrong = {"session_id": service.session(), **sent, **bad}
            assert service.refused("create_custom_loss", **wrong)[0] == 400
        first = create(service)
        service.post(f"sessions/{service.session()}/finish")
        assert create(service) == first, "a retry may come late"
        late = {**sent, "session_id": service.session(), "custom_loss_seq_id": 1}
        status, text = service.refused("create_custom_loss", **late)
        assert (status, "is finished" in text) == (400, True)
