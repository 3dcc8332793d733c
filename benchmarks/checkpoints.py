"""What do saves and loads of a state of 242 MB cost the run, its neighbours and the memory?

    python benchmarks/checkpoints.py [--quick] [--dir .] [--layers 4] [--rank 212]
    python benchmarks/checkpoints.py --device cuda --model 8b --rank 32

Each figure stands beside a physical limit of the same run: a copy in memory, a write and fsync of
the same bytes, the vault's verified read, the first touch of fresh memory, or the neighbour while
nothing is saved. The model has random weights. `large_state.py` makes a state of 1.45 GB, as does
`--model 8b --rank 44` on a GPU.

A virtual machine may give free memory back to its host: fresh memory, and fresh pages of the file
cache, then take many times longer than those that were in use a second ago. So a save, and what it
is compared with, each make a new file beside the earlier ones.
"""

from __future__ import annotations

import argparse
import mmap
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from devices import add_device_option, release_device
from figures import Figure, run
from random_models import SIZES, write_random_model
from serving import Served, serving

import everstep
from everstep.engine.models.pico import write_pico
from everstep.vault import Vault

MODEL, TINY = "bench", "everstep/pico"
HIDDEN, MLP = 1024, 4096
ADAM = everstep.AdamParams(learning_rate=1e-4)
DATUM = everstep.Datum(
    model_input=everstep.ModelInput.from_ints(list(range(15))),
    loss_fn_inputs={"target_tokens": list(range(1, 16)), "weights": [1.0] * 15},
)
CHUNK = 8 << 20
Latencies = defaultdict[str, list[float]]


def write_model(directory: Path, layers: int) -> None:
    """Write a Llama with random weights and the tokenizer of the built-in model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16}
    config = LlamaConfig(vocab_size=259, **sizes, **heads)
    LlamaForCausalLM(config).save_pretrained(directory)
    write_pico(directory.with_name("pico"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(directory.with_name("pico") / name, directory / name)


def seconds(action: Callable[[], object]) -> float:
    """Return the duration of an action."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def forward_backward(client: everstep.TrainingClient) -> None:
    client.forward_backward([DATUM], "cross_entropy").result()


def optim_step(client: everstep.TrainingClient) -> None:
    client.optim_step(ADAM).result()


def step(client: everstep.TrainingClient) -> None:
    """Train one step."""
    client.forward_backward([DATUM], "cross_entropy")
    optim_step(client)


class Limits:
    """What the machine does with as many bytes.

    Args:
        size: the bytes.
        directory: on the disk that is measured.
    """

    def __init__(self, size: int, directory: Path) -> None:
        self._data = np.ones(size, np.uint8)
        self._other = np.ones(size, np.uint8)
        self._directory = directory
        self._files = 0

    def copy(self) -> None:
        """Copy in memory, where both sides were touched before."""
        np.copyto(self._other, self._data)

    def write(self) -> None:
        """Write a new file beside the earlier ones and fsync it."""
        self._files += 1
        path = self._directory / f"limit-{len(self._data)}-{self._files}"
        with path.open("wb", buffering=0) as file:
            for begin in range(0, len(self._data), CHUNK):
                file.write(self._data[begin : begin + CHUNK].data)
            os.fsync(file.fileno())

    def touch(self) -> None:
        """Touch as much fresh memory, in huge pages and by as many threads as there are cores."""
        size, cores = len(self._data), os.cpu_count() or 1
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        parts = np.array_split(np.frombuffer(memory, np.uint8), cores)
        threads = [threading.Thread(target=each.fill, args=(1,)) for each in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


class Memory:
    """The anonymous memory of a process and its descendants, sampled while an action runs."""

    def __init__(self, process: int) -> None:
        self._process = process

    def peak(self, action: Callable[[], object]) -> int:
        """Return by how many bytes it grew at most."""
        before = peak = self._now()
        ended = threading.Event()

        def sample() -> None:
            nonlocal peak
            while not ended.wait(0.003):
                peak = max(peak, self._now())

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            action()
        finally:
            ended.set()
            thread.join()
        return peak - before

    def _now(self, process: int | None = None) -> int:
        pid = self._process if process is None else process
        found = 0
        try:
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    found += int(line.split()[1]) << 10
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            return 0  # it has ended
        return found + sum(self._now(int(child)) for child in children)


@contextmanager
def repeating(action: Callable[[], object]) -> Iterator[None]:
    """Repeat an action in a thread while the block runs."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.is_set():
            action()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Case:
    """A run with a large state, a neighbour with a small one, and a tiny model's run.

    Args:
        served: the service.
        home: its home.
        rank: of the large adapter.
        times: how often each figure is measured.

    Attributes:
        size: bytes of the large state, once `memory` has measured its first save.
    """

    def __init__(self, served: Served, home: Path, rank: int, times: int) -> None:
        self._service = everstep.ServiceClient(base_url=served.address, api_key="tml-benchmark")
        self._memory = Memory(served.process)
        self._vault = Vault(home / "vault", writer=False)
        self._times = times
        create = self._service.create_lora_training_client
        self._run = create(MODEL, rank=rank, seed=1).result()
        self._neighbour = create(MODEL, rank=4, seed=2).result()
        self._tiny = create(TINY, rank=16, seed=3).result()
        for client in (self._run, self._neighbour, self._tiny):
            step(client)

    def memory(self) -> Iterator[Figure]:
        """Peaks of service and worker, in the first save beside a step and in a load of it."""
        stepping = self._memory.peak(lambda: step(self._run))

        def save() -> None:
            future = self._run.save_state("first")
            step(self._run)
            self._saved = future.result().path

        def load() -> None:
            self._run.load_state_with_optimizer(self._saved).result()

        peaks = {
            "first save_state and a step, beyond a step": self._memory.peak(save) - stepping,
            "load_state_with_optimizer, beyond the state": self._memory.peak(load),
        }
        self._manifest = self._vault.manifest("training", self._run.model_id, "first")
        self.size = self._manifest.size
        for what, peak in peaks.items():
            size = max(peak, 0) / 1e6
            yield Figure(f"memory of a {what}", size, "MB", "256 MiB, MB", 268.4, 1.0)

    def saves(self, limits: Limits) -> Iterator[Figure]:
        """A save's duration, and what it costs the run's own next step."""
        names = iter(range(10_000))
        plain, stalled, saved, written, copied = [], [], [], [], []
        for _ in range(self._times):
            copied.append(seconds(limits.copy))
            written.append(seconds(limits.write))
            plain.append(seconds(lambda: step(self._run)))
            written.append(seconds(limits.write))  # both steps come after the same pause
            future = self._run.save_state(f"s{next(names)}")
            begin = time.perf_counter()
            step(self._run)
            stalled.append(time.perf_counter() - begin)
            future.result()
            step(self._run)
            saved.append(seconds(lambda: self._run.save_state(f"s{next(names)}").result()))
        median = statistics.median
        size = f"{self.size / 1e6:.0f} MB"
        what = f"save_state of {size}, durable"
        limit = median(written) * 1e3
        yield Figure(what, median(saved) * 1e3, "ms", "write + fsync, ms", limit, 1.05)
        stall = (median(stalled) - median(plain)) * 1e3
        what = f"own next step after save_state of {size}, longer by"
        yield Figure(what, stall, "ms", "one copy in memory, ms", median(copied) * 1e3, 1.0)

    def loads(self, limits: Limits) -> Iterator[Figure]:
        """A load's rate, and what a creation costs beyond it."""

        def load() -> None:
            self._run.load_state_with_optimizer(self._saved).result()

        def create() -> None:
            create = self._service.create_training_client_from_state_with_optimizer
            create(self._saved).result()

        def verify() -> None:
            for name in self._manifest.files:
                self._vault.read(self._manifest, name)

        loaded, verified, created, touched = [], [], [], []
        for _ in range(self._times):
            loaded.append(seconds(load))
            verified.append(seconds(verify))
            created.append(seconds(create))
            touched.append(seconds(limits.touch))
        median, gigabytes = statistics.median, self.size / 1e9
        rate, limit = gigabytes / median(loaded), gigabytes / median(verified)
        what = "load_state_with_optimizer, files in memory"
        yield Figure(what, rate, "GB/s", "the vault's verified read, GB/s", limit, 1 / 3)
        beyond = (median(created) - median(loaded)) * 1e3
        what = "create from state with optimizer, beyond that"
        peer = "first touch of as much fresh memory, ms"
        yield Figure(what, beyond, "ms", peer, median(touched) * 1e3, 1.25)

    def tiny_save(self, limits: Limits) -> Iterator[Figure]:
        """The save of a tiny model: how often the disk is waited for."""
        saved, written = [], []
        for number in range(5 * self._times):
            step(self._tiny)
            written.append(seconds(limits.write))
            saved.append(seconds(lambda n=number: self._tiny.save_state(f"t{n}").result()))
        save, limit = statistics.median(saved) * 1e3, statistics.median(written) * 1e3
        yield Figure("save_state, tiny model", save, "ms", "write + fsync of 4 KiB, ms", limit, 8)

    def neighbours(self) -> Iterator[Figure]:
        """The 99th percentile of a neighbour's operations while another run saves all the time."""
        alone: Latencies = defaultdict(list)
        beside: Latencies = defaultdict(list)
        for _ in range(2):
            with repeating(lambda: step(self._run)):
                self._measure_steps(alone)
            with repeating(self._step_and_save):
                self._measure_steps(beside)
        for name, latencies in beside.items():
            what = f"a neighbour's {name}, p99 while another saves"
            limit = _p99(alone[name]) * 1e3
            peer = "p99 while it only trains, ms"
            yield Figure(what, _p99(latencies) * 1e3, "ms", peer, limit, 1.1)

    def _step_and_save(self) -> None:
        step(self._run)
        self._run.save_state("beside", overwrite=True).result()

    def _measure_steps(self, found: Latencies) -> None:
        for _ in range(10 * self._times):
            for operation in (forward_backward, optim_step):
                found[operation.__name__].append(seconds(lambda o=operation: o(self._neighbour)))


def _p99(values: list[float]) -> float:
    return float(np.quantile(values, 0.99))


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    """Yield the figures."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.dir) as name:
        directory, home = Path(name), Path(name) / "home"
        if arguments.model is None:
            write_model(directory / "model", arguments.layers)
        else:
            kind = "float32" if arguments.device == "cpu" else "bfloat16"
            write_random_model(
                directory / "model", arguments.model, dtype=kind, device=arguments.device
            )
            release_device(arguments.device)
        models = (f"{MODEL}={directory / 'model'}", f"{TINY}={TINY}")
        with serving(home, f"device={arguments.device}", models=models) as served:
            case = Case(served, home, arguments.rank, 3 if arguments.quick else 10)
            yield from case.memory()
            limits = Limits(case.size, directory)
            yield from case.saves(limits)
            yield from case.loads(limits)
            yield from case.tiny_save(Limits(4096, directory))
            yield from case.neighbours()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--dir", type=Path, default=Path(), help="a directory on the disk to test")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model")
    parser.add_argument("--model", choices=SIZES, help="instead of one of --layers layers")
    parser.add_argument("--rank", type=int, default=212, help="rank of the adapter")
    add_device_option(parser)


if __name__ == "__main__":
    run(__doc__, measure, add_options)
