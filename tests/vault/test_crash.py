"""Crashes: a save, overwrite, deletion or collection dies at each of its system calls."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from everstep.vault import CheckpointNotFound, Vault, gc
from tests.vault.checkpoints import RUN, load, save, save_at_once, written_directly
from tests.vault.disk import Dead, Death, Disk

OLD = {"adapter": b"old adapter", "optimizer": b"same in both"}
NEW = {"adapter": b"new adapter", "optimizer": b"same in both"}
LARGE = {"adapter": bytes(range(250)) * 90}


def found(vault: Vault, name: str) -> dict[str, bytes] | None:
    try:
        return load(vault, vault.manifest("training", RUN, name))
    except CheckpointNotFound:
        return None


def save_first(vault: Vault) -> None:
    save(vault, "x", NEW)


def overwrite(vault: Vault) -> None:
    save(vault, "old", NEW, step=2, overwrite=True)


def save_at_once_first(vault: Vault) -> None:
    save_at_once(vault, "x", NEW)


def overwrite_at_once(vault: Vault) -> None:
    save_at_once(vault, "old", NEW, step=2, overwrite=True)


def overwrite_cold(vault: Vault) -> None:
    with written_directly():
        save_at_once(vault, "old", LARGE, step=2, overwrite=True, cold=True)


def delete(vault: Vault) -> None:
    vault.delete("training", RUN, "old")


def collect(vault: Vault) -> None:
    assert len(gc.collect(vault, 0)) == 1


def everything(vault: Vault) -> None:
    overwrite(vault)
    gc.collect(vault, 0)
    delete(vault)
    gc.collect(vault, 0)


Outcome = dict[str, bytes] | None
CASES: list[tuple[Callable[[Vault], None], str, list[Outcome]]] = [
    (save_first, "x", [None, NEW]),
    (overwrite, "old", [OLD, NEW]),
    (save_at_once_first, "x", [None, NEW]),
    (overwrite_at_once, "old", [OLD, NEW]),
    (overwrite_cold, "old", [OLD, LARGE]),
    (delete, "old", [OLD, None]),
    (collect, "old", [OLD]),
    (everything, "old", [OLD, NEW, None]),
]


@pytest.mark.parametrize("death", ["kill", "power cut", "error"])
@pytest.mark.parametrize(
    ("work", "name", "allowed"), CASES, ids=lambda c: getattr(c, "__name__", "")
)
def test_checkpoint_is_whole_or_absent_after_death_at_any_call(
    tmp_path: Path, death: Death, work: Callable[[Vault], None], name: str, allowed: list[Outcome]
) -> None:
    failed = 0
    seen = []
    for after in itertools.count():
        with Disk(tmp_path) as disk:
            vault = Vault(disk.home / "vault")
            save(vault, "old", OLD)
            save(vault, "other", {"adapter": b"of another"})
            vault.put([b"of no checkpoint"])
            disk.fail_after(after, death)
            may_be = allowed
            try:
                work(vault)
                may_be = allowed[-1:]  # the work was acknowledged
            except (Dead, OSError):
                failed += 1
            all_tried = disk.steps <= after
            disk.restart(death)
            seen.append(check(disk, name, may_be))
            disk.restart("power cut")
            check(disk, name, may_be)
            check_further_saves(disk, name)
        if all_tried:
            break
    assert failed > 1
    assert seen[0] == allowed[0] and seen[-1] == allowed[-1]


def check(disk: Disk, name: str, allowed: list[Outcome]) -> Outcome:
    """Check that a new process finds no torn checkpoint and collects none that exists."""
    vault = Vault(disk.home / "vault")
    assert list((disk.home / "vault" / "tmp").iterdir()) == []
    outcome = found(vault, name)
    assert outcome in allowed
    gc.collect(vault, 0)
    manifests = list(vault.manifests())
    assert manifests
    for manifest in manifests:
        load(vault, manifest)
    assert found(vault, name) == outcome
    assert found(vault, "other") == {"adapter": b"of another"}
    return outcome


def check_further_saves(disk: Disk, name: str) -> None:
    vault = Vault(disk.home / "vault")
    save(vault, name, NEW, overwrite=True)
    assert found(vault, name) == NEW
    vault.delete("training", RUN, name)
    assert found(vault, name) is None


def test_save_is_durable_after_an_earlier_process_died_in_it(tmp_path: Path) -> None:
    for after in itertools.count():
        with Disk(tmp_path) as disk:
            vault = Vault(disk.home / "vault")
            disk.fail_after(after, "kill")
            died = True
            try:
                save(vault, "x", OLD)
                died = False
            except Dead:
                pass
            disk.restart("kill")
            save(Vault(disk.home / "vault"), "x", NEW, overwrite=True)
            disk.restart("power cut")
            assert found(Vault(disk.home / "vault"), "x") == NEW
        if not died:
            break
    assert after > 3
