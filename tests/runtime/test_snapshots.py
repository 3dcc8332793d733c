"""Snapshots: taken by the cost of replay. Two that verify are kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from everstep.engine import Model
from everstep.engine.environment import environment
from everstep.vault import Manifest, Vault
from everstep.vault.integrity import is_sound
from everstep.vault.storage.keys import blob_key
from everstep.vault.storage.local import LocalStorage
from tests.runtime.local import Local, batch
from tests.waiting import eventually

KIND = "snapshot"


def snapshots(home: Path, run: str) -> list[Manifest]:
    """A run's snapshots, oldest first."""
    vault = Vault(home / "vault", writer=False)
    return sorted(vault.manifests(run, KIND), key=lambda each: each.position)


def newest(home: Path, run: str) -> int:
    """The position of a run's newest snapshot, or 0 for its creation."""
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
def test_recovery_replays_no_more_than_replay_seconds(
    home: Path, tmp_path: Path, pico: Model, bound: int, steps: int
) -> None:
    with Local(tmp_path / "uninterrupted", pico) as other:
        expected = other.train(other.new_run(), *range(steps + 1))
    with Local(home, pico, replay_seconds=bound).killed() as service:
        service.seconds = 1.0
        run = service.new_run()
        seen = []
        for step in range(steps):
            seen += service.train(run, step)
            since = 2 * (step + 1) % (bound + 1)  # one operation, of a second, exceeds the bound
            position = 2 * (step + 1) - since
            eventually(
                f"a snapshot at {position}",
                lambda position=position: newest(home, run) == position,
            )
    with service.after() as service:
        assert seen + service.train(run, steps) == expected
        applied = [kind for kind, whose in service.finished if whose == run]
    again = sum(kind in ("pass", "optim_step") for kind in applied) - 2
    assert again == since <= bound


def test_two_verified_snapshots_are_kept_and_damaged_ones_not_counted(
    home: Path, tmp_path: Path, pico: Model
) -> None:
    with Local(tmp_path / "uninterrupted", pico) as other:  # another run would share the budget
        expected = other.train(other.new_run(), *range(6))
    with Local(home, pico, replay_seconds=1.5).killed() as service:
        service.seconds = 1.0  # so that there is a snapshot after each step, of two operations
        run = service.new_run()
        seen = []
        for step, kept in enumerate([[2], [2, 4], [4, 6], [4, 6, 8], [4, 6, 8, 10]]):
            seen += service.train(run, step)
            eventually(
                f"the snapshots {kept}",
                lambda kept=kept: [s.position for s in snapshots(home, run)] == kept,
            )
            if step >= 2:
                spoil(home, snapshots(home, run)[-1])  # of those after 4 none verifies
    with service.after() as service:
        assert seen + service.train(run, 5) == expected, "back from 4, by replay"


def test_snapshot_holds_whole_state_and_environment(home: Path, pico: Model) -> None:
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
    assert snapshot.environment == {**environment(), **pico.info.environment()}
    assert {"torch", "cpu_capability", "mkldnn", "threads", "device"} <= snapshot.environment.keys()
    assert snapshot.base_fingerprint == pico.info.fingerprint


def blobs(home: Path) -> dict[str, int]:
    """The vault's files and their inodes: a file that is written again gets another."""
    found = (home / "vault" / "blobs").rglob("*")
    return {path.name: path.stat().st_ino for path in found if path.is_file()}


def trained_and_saved(service: Local) -> tuple[str, str]:
    """A run that was trained for a step and saved with pending gradients, and the path."""
    run = service.new_run()
    service.train(run, 0)
    service.do(run, "forward_backward", forward_backward_input=batch(1))
    return run, str(service.do(run, "save_weights", path="x")["path"])


def test_snapshot_after_a_load_names_the_checkpoints_files(home: Path, pico: Model) -> None:
    with Local(home, pico).killed() as service:
        run, path = trained_and_saved(service)
        saved = Vault(home / "vault", writer=False).manifest("training", run, "x")
        service.train(run, 1)
        before = blobs(home)
        service.do(run, "load_weights", path=path, optimizer=True)
        (snapshot,) = snapshots(home, run)
        assert snapshot.files == saved.files
        assert len(snapshot.files) == 4
        assert blobs(home) == before, "no file was written, nor written again"


def test_snapshot_after_a_load_of_weights_names_the_adapter(home: Path, pico: Model) -> None:
    with Local(home, pico).killed() as service:
        run, path = trained_and_saved(service)
        saved = Vault(home / "vault", writer=False).manifest("training", run, "x")
        before = blobs(home)
        service.do(run, "load_weights", path=path, optimizer=False)
        (snapshot,) = snapshots(home, run)
        name = "adapter_model.safetensors"
        assert snapshot.files[name] == saved.files[name]
        assert blobs(home)[saved.files[name].blake3] == before[saved.files[name].blake3]
        assert snapshot.zero_moments and "optimizer.safetensors" not in snapshot.files
        assert blobs(home).keys() == before.keys(), "no zeros were written"


@pytest.mark.parametrize("after", ["a load of weights", "a creation"])
def test_run_whose_moments_are_zero_comes_back_from_a_snapshot_without_them(
    home: Path, tmp_path: Path, pico: Model, after: str
) -> None:
    def begin(service: Local) -> str:
        run, path = trained_and_saved(service)
        if after == "a creation":
            run = service.new_run(seed=7)
        else:
            service.do(run, "load_weights", path=path, optimizer=False)
        service.do(run, "forward_backward", forward_backward_input=batch(2))
        return run

    with Local(tmp_path / "uninterrupted", pico) as other:
        uninterrupted = begin(other)
        expected = other.train(uninterrupted, 3, 4)
        other.do(uninterrupted, "save_weights", path="end")
    with Local(home, pico) as service:
        run = begin(service)
    snapshot = snapshots(home, run)[-1]
    assert snapshot.zero_moments and snapshot.step == 0
    assert set(snapshot.files) == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "gradients.safetensors",
    }
    with service.after() as service:
        assert service.train(run, 3, 4) == expected
        service.do(run, "save_weights", path="end")
    assert not snapshots(home, run)[-1].zero_moments
    ends = [
        Vault(each / "vault", writer=False).manifest("training", name, "end")
        for each, name in ((tmp_path / "uninterrupted", uninterrupted), (home, run))
    ]
    assert ends[0].files == ends[1].files


def test_snapshot_after_a_changed_load_holds_the_changed_state(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run, path = trained_and_saved(service)
        service.do(run, "load_weights", path=path, optimizer=True)
        expected = service.train(run, 2)
        loaded = snapshots(home, run)[-1]
    stopped = snapshots(home, run)[-1]
    assert stopped.position > loaded.position
    assert stopped.files["adapter_model.safetensors"] != loaded.files["adapter_model.safetensors"]
    with Local(home, pico).killed() as service:
        again, _ = trained_and_saved(service)
        service.do(again, "load_weights", path=path, optimizer=True)
        assert service.train(again, 2) == expected


@pytest.mark.parametrize("optimizer", [True, False])
def test_loaded_file_that_is_gone_is_written_again(
    home: Path, pico: Model, optimizer: bool
) -> None:
    with Local(home, pico).killed() as service:
        run, path = trained_and_saved(service)
        with service.writes.shut():
            load = service.send(run, "load_weights", path=path, optimizer=optimizer)
            service.writes.wait_reached()
            lost = blobs(home)
            for name in lost:
                (home / "vault" / "blobs" / name[:2] / name).unlink()
        service.result(load)
        (snapshot,) = snapshots(home, run)
        vault = Vault(home / "vault", writer=False)
        assert lost
        assert len(snapshot.files) == 4 if optimizer else 3
        assert is_sound(vault, snapshot)


def test_written_snapshot_is_not_read_again_and_the_one_before_it_once(
    home: Path, pico: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = LocalStorage.chunks

    def chunks(self: LocalStorage, key: str, **options: Any) -> Iterator[memoryview]:
        read.append(key)
        return real(self, key, **options)

    monkeypatch.setattr(LocalStorage, "chunks", chunks)
    with Local(home, pico, replay_seconds=1.5).killed() as service:
        service.seconds = 1.0  # so that there is a snapshot after each step
        run = service.new_run()
        service.train(run, 0)
        eventually("a snapshot", lambda: newest(home, run) == 2)
        service.train(run, 1)
        eventually("another", lambda: newest(home, run) == 4)
        first, _ = snapshots(home, run)
        eventually("the first is verified", lambda: len(read) == len(first.files))
        assert set(read) == {blob_key(ref.blake3) for ref in first.files.values()}
        service.train(run, 2)
        eventually(
            "the first is gone", lambda: [s.position for s in snapshots(home, run)] == [4, 6]
        )
        assert len(read) == 2 * len(first.files)
