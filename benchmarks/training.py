"""How fast does the engine train, and with how much memory, beside a plain PEFT loop?

    python benchmarks/training.py [--quick] [--repeat 7] [--only TEXT] [--device cuda]

Each case is a model, a dtype and the lengths of a pass's rows. Two processes train the same adapter
in turns, one step each: the engine (`forward_backward`, `optim_step`) and a loop of transformers,
PEFT and AdamW over rows padded to the longest. Compares tokens per second, the peak memory of the
processes, and the flops of a step with the machine's GEMM rate: 4 N flops a token, where N is the
number of the base's weights that a token is multiplied by.

Models: ``tiny`` (everstep/pico) and ``97m``, a Llama with random weights. ``--quick`` measures one
case of each.

On a GPU, the models have 1 to 8 billion random weights, the processes run one after the other, the
peak memory is the device's, and two more processes train with LoRA products in the base's dtype and
without determinism.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from devices import add_device_option
from figures import Figure, run
from random_models import write_random_model

from everstep.engine.models.pico import write_pico
from everstep.worker.zygote.fit import worker_environment

RANK = 32
WARM_UP = 2
SIDES = ("engine", "peft", "gemm")
VARIANTS: dict[str, dict[str, Any]] = {
    "engine": {},
    "engine, products in base dtype": {"lora_products": "base"},
    "engine, determinism off": {"deterministic": False},
}
"""How the engine loads a model."""
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """A model, a dtype and the lengths of a pass's rows.

    Attributes:
        aim: the wanted ratio of the engine's tokens per second to the loop's.
        quick: whether ``--quick`` measures it.
        share: the wanted share of the GEMM rate.
    """

    model: str
    dtype: str
    rows: str
    aim: float = 1.0
    quick: bool = False
    share: float | None = None

    @property
    def title(self) -> str:
        return f"{self.model} {self.dtype} {self.rows}"

    def lengths(self) -> list[int]:
        """Return the rows' lengths: ``8x512``, or ``32x16..64`` for uniformly drawn ones."""
        count, _, span = self.rows.partition("x")
        low, _, high = span.partition("..")
        random = np.random.default_rng(1)
        return [int(n) for n in random.integers(int(low), int(high or low) + 1, int(count))]


CASES = (
    Case("tiny", "float32", "8x512"),
    Case("tiny", "float32", "4x64", quick=True),
    Case("97m", "bfloat16", "4x256", 1.3, quick=True, share=0.3),
    Case("97m", "bfloat16", "32x16..64", 1.6),
    Case("97m", "bfloat16", "16x16..256", 2.5),
    Case("97m", "float32", "4x256", 1.1),
    Case("97m", "float32", "32x16..64", 1.4),
)


CUDA_CASES = (
    Case("1b", "bfloat16", "32x1024", 1.3, quick=True, share=0.45),
    Case("1b", "bfloat16", "64x64..1024", 2.0, share=0.35),
    Case("3b", "bfloat16", "16x1024", 1.3, share=0.5),
    Case("8b", "bfloat16", "16x1024", 1.3, share=0.55),
    Case("8b", "bfloat16", "32x64..1024", 2.0, share=0.45),
)
DETERMINISM_AIM = 0.75
"""Smallest share of the tokens per second without determinism that those with it may be."""


def write_model(directory: Path, case: Case, device: str) -> None:
    """Write a model's files, in a process of its own whose memory ends with it."""
    if case.model == "tiny":
        write_pico(directory / "tiny")
    elif not (directory / case.model).exists():
        command = [sys.executable, __file__, "--write", case.model, "--dir", str(directory)]
        subprocess.run([*command, "--device", device], check=True, stdout=sys.stderr)


def written_dtype(device: str) -> str:
    """Return the dtype of files: large models are in half precision."""
    return "float32" if device == "cpu" else "bfloat16"


# The sides: processes that make a step for each line that they read


def rows_of(case: Case) -> list[tuple[Array, Array, Array]]:
    """Return tokens, targets and weights of each row. The weights of the first half are 0."""
    random = np.random.default_rng(2)
    rows = []
    for length in case.lengths():
        tokens, targets = random.integers(0, 256, (2, length))
        weights = (np.arange(length) >= length // 2).astype(np.float32)
        rows.append((tokens, targets, weights))
    return rows


def engine_step(
    case: Case, directory: Path, device: str, variant: str = "engine"
) -> Callable[[], float]:
    """Return a step of the engine."""
    from everstep.worker.zygote.libraries import import_libraries

    import_libraries()  # as a worker does
    from everstep.engine import AdamParams, AdapterConfig, load_model, optim_step
    from everstep.engine import forward_backward as run_pass
    from everstep.wire.messages.passes import Example

    source, options = str(directory / case.model), VARIANTS[variant]
    model = load_model(case.model, source, device=device, dtype=case.dtype, **options)
    state = model.new_run(AdapterConfig(RANK, seed=1))
    data = [
        Example(tokens, {"target_tokens": targets, "weights": weights})
        for tokens, targets, weights in rows_of(case)
    ]

    def step() -> float:
        steps = run_pass(model, state, data, "cross_entropy", {}, backward=True)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                optim_step(state, AdamParams(1e-4, eps=1e-8))
                return float(end.value.metrics["loss:sum"])

    return step


def peft_step(case: Case, directory: Path, device: str) -> Callable[[], float]:
    """Return a step of a plain loop over one padded batch."""
    import peft
    from torch.nn import functional
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(
        directory / case.model, dtype=getattr(torch, case.dtype)
    )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    config = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules=names)
    model = peft.get_peft_model(base, config).to(device)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=1e-4,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
    )
    rows = rows_of(case)
    tokens, targets, weights = (
        _padded([row[part] for row in rows]).to(device) for part in range(3)
    )
    mask = _padded([np.ones(len(row[0]), np.int64) for row in rows]).to(device)

    def step() -> float:
        logits = model(input_ids=tokens, attention_mask=mask).logits.float()
        losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _padded(arrays: list[Array]) -> torch.Tensor:
    width = max(map(len, arrays))
    return torch.from_numpy(np.stack([np.pad(each, (0, width - len(each))) for each in arrays]))


def gemm_sizes(device: str) -> tuple[int, int]:
    """Return the size of a large product, and how often it is made."""
    return (2048, 1) if device == "cpu" else (8192, 10)


def gemm_step(case: Case, directory: Path, device: str) -> Callable[[], float]:
    """Return large products in the case's dtype."""
    size, times = gemm_sizes(device)
    x, weight = torch.randn(2, size, size, dtype=getattr(torch, case.dtype), device=device)

    def step() -> float:
        for _ in range(times):
            product = torch.nn.functional.linear(x, weight)
        return float(product[0, 0])

    return step


def serve_side(side: str, case: Case, directory: Path, device: str) -> None:
    """Make a step for each line of standard input. Answer with seconds, peak MiB and loss."""
    if side in VARIANTS:
        step = engine_step(case, directory, device, side)
    else:
        step = {"peft": peft_step, "gemm": gemm_step}[side](case, directory, device)
    for _ in sys.stdin:
        begin = time.perf_counter()
        loss = step()  # a number on the host: the device has ended
        print(json.dumps([time.perf_counter() - begin, peak_mib(device), loss]), flush=True)


def peak_mib(device: str) -> float:
    """Return the most memory of this process, or of its tensors on a GPU, in MiB."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line) / 1024


# The comparison


@contextmanager
def side(
    name: str, case: Case, directory: Path, device: str
) -> Iterator[Callable[[], tuple[float, ...]]]:
    """Start a side, with the threads and variables of a worker, and yield its step."""
    command = [sys.executable, __file__, "--side", name, "--dir", str(directory)]
    command += ["--device", device]
    command += ["--case", case.model, case.dtype, case.rows]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=worker_environment(),
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def step() -> tuple[float, ...]:
            print(file=process.stdin, flush=True)
            return tuple(json.loads(process.stdout.readline()))

        yield step
        process.stdin.close()


def products(case: Case, directory: Path) -> int:
    """Count the base's weights that a token is multiplied by: all matrices but the embeddings."""
    from safetensors import safe_open

    with safe_open(directory / case.model / "model.safetensors", "np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return sum(
        int(np.prod(shape))
        for name, shape in shapes.items()
        if len(shape) == 2 and "embed_tokens" not in name
    )


Turns = dict[str, list[tuple[float, ...]]]


def in_turns(case: Case, directory: Path, repeat: int) -> Turns:
    """Have all sides make a step each, in turns. Returns what they answered by side."""
    with ExitStack() as stack:
        steps = {name: stack.enter_context(side(name, case, directory, "cpu")) for name in SIDES}
        turns = [{name: step() for name, step in steps.items()} for _ in range(WARM_UP + repeat)]
    return {name: [turn[name] for turn in turns] for name in SIDES}


def one_by_one(case: Case, directory: Path, repeat: int, device: str) -> Turns:
    """Have one side after the other make its steps: a GPU's memory holds one of them."""
    found: Turns = {}
    for name in (*SIDES, *VARIANTS):
        if name not in found:
            with side(name, case, directory, device) as step:
                found[name] = [step() for _ in range(WARM_UP + repeat)]
    return found


def compare(case: Case, directory: Path, turns: Turns, device: str) -> Iterator[Figure]:
    """Yield a case's figures."""
    first = {name: answers[WARM_UP - 1][2] for name, answers in turns.items()}
    differs = max(abs(first[name] / first["peft"] - 1) for name in first if name in VARIANTS)
    assert differs < 1e-2, f"the sides' losses differ: {first}"
    seconds = {
        name: statistics.median(answer[0] for answer in answers[WARM_UP:])
        for name, answers in turns.items()
    }
    tokens = sum(case.lengths())
    rates = {name: tokens / each for name, each in seconds.items()}
    title = f"training, {case.title}"
    yield Figure(title, rates["engine"], "tokens/s", "PEFT", rates["peft"], case.aim)
    engine, peft = (turns[name][-1][1] for name in ("engine", "peft"))
    yield Figure(f"{title}, peak memory", engine, "MiB", "PEFT", peft, 1.0)
    if case.share is not None:
        made = 4 * products(case, directory) * rates["engine"] / 1e9
        size, times = gemm_sizes(device)
        rate = times * 2 * size**3 / seconds["gemm"] / 1e9
        yield Figure(f"{title}, 4N flops", made, "GFLOP/s", "GEMM", rate, case.share)
    for name in VARIANTS:
        if name in rates and name != "engine":
            aim = DETERMINISM_AIM if "determinism" in name else None
            yield Figure(title, rates["engine"], "tokens/s", name, rates[name], aim)


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    """Yield the figures."""
    repeat, device = 3 if arguments.quick else arguments.repeat, arguments.device
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        directory = Path(name)
        for case in CASES if device == "cpu" else CUDA_CASES:
            if arguments.only in case.title and (case.quick or not arguments.quick):
                write_model(directory, case, device)
                if device == "cpu":
                    turns = in_turns(case, directory, repeat)
                else:
                    turns = one_by_one(case, directory, repeat, device)
                yield from compare(case, directory, turns, device)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's own options."""
    parser.add_argument("--repeat", type=int, default=7, help="measured steps of each side")
    parser.add_argument("--only", default="", help="cases whose title holds this text")
    parser.add_argument("--dir", type=Path, help="where the models' files are written")
    add_device_option(parser)


def main() -> None:
    """Run the benchmark, or one of its sides."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--side")
    parser.add_argument("--case", nargs=3)
    parser.add_argument("--write")
    parser.add_argument("--device", default="cpu")
    own, _ = parser.parse_known_args()
    if own.write:
        dtype = written_dtype(own.device)
        write_random_model(own.dir / own.write, own.write, dtype=dtype, device=own.device)
    elif own.side:
        serve_side(own.side, Case(*own.case), own.dir, own.device)
    else:
        run(__doc__, measure, add_options)


if __name__ == "__main__":
    main()
