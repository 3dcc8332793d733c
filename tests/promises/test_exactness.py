"""P1, P2, P5: exact resume, cold means cold, neighbours don't matter. Real server processes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import everstep
from everstep.vault import Vault
from everstep.wire.paths import parse_path
from tests.conftest import Service
from tests.scenario import MODEL, connect, data, train

pytestmark = pytest.mark.slow
FILES = ("adapter_model.safetensors", "optimizer.safetensors")


def hashes(home: Path, path: str) -> dict[str, str]:
    """SHA-256 over a checkpoint's files, read and verified from the vault."""
    parsed = parse_path(path)
    vault = Vault(home / "vault", writer=False)
    manifest = vault.manifest("training", parsed.run_id, parsed.name)
    return {name: hashlib.sha256(vault.read(manifest, name)).hexdigest() for name in FILES}


def test_p1_restored_with_optimizer_in_a_fresh_process_equals_the_uninterrupted_run(
    tmp_path: Path,
) -> None:
    home = tmp_path / "home"
    first = Service(home)
    service = connect(everstep, first.url)
    run = service.create_lora_training_client(MODEL, rank=8, seed=5).result()
    train(everstep, run, 3)
    run.forward_backward(data(everstep, shift=50), "cross_entropy").result()  # pending at the save
    path = run.save_state("half").result().path
    expected = train(everstep, run, 3, shift=9)
    end = hashes(home, run.save_state("end").result().path)
    assert first.stop() == 0

    second = Service(home)
    try:
        service = connect(everstep, second.url)
        resumed = service.create_training_client_from_state_with_optimizer(path).result()
        assert train(everstep, resumed, 3, shift=9) == expected
        assert hashes(home, resumed.save_state("end").result().path) == end
    finally:
        second.stop()


def test_p2_weights_only_load_equals_a_fresh_run_from_those_weights(service: Service) -> None:
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


def test_p5_a_run_among_others_equals_the_run_alone(service: Service) -> None:
    client = connect(everstep, service.url)

    def fresh() -> everstep.TrainingClient:
        return client.create_lora_training_client(MODEL, rank=8, seed=21).result()

    alone = train(everstep, fresh(), 4)
    among = fresh()
    others = [
        client.create_lora_training_client(MODEL, rank=rank, seed=rank).result()
        for rank in (4, 16, 8)
    ]
    sampler = others[0].save_weights_and_get_sampling_client().result()
    noise = []
    for step in range(6):
        for other in others:
            noise.append(other.forward_backward(data(everstep, 5, step), "cross_entropy"))
            noise.append(other.optim_step(everstep.AdamParams(learning_rate=0.1, weight_decay=0.5)))
        noise.append(
            sampler.sample(
                everstep.ModelInput.from_ints([1, 2, 3]), 5, everstep.SamplingParams(max_tokens=20)
            )
        )
    assert train(everstep, among, 4) == alone
    for future in noise:
        future.result()


def test_a_restart_goes_on_with_runs_checkpoints_and_futures(tmp_path: Path) -> None:
    home = tmp_path / "home"
    first = Service(home)
    client = connect(everstep, first.url)
    twin = client.create_lora_training_client(MODEL, rank=4, seed=2).result()
    run = client.create_lora_training_client(MODEL, rank=4, seed=2).result()
    expected = train(everstep, twin, 4)
    begun = train(everstep, run, 2)
    port = first.url.rsplit(":", 1)[1]
    assert first.stop() == 0

    # The same client goes on with the same run once a service listens there again.
    second = Service(home)
    try:
        moved = second.url
        run.holder.http.base_url = moved
        assert begun + train(everstep, run, 2, shift=2) == expected
        assert port
    finally:
        second.stop()


def test_a_killed_service_goes_on_where_it_was_acknowledged(tmp_path: Path) -> None:
    home = tmp_path / "home"
    first = Service(home)
    client = connect(everstep, first.url)
    twin = client.create_lora_training_client(MODEL, rank=4, seed=2).result()
    run = client.create_lora_training_client(MODEL, rank=4, seed=2).result()
    expected = train(everstep, twin, 4)
    begun = train(everstep, run, 2)
    first.kill()
    second = Service(home)
    try:
        run.holder.http.base_url = second.url
        assert begun + train(everstep, run, 2, shift=2) == expected
    finally:
        second.stop()
