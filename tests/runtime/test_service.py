"""The runtime with real processes: worker death, order and unload."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

import everstep
from tests import processes
from tests.conftest import Service
from tests.scenario import MODEL, connect, data, train

pytestmark = pytest.mark.slow


def worker_of(service: Service) -> int:
    """Process id of a service's worker."""
    pid = processes.worker_of(service.home)
    assert pid is not None, "no worker"
    return pid


@pytest.fixture
def own(tmp_path: Path) -> Any:
    """A service that this test may kill."""
    service = Service(tmp_path / "home")
    yield service
    service.stop()


def test_run_survives_worker_death_with_same_numbers(own: Service) -> None:
    client = connect(everstep, own.url)
    reference = client.create_lora_training_client(MODEL, rank=4, seed=2).result()
    run = client.create_lora_training_client(MODEL, rank=4, seed=2).result()
    expected = train(everstep, reference, 6)
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


def test_worker_ends_with_its_service(tmp_path: Path) -> None:
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


def test_operations_are_executed_in_seq_id_order(service: Service) -> None:
    client = connect(everstep, service.url)
    run = client.create_lora_training_client(MODEL, rank=4, seed=2).result()
    reference = client.create_lora_training_client(MODEL, rank=4, seed=2).result()
    expected = train(everstep, reference, 1)[0][0]
    after = reference.forward(data(everstep), "cross_entropy").result().metrics

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


def test_refused_body_consumes_its_seq_id(service: Service) -> None:
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


def test_unloaded_run_comes_back_exactly(service: Service) -> None:
    client = connect(everstep, service.url)
    reference = client.create_lora_training_client(MODEL, rank=4, seed=2).result()
    run = client.create_lora_training_client(MODEL, rank=4, seed=2).result()
    expected = train(everstep, reference, 4)
    seen = train(everstep, run, 2)
    answer = httpx.post(f"{service.url}/api/v1/unload_model", json={"model_id": run.model_id})
    result = httpx.post(f"{service.url}/api/v1/retrieve_future", json=answer.json()).json()
    assert result["model_id"] == run.model_id
    assert seen + train(everstep, run, 2, shift=2) == expected


def test_finished_session_loses_unnamed_saves_and_keeps_named_ones(
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


def test_second_service_on_same_home_is_refused(service: Service) -> None:
    with pytest.raises(
        RuntimeError, match=f"a service runs on {re.escape(str(service.home))} already: process"
    ):
        Service(service.home)


def test_error_names_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RuntimeError, match="model 'broken' can't be loaded"):
        Service(tmp_path / "home", f"broken={tmp_path / 'empty'}")
