"""Copies of a state: a save writes it from where it lies. Saves and loads need bounded memory."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from everstep.engine import AdamParams, AdapterConfig, RunState, optim_step
from everstep.engine.run_state import AdapterLayout
from everstep.engine.spare import SEGMENT, SpareMemory, zeros
from everstep.system_memory import release_unused_memory
from everstep.vault import CheckpointId, Vault
from everstep.vault.storage import direct
from everstep.worker.checkpoint_io import read_checkpoint, write_checkpoint

CPU = torch.device("cpu")
MIB = 1 << 20
PARAMS = AdamParams(learning_rate=0.01)
SAVED = CheckpointId("training", "run", "x")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc, O_DIRECT")


def new_state(*, initialise: bool = True) -> RunState:
    """A run with 32 MiB of weights, so 96 MiB in a checkpoint."""
    widths = {"a": (1 << 19, 1 << 19)}
    layout = AdapterLayout(AdapterConfig(rank=8, seed=1), widths, b"{}")
    return RunState(layout, CPU, initialise=initialise)


def trained() -> RunState:
    state = new_state()
    gradients = torch.full((state.arena.size,), 0.5)
    state.arena.replace({"grads": gradients})
    optim_step(state, PARAMS)
    return state


def draft(kind: str = "training") -> dict[str, Any]:
    return {
        "kind": kind,
        "run_id": "run",
        "name": "x",
        "base_model": "m",
        "base_fingerprint": "f",
        "lora": {},
        "optimizer": None,
        "user_metadata": None,
        "run_metadata": {},
        "expires_at": None,
        "position": 1,
        "request_id": "request",
        "parents": [],
    }


def save(vault: Vault, state: RunState) -> None:
    write_checkpoint(vault, state.capture(optimizer=True), draft(), {})


def anonymous() -> int:
    """The process's anonymous memory in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def growth(action: Callable[[], object]) -> int:
    """Return by how many bytes the process's anonymous memory grows at most during an action."""
    release_unused_memory()
    before, ended, seen = anonymous(), threading.Event(), [0]

    def sample() -> None:
        while not ended.wait(0.001):
            seen.append(anonymous())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        action()
    finally:
        ended.set()
        sampler.join()
    return max(*seen, anonymous()) - before


def test_save_copies_nothing_of_a_large_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[int] = []
    real = direct._copy

    def copy(source: memoryview, target: memoryview) -> None:
        copied.append(len(source))
        real(source, target)

    monkeypatch.setattr(direct, "_copy", copy)
    vault, state = Vault(tmp_path), trained()
    save(vault, state)
    assert vault.manifest(*SAVED).size > 3 * state.arena.size * 4
    assert copied, "the headers"
    assert sum(copied) < 4 * direct.BLOCK


def test_save_beside_a_step_needs_spare_memory_and_no_more(tmp_path: Path) -> None:
    vault, state = Vault(tmp_path), trained()
    state.arena.spare = SpareMemory(3 * 4 * SEGMENT)
    expected = {name: buffer.clone() for name, buffer in state.arena.buffers.items()}
    capture = state.capture(optimizer=True)
    writer = threading.Thread(target=write_checkpoint, args=(vault, capture, draft(), {}))

    def save_and_step() -> None:
        writer.start()
        while not state.arena.wait_for_spare(60):
            pytest.fail("spare memory is never enough")
        optim_step(state, PARAMS)
        writer.join()

    assert growth(save_and_step) < 3 * 4 * SEGMENT + 2 * direct.STAGE + 8 * MIB
    manifest, files = read_checkpoint(vault, SAVED, optimizer=True)
    restored = new_state(initialise=False)
    restored.restore(files, {"step": manifest.step}, optimizer=True)
    for name in ("params", "exp_avg", "exp_avg_sq"):
        assert torch.equal(restored.arena.buffers[name], expected[name])


def test_load_needs_the_state_and_no_copy_of_it(tmp_path: Path) -> None:
    vault = Vault(tmp_path)
    saved = trained()
    save(vault, saved)

    def load(state: RunState) -> None:
        manifest, files = read_checkpoint(vault, SAVED, optimizer=True)
        state.restore(files, {"step": manifest.step}, optimizer=True)

    assert growth(lambda: load(saved)) < 8 * MIB

    def create() -> None:
        load(new_state(initialise=False))

    assert growth(create) < 3 * 4 * saved.arena.size + 8 * MIB, "no memory for gradients"


def test_zeros_take_no_memory_before_they_are_written_to() -> None:
    made: list[torch.Tensor] = []
    assert growth(lambda: made.append(zeros(16 * MIB, CPU))) < 4 * MIB
    (tensor,) = made
    assert growth(lambda: tensor.fill_(1)) > 60 * MIB
    assert np.array_equal(zeros(16 * MIB, CPU).numpy()[::4096], np.zeros(4096, np.float32))
