"""Corruption in other formats: safetensors and torch.load load damaged files without an error."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

FLIPS = 30
VALUES = 3000


def _save_torch(tensors: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(tensors, path)


def _load_torch(path: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = torch.load(path)
    return loaded


@pytest.mark.parametrize(
    ("save", "load"),
    [(save_file, load_file), (_save_torch, _load_torch)],
    ids=["safetensors", "torch"],
)
def test_flipped_bytes_load_without_an_error(
    tmp_path: Path,
    save: Callable[[dict[str, torch.Tensor], Path], None],
    load: Callable[[Path], dict[str, torch.Tensor]],
) -> None:
    """Check the README's figure: every damaged file loads, with wrong weights."""
    path = tmp_path / "checkpoint"
    weights = torch.arange(VALUES, dtype=torch.float32)
    save({"weights": weights}, path)
    sound = path.read_bytes()
    first = sound.index(weights.numpy().tobytes())
    chosen = random.Random(1).sample(range(4 * VALUES), FLIPS)
    loaded = 0
    for offset in chosen:
        damaged = bytearray(sound)
        damaged[first + offset] ^= 0x10
        path.write_bytes(damaged)
        loaded += not torch.equal(load(path)["weights"], weights)
    assert loaded == FLIPS
