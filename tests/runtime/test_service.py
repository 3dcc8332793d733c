"""The runtime through real processes: the worker's death, gaps, turns, background saves."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

import everstep
from tests.conftest import Service
from tests.scenario import MODEL, connect, data, train

pytestmark = pytest.mark.slow


def worker_of(service: Service) -> int:
    """Process id of a service's worker."""
    pid = service.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for child in children:
        if b"everstep.runtime.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    raise AssertionError("no worker")


@pytest.fixture
def own(tmp_path: Path) -> Any:
    """A service of the test's own."""
    service = Service(tmp_path / "home")
    yield service
    service.stop()


def test_the_death_of_the_worker_is_survived_and_changes_no_number(own: Service) -> None:
    client = connect(everstep, own.url)
    twin = client.create_lora_training_client(MODEL, rank=4, seed=2).result()
    run = client.create_lora_training_client(MODEL, rank=4, seed=2).result()
    expected = train(everstep, twin, 6)
    seen = train(everstep, run, 2)
    saved = run.save_state("s")
    futures = []
    for step in range(2, 4):
        futures.append(run.forward_backward(data(everstep, shift=step), "cross_entropy"))
        run.optim_step(everstep.AdamParams(learning_rate=0.01, weight_decay=0.1))
    os.kill(worker_of(own), signal.SIGKILL)
    losses = [future.result(60).metrics["loss:sum"] for future in futures]
    assert losses == [loss for loss, _ in expected[2:4]]
    assert saved.result(60).path.endswith("/s")
    assert seen + train(everstep, run, 2, shift=4) == expected[:2] + expected[4:]
    assert httpx.get(f"{own.url}/healthz").json() == {"status": "ok"}


def test_when_the_service_dies_its_worker_ends_too(tmp_path: Path) -> None:
    service = Service(tmp_path / "home")
    worker = worker_of(service)
    service.kill()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        state = Path(f"/proc/{worker}/stat").read_text().rsplit(")", 1)[1].split()[0]
        if state == "Z":
            break
        os.sched_yield()
    else:
        assert not Path(f"/proc/{worker}").exists()


def test_operations_that_arrive_out_of_order_are_executed_in_order(service: Service) -> None:
    client = connect(everstep, service.url)
    run = client.create_lora_training_client(MODEL, rank=4, seed=2).result()
    twin = client.create_lora_training_client(MODEL, rank=4, seed=2).result()
    expected = train(everstep, twin, 1)[0][0]
    after = twin.forward(data(everstep), "cross_entropy").result().metrics

    def send(route: str, seq_id: int, **body: Any) -> str:
        answer = httpx.post(
            f"{service.url}/api/v1/{route}",
            json={"model_id": run.model_id, "seq_id": seq_id, **body},
            timeout=30,
        )
        assert answer.status_code == 200, answer.text
        return str(answer.json()["request_id"])

    batch = {
        "data": [datum.model_dump(mode="json") for datum in data(everstep)],
        "loss_fn": "cross_entropy",
    }
    third = send("forward", 3, forward_input=batch)
    second = send("optim_step", 2, adam_params={"learning_rate": 0.01, "weight_decay": 0.1})
    first = send("forward_backward", 1, forward_backward_input=batch)
    assert send("forward_backward", 1, forward_backward_input=batch) == first, "a retry"
    results = []
    for request_id in (third, second, first):
        answer = httpx.post(
            f"{service.url}/api/v1/retrieve_future", json={"request_id": request_id}, timeout=60
        )
        results.append(answer.json())
    assert results[0]["metrics"] == after
    assert results[2]["metrics"]["loss:sum"] == expected


def test_a_refused_body_takes_its_place_so_that_nothing_waits_for_it(service: Service) -> None:
    client = connect(everstep, service.url)
    run = client.create_lora_training_client(MODEL, rank=4, seed=2).result()
    url = f"{service.url}/api/v1"
    body = {"model_id": run.model_id, "seq_id": 1, "adam_params": {"learning_rate": "fast"}}
    refused = httpx.post(f"{url}/optim_step", json=body).json()["request_id"]
    answer = httpx.post(f"{url}/retrieve_future", json={"request_id": refused}).json()
    assert answer["category"] == "user" and "learning_rate" in answer["error"]
    next_one = {"model_id": run.model_id, "seq_id": 2, "adam_params": {}}
    accepted = httpx.post(f"{url}/optim_step", json=next_one).json()["request_id"]
    done = httpx.post(f"{url}/retrieve_future", json={"request_id": accepted}, timeout=30)
    assert done.json()["metrics"]["optimizer_step"] == 1.0


def test_a_short_operation_does_not_wait_for_a_long_one_of_another_run(service: Service) -> None:
    client = connect(everstep, service.url)
    long_run = client.create_lora_training_client(MODEL, rank=4).result()
    short_run = client.create_lora_training_client(MODEL, rank=4).result()
    tokens = [i % 250 for i in range(1025)]
    datum = everstep.Datum(
        model_input=everstep.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:]},
    )
    long_one = long_run.forward_backward([datum] * 150, "cross_entropy")
    short_ones = [short_run.forward(data(everstep), "cross_entropy") for _ in range(3)]
    for future in short_ones:
        future.result(60)
    assert not long_one.done()
    long_one.result(120)


def test_an_unloaded_run_comes_back_exactly(service: Service) -> None:
    client = connect(everstep, service.url)
    twin = client.create_lora_training_client(MODEL, rank=4, seed=2).result()
    run = client.create_lora_training_client(MODEL, rank=4, seed=2).result()
    expected = train(everstep, twin, 4)
    seen = train(everstep, run, 2)
    answer = httpx.post(f"{service.url}/api/v1/unload_model", json={"model_id": run.model_id})
    result = httpx.post(f"{service.url}/api/v1/retrieve_future", json=answer.json()).json()
    assert result["model_id"] == run.model_id
    assert seen + train(everstep, run, 2, shift=2) == expected


def test_samplers_of_a_finished_session_are_collected_and_named_ones_stay(
    service: Service,
) -> None:
    client = connect(everstep, service.url)
    run = client.create_lora_training_client(MODEL, rank=4).result()
    run.save_weights_and_get_sampling_client().result()
    named = run.save_weights_for_sampler("keep").result().path
    manifests = service.home / "vault" / "manifests" / "sampler" / run.model_id
    assert sorted(p.stem for p in manifests.iterdir()) == ["ephemeral-1", "keep"]
    rest = client.create_rest_client()
    assert [c.tinker_path for c in rest.list_checkpoints(run.model_id).result().checkpoints] == [
        named
    ]
    client.close().result()
    assert [p.stem for p in manifests.iterdir()] == ["keep"]


def test_a_second_service_on_the_same_home_is_refused(service: Service) -> None:
    with pytest.raises(RuntimeError, match="in use by another everstep service"):
        Service(service.home)


def test_a_model_that_cant_be_loaded_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RuntimeError, match="model 'broken' can't be loaded"):
        Service(tmp_path / "home", f"broken={tmp_path / 'empty'}")
