"""Snapshots: taken by what a replay would cost; two that verify are kept; they are whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from everstep.engine import Model
from everstep.engine.environment import environment
from everstep.vault import Manifest, Vault
from tests.runtime.local import Local, batch
from tests.runtime.test_housekeeping import eventually

KIND = "snapshot"


def snapshots(home: Path, run: str) -> list[Manifest]:
    """A run's snapshots, oldest first."""
    vault = Vault(home / "vault", writer=False)
    return sorted(vault.manifests(run, KIND), key=lambda each: each.position)


def newest(home: Path, run: str) -> int:
    """The position of a run's newest snapshot; 0: where it began."""
    return max((each.position for each in snapshots(home, run)), default=0)


def spoil(home: Path, manifest: Manifest) -> None:
    """Flip a bit of a file that only this snapshot has."""
    digest = manifest.files["optimizer.safetensors"].blake3
    path = home / "vault" / "blobs" / digest[:2] / digest
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("steps", [3, 6, 7])
@pytest.mark.parametrize("bound", [3, 9])
def test_recovery_recomputes_no_longer_than_the_setting_says(
    home: Path, pico: Model, bound: int, steps: int
) -> None:
    with Local(home, pico, replay_seconds=bound).killed() as service:
        service.seconds = 1.0
        run, twin = service.new_run(), service.new_run()
        expected = service.train(twin, *range(steps + 1))
        seen = service.train(run, *range(steps))
        since = 2 * steps % (bound + 1)  # the bound is passed by one operation, of a second
        eventually(lambda: newest(home, run) == 2 * steps - since)
    with service.after() as service:
        assert seen + service.train(run, steps) == expected
        applied = [kind for kind, whose in service.finished if whose == run]
    again = sum(kind in ("pass", "optim_step") for kind in applied) - 2
    assert again == since <= bound


def test_two_snapshots_that_verify_are_kept_and_damaged_ones_count_for_nothing(
    home: Path, pico: Model
) -> None:
    with Local(home, pico, replay_seconds=1.5).killed() as service:
        service.seconds = 1.0  # so that there is a snapshot after each step, of two operations
        run, twin = service.new_run(), service.new_run()
        expected = service.train(twin, *range(6))
        seen = []
        for step, kept in enumerate([[2], [2, 4], [4, 6], [4, 6, 8], [4, 6, 8, 10]]):
            seen += service.train(run, step)
            eventually(lambda kept=kept: [s.position for s in snapshots(home, run)] == kept)
            if step >= 2:
                spoil(home, snapshots(home, run)[-1])  # of those after 4 none verifies
    with service.after() as service:
        assert seen + service.train(run, 5) == expected, "back from 4, by replay"


def test_a_snapshot_holds_the_whole_state_and_where_it_was_made(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        service.train(run, 0)
        service.do(run, "forward_backward", forward_backward_input=batch(1))
        service.result(service.post("unload_model", model_id=run)["request_id"])
    (snapshot,) = snapshots(home, run)
    assert (snapshot.step, snapshot.position) == (1, 3)
    assert set(snapshot.files) == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "optimizer.safetensors",
        "gradients.safetensors",
    }
    assert snapshot.environment == {**environment(), "dtype": "float32"}
    assert {"torch", "cpu_capability", "mkldnn", "threads", "device"} <= snapshot.environment.keys()
    assert snapshot.base_fingerprint == pico.info.fingerprint
