"""Benchmark of the vault: durable, verified saves and verified loads.

    python benchmarks/vault_save.py [--mb 256] [--repeat 5] [--dir .] [--plot vault.png]

One run measures all cases in turns on one disk. It prints the median of each and its ratio to the
first row: a plain write + fsync of the same bytes (saves), or one copy in memory (loads).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import save

from everstep.vault import FileRef, Manifest, Vault, gc

_CHUNK = 8 << 20
_TENSORS = 64


class Case:
    """The content of a checkpoint, which changes for every save, and the ways to save and load it.

    Args:
        megabytes: the size of the content, in MiB.
        directory: an existing directory on the disk to test.
    """

    def __init__(self, megabytes: int, directory: Path) -> None:
        self.directory = directory
        self.buffer = torch.from_numpy(
            np.random.default_rng(0).standard_normal(megabytes << 18, dtype=np.float32)
        )
        self.tensors = {
            f"layer.{i:02d}": part for i, part in enumerate(self.buffer.chunk(_TENSORS))
        }
        self.bytes = memoryview(self.buffer.numpy()).cast("B")
        self.other = np.empty(self.bytes.nbytes, np.uint8)
        self.other.fill(1)  # allocates the pages
        self.vault = Vault(directory / "vault")
        self.number = 0

    def chunks(self) -> list[memoryview]:
        """Return the content in chunks of the engine's size."""
        return [self.bytes[i : i + _CHUNK] for i in range(0, self.bytes.nbytes, _CHUNK)]

    def change(self) -> None:
        """Change the content, as a training step does, and remove the files of earlier saves."""
        self.number += 1
        self.buffer[0] = self.number
        gc.collect(self.vault, 0)
        for kind in ("plain", "theirs"):
            for old in sorted(self.directory.glob(f"{kind}-*"))[:-1]:
                old.unlink()
        for old in sorted(self.directory.glob("dcp-*"))[:-1]:
            shutil.rmtree(old)
        os.sync()

    def fresh(self, kind: str) -> Path:
        """Return the path of a new file. The previous one exists until the next turn."""
        return self.directory / f"{kind}-{self.number:06d}"

    # Saves

    def plain_write(self) -> None:
        with self.fresh("plain").open("wb", buffering=0) as file:
            for chunk in self.chunks():
                file.write(chunk)

    def plain_fsync(self) -> None:
        with self.fresh("plain").open("wb", buffering=0) as file:
            for chunk in self.chunks():
                file.write(chunk)
            os.fsync(file.fileno())

    def safetensors(self) -> None:
        save_file(self.tensors, self.fresh("theirs"))

    def safetensors_fsync(self) -> None:
        self.safetensors()
        with self.fresh("theirs").open("rb") as file:
            os.fsync(file.fileno())

    def distributed_checkpoint(self) -> None:
        save(dict(self.tensors), checkpoint_id=self.fresh("dcp"), no_dist=True)

    def vault_save(self) -> None:
        def manifest_of(files: dict[str, FileRef]) -> Manifest:
            return Manifest(
                kind="training",
                run_id="bench",
                name="x",
                created_at=datetime.now(UTC),
                base_model="none",
                base_fingerprint="none",
                lora={},
                optimizer=None,
                step=self.number,
                position=self.number,
                files=files,
            )

        with self.vault.gc_paused():
            contents = {"adapter_model.safetensors": self.chunks()}
            self.vault.save(contents, manifest_of, overwrite=True, cold=True)

    # Loads, from the page cache

    def copy(self) -> None:
        self.other[:] = np.frombuffer(self.bytes, np.uint8)

    def blake3_one(self) -> None:
        blake3(self.bytes).digest()

    def sha256(self) -> None:
        hashlib.sha256(self.bytes).digest()

    def safetensors_read(self) -> None:
        tensors = load_file(max(self.directory.glob("theirs-*")))
        sum(float(tensor[0]) for tensor in tensors.values())

    def safetensors_read_copy(self) -> None:
        tensors = load_file(max(self.directory.glob("theirs-*")))
        into = torch.from_numpy(self.other).view(torch.float32).chunk(_TENSORS)
        for target, name in zip(into, self.tensors, strict=True):
            target.copy_(tensors[name])

    def vault_read(self) -> None:
        manifest = self.vault.manifest("training", "bench", "x")
        self.vault.read(manifest, "adapter_model.safetensors")

    def vault_read_copy(self) -> None:
        manifest = self.vault.manifest("training", "bench", "x")
        self.other[:] = np.frombuffer(
            self.vault.read(manifest, "adapter_model.safetensors"), np.uint8
        )


def measure(case: Case, cases: dict[str, Callable[[], None]], repeat: int) -> dict[str, float]:
    """Run the cases in turns, with a sync before each, and return the median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeat):
        for name, work in cases.items():
            case.change()
            begin = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(each) for name, each in times.items()}


def print_table(title: str, seconds: dict[str, float], megabytes: int) -> None:
    """Print a table with the ratio of each row to the first."""
    base = next(iter(seconds.values()))
    print(f"\n{title:<44}{'ms':>8}{'MB/s':>9}{'ratio':>8}")
    for name, each in seconds.items():
        print(f"{name:<44}{each * 1e3:8.0f}{megabytes / each:9.0f}{each / base:8.2f}")


def plot(path: Path, tables: dict[str, dict[str, float]], megabytes: int) -> None:
    """Write a bar chart of the tables."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(tables), figsize=(11, 3.5), layout="constrained")
    for axis, (title, seconds) in zip(axes, tables.items(), strict=True):
        rates = [megabytes / each for each in seconds.values()]
        colours = ["#d1495b" if "everstep" in name else "#9aa5b1" for name in seconds]
        bars = axis.barh(list(seconds), rates, color=colours)
        axis.bar_label(bars, fmt="%.0f", padding=3)
        axis.invert_yaxis()
        axis.set(title=title, xlabel="MB/s")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    print(f"\n{path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=int, default=256, help="size of the checkpoint in MiB")
    parser.add_argument("--repeat", type=int, default=5, help="number of measurements of each case")
    parser.add_argument("--dir", type=Path, default=Path(), help="a directory on the disk to test")
    parser.add_argument("--plot", type=Path, help="write a bar chart to this file")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="bench-", dir=options.dir))
    try:
        case = Case(options.mb, directory)
        saves = {
            "write + fsync": case.plain_fsync,
            "everstep vault: hashed, durable": case.vault_save,
            "torch DCP, fsync, not hashed": case.distributed_checkpoint,
            "safetensors save_file + fsync": case.safetensors_fsync,
            "safetensors save_file, not durable": case.safetensors,
            "write, not durable": case.plain_write,
        }
        loads = {
            "copy in memory": case.copy,
            "everstep vault: read, verified": case.vault_read,
            "everstep vault: read, verified, copied": case.vault_read_copy,
            "safetensors load_file, mapped, not verified": case.safetensors_read,
            "safetensors load_file, copied, not verified": case.safetensors_read_copy,
            "BLAKE3 of the bytes, one thread": case.blake3_one,
            "SHA-256 of the bytes": case.sha256,
        }
        measure(case, saves, 2)  # warm up, and save a checkpoint to load
        print(f"{options.mb} MiB, median of {options.repeat}, {os.cpu_count()} cores")
        tables = {"save": measure(case, saves, options.repeat)}
        tables["load, files in memory"] = measure(case, loads, options.repeat)
        for title, seconds in tables.items():
            print_table(title, seconds, options.mb)
        if options.plot:
            plot(options.plot, tables, options.mb)
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
