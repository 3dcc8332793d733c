"""P1, P2, P5: exact resume, cold means cold, neighbours don't matter. Real server processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

import everstep
from everstep.vault import Vault
from everstep.wire.paths import parse_path
from tests.conftest import Service
from tests.devices import DEVICES
from tests.scenario import MODEL, connect, data, train

pytestmark = pytest.mark.slow
FILES = ("adapter_model.safetensors", "optimizer.safetensors")


def hashes(home: Path, path: str) -> dict[str, str]:
    """Return the SHA-256 of a checkpoint's files, read and verified from the vault."""
    parsed = parse_path(path)
    vault = Vault(home / "vault", writer=False)
    manifest = vault.manifest("training", parsed.run_id, parsed.name)
    return {name: hashlib.sha256(vault.read(manifest, name)).hexdigest() for name in FILES}


def neighbours(client: Any) -> list[Any]:
    """Start work on other runs and a sampler, and return its futures."""
    others = [
        client.create_lora_training_client(MODEL, rank=rank, seed=rank).result()
        for rank in (4, 16, 8)
    ]
    sampler = others[0].save_weights_and_get_sampling_client().result()
    prompt = everstep.ModelInput.from_ints([1, 2, 3])
    noise = []
    for step in range(6):
        for other in others:
            noise.append(other.forward_backward(data(everstep, 5, step), "cross_entropy"))
            noise.append(other.optim_step(everstep.AdamParams(learning_rate=0.1, weight_decay=0.5)))
        noise.append(sampler.sample(prompt, 5, everstep.SamplingParams(max_tokens=20)))
    return noise


@dataclass(frozen=True)
class Half:
    """State of a service that has stopped, and the service that continues with its home.

    Attributes:
        service: a new process on the home of the first.
        path: checkpoint of a run in the middle of its training, gradients pending.
        expected: results of its next steps, uninterrupted and among others.
        end: its checksums after them.
        untrained: checkpoint of a run without any step, gradients pending.
    """

    service: Service
    path: str
    expected: list[Any]
    end: dict[str, str]
    untrained: str


@pytest.fixture(scope="module", params=DEVICES)
def half(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Half]:
    home = tmp_path_factory.mktemp("half") / "home"
    first = Service(home, device=request.param)
    client = connect(everstep, first.url)
    run = client.create_lora_training_client(MODEL, rank=8, seed=5).result()
    untrained = client.create_lora_training_client(MODEL, rank=8, seed=7).result()
    train(everstep, run, 3)
    for each in (run, untrained):
        each.forward_backward(data(everstep, shift=50), "cross_entropy").result()
    path, start = (each.save_state("half").result().path for each in (run, untrained))
    noise = neighbours(client)
    expected = train(everstep, run, 3, shift=9)
    end = hashes(home, run.save_state("end").result().path)
    for future in noise:
        future.result()
    assert first.stop() == 0
    second = Service(home, device=request.param)
    yield Half(second, path, expected, end, start)
    second.stop()


def test_p1_restore_in_a_new_process_equals_the_uninterrupted_run(
    half: Half,
) -> None:
    client = connect(everstep, half.service.url)
    for noise in ([], neighbours(client)):
        resumed = client.create_training_client_from_state_with_optimizer(half.path).result()
        assert train(everstep, resumed, 3, shift=9) == half.expected
        assert hashes(half.service.home, resumed.save_state("end").result().path) == half.end
        for future in noise:
            future.result()


def test_p2_weights_only_load_in_a_new_process_equals_a_new_run(half: Half) -> None:
    client = connect(everstep, half.service.url)
    new = client.create_lora_training_client(MODEL, rank=8, seed=7).result()
    expected = train(everstep, new, 3)
    end = hashes(half.service.home, new.save_state("end").result().path)
    noise = neighbours(client)
    cold = client.create_training_client_from_state(half.untrained).result()
    other = client.create_lora_training_client(MODEL, rank=8, seed=6).result()
    train(everstep, other, 2)  # moments, steps and pending gradients: none may remain
    other.forward_backward(data(everstep, shift=50), "cross_entropy").result()
    other.load_state(half.untrained).result()
    for each in (cold, other):
        assert train(everstep, each, 3) == expected
        assert hashes(half.service.home, each.save_state("end").result().path) == end
    for future in noise:
        future.result()


def test_p2_weights_only_load_equals_a_new_run_from_those_weights(service: Service) -> None:
    client = connect(everstep, service.url)
    run = client.create_lora_training_client(MODEL, rank=8, seed=5).result()
    train(everstep, run, 3)
    path = run.save_state("p2").result().path
    warm = train(everstep, run, 3, shift=4)
    fresh = client.create_training_client_from_state(path).result()
    cold = train(everstep, fresh, 3, shift=4)
    run.forward_backward(data(everstep, shift=77), "cross_entropy").result()  # must not leak in
    run.load_state(path).result()
    assert train(everstep, run, 3, shift=4) == cold
    assert cold != warm
    assert cold[0] == warm[0], "the first losses come from the same weights"
    ends = [hashes(service.home, c.save_state("end").result().path) for c in (run, fresh)]
    assert ends[0] == ends[1]


def test_p5_run_among_others_equals_the_run_alone(service: Service) -> None:
    client = connect(everstep, service.url)

    def fresh() -> everstep.TrainingClient:
        run: everstep.TrainingClient = client.create_lora_training_client(
            MODEL, rank=8, seed=21
        ).result()
        return run

    alone = train(everstep, fresh(), 4)
    among = fresh()
    noise = neighbours(client)
    assert train(everstep, among, 4) == alone
    for future in noise:
        future.result()


def test_restart_keeps_runs_checkpoints_and_futures(tmp_path: Path) -> None:
    home = tmp_path / "home"
    first = Service(home)
    client = connect(everstep, first.url)
    reference = client.create_lora_training_client(MODEL, rank=4, seed=2).result()
    run = client.create_lora_training_client(MODEL, rank=4, seed=2).result()
    expected = train(everstep, reference, 4)
    begun = train(everstep, run, 2)
    saved = run.save_state("s").result().path
    waits = client.create_lora_training_client(MODEL, rank=4, seed=2).result()
    sent = {
        "model_id": waits.model_id,
        "seq_id": 1,
        "forward_input": {
            "data": [datum.model_dump(mode="json") for datum in data(everstep)],
            "loss_fn": "cross_entropy",
        },
    }
    future = httpx.post(f"{first.url}/api/v1/forward", json=sent).json()
    assert first.stop() == 0

    second = Service(home)
    try:
        # The same client continues the same run on the new process.
        run.holder.http.base_url = second.url
        while (answer := _poll(second.url, future)).status_code == 408:
            pass
        assert answer.json()["metrics"]["loss:sum"] == expected[0][0]
        assert httpx.post(f"{second.url}/api/v1/forward", json=sent).json() == future, "a retry"
        listed = client.create_rest_client().list_checkpoints(run.model_id).result().checkpoints
        assert [each.tinker_path for each in listed] == [saved]
        assert begun + train(everstep, run, 2, shift=2) == expected
    finally:
        second.stop()


def _poll(url: str, future: Any) -> httpx.Response:
    body = {"request_id": future["request_id"]}
    return httpx.post(f"{url}/api/v1/retrieve_future", json=body, timeout=60)


def test_killed_service_continues_after_the_last_acknowledged_operation(tmp_path: Path) -> None:
    home = tmp_path / "home"
    first = Service(home)
    client = connect(everstep, first.url)
    reference = client.create_lora_training_client(MODEL, rank=4, seed=2).result()
    run = client.create_lora_training_client(MODEL, rank=4, seed=2).result()
    expected = train(everstep, reference, 4)
    begun = train(everstep, run, 2)
    first.kill()
    second = Service(home)
    try:
        run.holder.http.base_url = second.url
        assert begun + train(everstep, run, 2, shift=2) == expected
    finally:
        second.stop()
