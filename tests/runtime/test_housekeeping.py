"""Maintenance: disk space, damaged files and expired checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from everstep.engine import Model
from everstep.vault import Vault
from tests.runtime.local import Local
from tests.waiting import eventually

SOON: dict[str, Any] = {"collect_interval_seconds": 0.05, "collect_grace_seconds": 0.0}


def blob(home: Path, run: str, name: str, file: str) -> Path:
    manifest = Vault(home / "vault", writer=False).manifest("training", run, name)
    digest = manifest.files[file].blake3
    return home / "vault" / "blobs" / digest[:2] / digest


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def listed(service: Local, run: str) -> list[str]:
    found = service.http.get(f"training_runs/{run}/checkpoints").json()["checkpoints"]
    return [each["checkpoint_id"] for each in found]


def test_save_without_disk_space_fails_and_training_continues(home: Path, pico: Model) -> None:
    with Local(home, pico, disk_reserve_bytes=1 << 60) as service:
        run, reference = service.new_run(), service.new_run()
        expected = service.train(reference, 0, 1)
        seen = service.train(run, 0)
        failed = service.do(run, "save_weights", path="a")
        assert failed["category"] == "server"
        assert "free" in failed["error"]
        assert listed(service, run) == []
        assert seen + service.train(run, 1) == expected
        assert list((home / "vault" / "tmp").iterdir()) == []


def test_load_without_disk_space_leaves_run_unchanged(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run, reference = service.new_run(), service.new_run()
        expected = service.train(reference, 0, 1, 2)
        seen = service.train(run, 0)
        path = service.do(run, "save_weights", path="a")["path"]
        seen += service.train(run, 1)
    with service.after(disk_reserve_bytes=1 << 60) as service:
        failed = service.do(run, "load_weights", path=path, optimizer=True)
        assert "could not be made durable" in failed["error"]
        assert seen + service.train(run, 2) == expected


def test_damaged_checkpoint_fails_its_load_and_is_not_listed(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        service.train(run, 0)
        path = service.do(run, "save_weights", path="a")["path"]
        service.train(run, 1)
        service.do(run, "save_weights", path="b")
        flip(blob(home, run, "a", "optimizer.safetensors"))
        failed = service.do(run, "load_weights", path=path, optimizer=True)
        assert failed["category"] == "server"
        assert "optimizer.safetensors" in failed["error"]
        assert listed(service, run) == ["weights/b"]
        assert "error" in service.do(run, "load_weights", path=path, optimizer=True)
        service.train(run, 2)


def test_scrub_finds_damage_before_a_load(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        service.train(run, 0)
        for name in ("a", "b"):
            service.do(run, "save_weights", path=name)
            service.train(run, 1)
    flip(blob(home, run, "a", "adapter_model.safetensors"))
    with service.after(scrub_interval_seconds=0.05, scrub_bytes_per_second=1e12) as service:
        eventually("the damage is found", lambda: listed(service, run) == ["weights/b"])


def test_expired_checkpoint_is_removed_and_shared_files_stay(home: Path, pico: Model) -> None:
    with Local(home, pico, min_ttl_seconds=1, **SOON) as service:
        run = service.new_run()
        service.train(run, 0)
        service.do(run, "save_weights", path="short", ttl_seconds=1)
        gone = blob(home, run, "short", "optimizer.safetensors")
        service.train(run, 1)
        kept = service.do(run, "save_weights", path="kept")["path"]
        eventually("its own file is removed", lambda: not gone.exists())
        assert listed(service, run) == ["weights/kept"]
        assert service.do(run, "load_weights", path=kept, optimizer=True)["path"] == kept
