"""Peers: programs that save as other libraries do, for the same power cuts and checks."""

from __future__ import annotations

import hashlib
import os
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path

from everstep.testing.history import History, Reporter, Value, Violation

NAME = "checkpoint"


def _torch_save(path: Path, number: int) -> None:
    import torch

    torch.save({"weights": torch.full((3000,), float(number))}, path)


def _safetensors(path: Path, number: int) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"weights": torch.full((3000,), float(number))}, path)


def _distributed(path: Path, number: int) -> None:
    import torch
    from torch.distributed.checkpoint.state_dict_saver import save

    warnings.simplefilter("ignore")
    save({"weights": torch.full((3000,), float(number))}, checkpoint_id=path, no_dist=True)


def _temporary_and_rename(path: Path, number: int) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(bytes([number]) * 12_000)
    temporary.replace(path)


def _carefully(path: Path, number: int) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(bytes([number]) * 12_000)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    handle = os.open(path.parent, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


SAVES: dict[str, Callable[[Path, int], None]] = {
    "torch.save": _torch_save,
    "safetensors": _safetensors,
    "torch.distributed.checkpoint": _distributed,
    "temporary and rename": _temporary_and_rename,
    "carefully": _carefully,
}


def live(events: int, home: str, peer: str, saves: int) -> None:
    """Save repeatedly under one name, with all but the last save synced, then hang."""
    reporter = Reporter(events, pause_after=saves)
    Path(home).mkdir()
    for number in range(saves):
        subprocess.run(["sync", "-f", home], check=True)
        with reporter.doing({NAME: {}}) as after:
            SAVES[peer](Path(home) / NAME, number)
            after[NAME] = value(Path(home) / NAME)


def value(path: Path) -> Value:
    """Return the hashes of a file or of a directory's files, without temporary ones, as a value."""
    if not path.exists():
        return None
    files = sorted(each for each in (path, *path.rglob("*")) if each.is_file())
    return {
        str(each.relative_to(path)): hashlib.sha256(each.read_bytes()).hexdigest()
        for each in files
        if not each.name.endswith(".tmp")
    }


def check(home: Path, history: History) -> tuple[list[Violation], dict[str, Value]]:
    """Compare the checkpoint that is left with the history."""
    found = {NAME: value(home / NAME)}
    return history.judge(found), found
