"""How fast does the engine train, and with how much memory, beside a plain PEFT loop?

    python benchmarks/training.py [--quick] [--repeat 7] [--only TEXT]

Each case is a model, a dtype and the lengths of a pass's rows. Two processes train the same adapter
in turns, one step each: the engine (`forward_backward`, `optim_step`) and a loop of transformers,
PEFT and AdamW over rows padded to the longest. Compares tokens per second, the peak memory of the
processes, and the flops of a step with the machine's GEMM rate: 4 N flops a token, where N is the
number of the base's weights that a token is multiplied by.

Models: ``tiny`` (everstep/pico) and ``97m``, a Llama with random weights. ``--quick`` measures one
case of each.
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
from figures import Figure, run

from everstep.worker.zygote.fit import worker_environment

RANK = 32
WARM_UP = 2
SIDES = ("engine", "peft")
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


def write_models(directory: Path) -> None:
    """Write the models' files."""
    from everstep.engine.models.pico import write_pico

    write_pico(directory / "tiny")
    subprocess.run([sys.executable, __file__, "--write", str(directory)], check=True)


def write_97m(directory: Path) -> None:
    """Write a Llama of 97 million random weights, with the tokenizer of the tiny model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=640,
        intermediate_size=1_792,
        num_hidden_layers=12,
        num_attention_heads=10,
        num_key_value_heads=5,
        max_position_embeddings=2_048,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory / "97m")
    AutoTokenizer.from_pretrained(directory / "tiny").save_pretrained(directory / "97m")


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


def engine_step(case: Case, directory: Path) -> Callable[[], float]:
    """Return a step of the engine."""
    from everstep.engine import AdamParams, AdapterConfig, load_model, optim_step
    from everstep.engine import forward_backward as run_pass
    from everstep.wire.messages.passes import Example

    model = load_model(case.model, str(directory / case.model), device="cpu", dtype=case.dtype)
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


def peft_step(case: Case, directory: Path) -> Callable[[], float]:
    """Return a step of a plain loop over one padded batch."""
    import peft
    from torch.nn import functional
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(
        directory / case.model, dtype=getattr(torch, case.dtype)
    )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    config = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules=names)
    model = peft.get_peft_model(base, config)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=1e-4,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
    )
    rows = rows_of(case)
    tokens, targets, weights = (_padded([row[part] for row in rows]) for part in range(3))
    mask = _padded([np.ones(len(row[0]), np.int64) for row in rows])

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


def gemm_step(case: Case, directory: Path) -> Callable[[], float]:
    """Return a large product in the case's dtype: 2 · 2048³ flops."""
    x, weight = torch.randn(2, 2048, 2048, dtype=getattr(torch, case.dtype))
    return lambda: float(torch.nn.functional.linear(x, weight)[0, 0])


def serve_side(side: str, case: Case, directory: Path) -> None:
    """Make a step for each line of standard input. Answer with seconds, peak memory and loss."""
    makers = {"engine": engine_step, "peft": peft_step, "gemm": gemm_step}
    step = makers[side](case, directory)
    for _ in sys.stdin:
        begin = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - begin
        status = Path("/proc/self/status").read_text()
        peak = next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line)
        print(json.dumps([seconds, peak / 1024, loss]), flush=True)


# The comparison


@contextmanager
def side(name: str, case: Case, directory: Path) -> Iterator[Callable[[], tuple[float, ...]]]:
    """Start a side, with the threads and variables of a worker, and yield its step."""
    command = [sys.executable, __file__, "--side", name, "--dir", str(directory)]
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


def compare(case: Case, directory: Path, repeat: int) -> Iterator[Figure]:
    """Measure a case and yield its figures."""
    with ExitStack() as stack:
        steps = {
            name: stack.enter_context(side(name, case, directory)) for name in (*SIDES, "gemm")
        }
        for _ in range(WARM_UP):
            warm = {name: step() for name, step in steps.items()}
        assert abs(warm["engine"][2] / warm["peft"][2] - 1) < 1e-2, "the sides' losses differ"
        turns = [{name: step() for name, step in steps.items()} for _ in range(repeat)]
    times = {name: statistics.median(turn[name][0] for turn in turns) for name in steps}
    tokens = sum(case.lengths())
    engine, peft = (tokens / times[name] for name in SIDES)
    yield Figure(f"training, {case.title}", engine, "tokens/s", "PEFT", peft, case.aim)
    engine, peft = (turns[-1][name][1] for name in SIDES)
    yield Figure(f"training, {case.title}, peak memory", engine, "MiB", "PEFT", peft, 1.0)
    if case.share is not None:
        made = 4 * products(case, directory) * tokens / times["engine"] / 1e9
        rate = 2 * 2048**3 / times["gemm"] / 1e9
        title = f"training, {case.title}, 4N flops"
        yield Figure(title, made, "GFLOP/s", "GEMM", rate, case.share)


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    """Yield the figures."""
    repeat = 3 if arguments.quick else arguments.repeat
    with tempfile.TemporaryDirectory() as directory:
        write_models(Path(directory))
        for case in CASES:
            if arguments.only in case.title and (case.quick or not arguments.quick):
                yield from compare(case, Path(directory), repeat)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's own options."""
    parser.add_argument("--repeat", type=int, default=7, help="measured steps of each side")
    parser.add_argument("--only", default="", help="cases whose title holds this text")


def main() -> None:
    """Run the benchmark, or one of its sides."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--side")
    parser.add_argument("--case", nargs=3)
    parser.add_argument("--write", type=Path)
    own, _ = parser.parse_known_args()
    if own.write:
        write_97m(own.write)
    elif own.side:
        serve_side(own.side, Case(*own.case), own.dir)
    else:
        run(__doc__, measure, add_options)


if __name__ == "__main__":
    main()
