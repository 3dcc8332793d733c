"""How many tokens a second does the engine sample?

    python benchmarks/sampling.py [--quick] [--dtype bfloat16] [--device cuda]

One request for 1 and for 32 samples of a prompt of 32 tokens, of the base model and of a LoRA
adapter of rank 32, on two random models: a tiny one of 140 thousand parameters, and one of 97
million. The peer is transformers' `generate` with its key-value cache, which draws as many tokens
from the same prompt. For the larger model the limit is the memory's bandwidth, measured as the rate
of a sum over a large array, by the bytes of the weights that each pass reads. It is compared with
the passes after the prompt, which is bound by arithmetic. All take turns in one run.

On a GPU, the models have 1 and 8 billion parameters in bfloat16, and 256 samples are drawn as well.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from devices import add_device_option
from figures import Figure, run
from random_models import SIZES
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from everstep.engine import AdapterConfig, Model, SampleSpec, SamplingBatch, load_model
from everstep.engine.models.pico import write_pico
from everstep.engine.run_state import Adapter

CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 259,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "97 M": {
        "vocab_size": 16384,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "tie_word_embeddings": True,
    },
}
CUDA_CONFIGS = {name: SIZES[name] for name in ("1b", "8b")}
AIMS = {("tiny", 1): 1.5, ("tiny", 32): 1.5, ("97 M", 1): 1.2, ("97 M", 32): 2.5}
LORA_AIM = 0.8
BANDWIDTH_AIM = 0.8
PROMPT = np.arange(32)
RANK = 32
BANDWIDTH_BYTES = 1 << 28


class Subject:
    """A random model, as the engine and as transformers load it.

    Args:
        directory: where its files are written.
        config: sizes of a Llama.
        dtype: of the weights.
        device: where they are.
    """

    def __init__(self, directory: Path, config: dict[str, Any], dtype: str, device: str) -> None:
        write_pico(directory)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        torch.manual_seed(0)
        kind = torch.float32 if device == "cpu" else getattr(torch, dtype)
        with torch.device(device):
            llama = LlamaConfig(**config, eos_token_id=257)
            module = AutoModelForCausalLM.from_config(llama, dtype=kind)
        module.save_pretrained(directory)
        del module
        tokenizer.save_pretrained(directory)
        self.model: Model = load_model("random", str(directory), device=device, dtype=dtype)
        theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
        self._theirs = theirs.to(device)
        self.weight_bytes = sum(each.nbytes for each in self._theirs.parameters())
        self.adapter = random_adapter(self.model)

    def ours(self, adapter: Adapter | None, samples: int, tokens: int) -> None:
        """Sample with the engine."""
        batch = SamplingBatch(self.model)
        spec = SampleSpec(PROMPT, samples, max_tokens=tokens, use_eos=False, seed=1)
        batch.add("it", spec, adapter)
        while batch.busy:
            batch.step()

    def passes(self, samples: int, tokens: int) -> float:
        """Sample with the engine. Returns the tokens a second of the passes after the prompt."""
        batch = SamplingBatch(self.model)
        batch.add("it", SampleSpec(PROMPT, samples, max_tokens=tokens, use_eos=False), None)
        while not batch.drawn("it", 0):
            batch.step()
        begin = time.perf_counter()
        while batch.busy:
            batch.step()
        return samples * (tokens - 1) / (time.perf_counter() - begin)

    def generate(self, samples: int, tokens: int) -> None:
        """Sample with transformers."""
        ids = torch.from_numpy(PROMPT).expand(samples, -1).contiguous().to(self.model.device)
        with torch.no_grad():
            found = self._theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                pad_token_id=258,
            )
        assert found.cpu().shape[1] == len(PROMPT) + tokens


def random_adapter(model: Model) -> Adapter:
    """Create an adapter of all projections."""
    state = model.new_run(AdapterConfig(RANK, seed=1))
    state.arena.buffers["params"].normal_(0, 0.02)
    capture = state.capture(optimizer=False)
    content = b"".join(bytes(chunk) for chunk in capture.files()["adapter_model.safetensors"])
    capture.release()
    return model.load_adapter(state.layout.config, content)


def rate(sample: Callable[[], None], count: int) -> float:
    """Return how many tokens a second are sampled."""
    begin = time.perf_counter()
    sample()
    return count / (time.perf_counter() - begin)


def bandwidth(device: torch.device) -> float:
    """Return the bytes a second at which all threads, or a GPU, read memory."""
    numbers = torch.ones(BANDWIDTH_BYTES // 4, device=device)
    return max(rate(lambda: float(numbers.sum()), BANDWIDTH_BYTES) for _ in range(3))


def compare(subject: Subject, samples: int, tokens: int, rounds: int) -> dict[str, float]:
    """Measure all in turns, after a first round that warms up. Returns medians."""
    actions: dict[str, Callable[[], None]] = {
        "base": lambda: subject.ours(None, samples, tokens),
        "generate": lambda: subject.generate(samples, tokens),
        "adapter": lambda: subject.ours(subject.adapter, samples, tokens),
    }
    found: defaultdict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for name, action in actions.items():
            measured = rate(action, samples * tokens)
            if number:
                found[name].append(measured)
        found["passes"].append(subject.passes(samples, tokens))
        found["bandwidth"].append(bandwidth(subject.model.device))
    return {name: statistics.median(values) for name, values in found.items()}


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    """Yield the figures."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    on_cpu = arguments.device == "cpu"
    dtype = arguments.dtype or ("float32" if on_cpu else "bfloat16")
    for name, config in (CONFIGS if on_cpu else CUDA_CONFIGS).items():
        with tempfile.TemporaryDirectory(dir=arguments.dir) as directory:
            subject = Subject(Path(directory) / "model", config, dtype, arguments.device)
        for samples in (1, 32) if on_cpu else (1, 32, 256):
            tokens = (12 if name == "97 M" else 128) // (1 + arguments.quick)
            found = compare(subject, samples, tokens, 3 if arguments.quick else 7)
            what = f"{name} {dtype}, {samples} sample{'s' * (samples > 1)}"
            base, aim = found["base"], AIMS.get((name, samples))
            yield Figure(f"{what}, base", base, "tokens/s", "generate", found["generate"], aim)
            yield Figure(f"{what}, LoRA", found["adapter"], "tokens/s", "base", base, LORA_AIM)
            if name != "tiny":
                limit = samples * found["bandwidth"] / subject.weight_bytes
                aim = BANDWIDTH_AIM if samples == 1 else None  # many rows are bound by arithmetic
                passes = found["passes"]
                yield Figure(f"{what}, passes", passes, "tokens/s", "bandwidth limit", limit, aim)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 on a GPU")
    parser.add_argument("--dir", type=Path, help="where the models' files are written")
    add_device_option(parser)


if __name__ == "__main__":
    run(__doc__, measure, add_options)
