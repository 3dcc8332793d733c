"""How others save: programs for the same cuts, and the same judgement of what is left."""

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
    import torch.distributed.checkpoint as dcp

    warnings.simplefilter("ignore")
    dcp.save({"weights": torch.full((3000,), float(number))}, checkpoint_id=path, no_dist=True)


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
    """Save so many times under one name, each but the last long ago; then hang."""
    reporter = Reporter(events, pause_after=saves)
    Path(home).mkdir()
    for number in range(saves):
        subprocess.run(["sync", "-f", home], check=True)
        with reporter.doing({NAME: {}}) as after:
            SAVES[peer](Path(home) / NAME, number)
            after[NAME] = value(Path(home) / NAME)


def value(path: Path) -> Value:
    """All bytes of a file, or of a directory, as a value; temporary files don't matter."""
    if not path.exists():
        return None
    files = sorted(each for each in (path, *path.rglob("*")) if each.is_file())
    return {
        str(each.relative_to(path)): hashlib.sha256(each.read_bytes()).hexdigest()
        for each in files
        if not each.name.endswith(".tmp")
    }


def check(home: Path, history: History) -> tuple[list[Violation], dict[str, Value]]:
    """What everyone would expect."""
    found = {NAME: value(home / NAME)}
    return history.judge(found), found
