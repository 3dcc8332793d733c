"""Exactness on each device: equal bits each time, after a restore, in any company and process.

On a GPU the model is larger, so that its libraries have kernels to choose from.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.llama import LlamaConfig

from everstep.engine import AdamParams, AdapterConfig, Model, RunState, SampleSpec, load_model
from everstep.engine import optim_step as make_step
from everstep.engine.sampling import device_choice, token_choice
from everstep.engine.sampling.device_choice import Chosen, Rows
from everstep.engine.sampling.token_choice import stream
from tests.devices import DEVICES, settings_of
from tests.engine.conftest import CONFIGS, SMALL, write_model
from tests.engine.helpers import (
    adapter,
    backward,
    buffers,
    examples,
    files,
    random_adapter,
    sample,
    sample_all,
)

LARGER = {
    **SMALL,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
}
LENGTHS = {"cpu": (9, 17, 5), "cuda": (700, 1500, 64, 1, 33, 900)}
TIMES = {"cpu": 5, "cuda": 20}
ROWS = {"cpu": (16, 32), "cuda": (16, 32, 256)}
PARAMS = AdamParams(learning_rate=0.01, weight_decay=0.1, grad_clip_norm=1.0)


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def directory(device: str, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    config = CONFIGS["llama"] if device == "cpu" else LlamaConfig(**LARGER)
    return write_model(tmp_path_factory.mktemp(device) / "llama", config, tokenizer)


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def model(request: pytest.FixtureRequest, device: str, directory: Path) -> Iterator[Model]:
    with settings_of(device):
        yield load_model("m", str(directory), device=device, dtype=request.param)


def train(model: Model, state: RunState, *seeds: int) -> list[bytes]:
    """Make steps. Returns the bits of their logprobs, and of the state after them."""
    kind = model.device.type
    seen = []
    for seed in seeds:
        found = backward(model, state, examples(seed, LENGTHS[kind]))
        seen += [each["logprobs"].tobytes() for each in found.outputs]
        make_step(state, PARAMS)
    return [*seen, *buffers(state).values()]


def test_a_pass_has_the_same_bits_each_time(model: Model, device: str) -> None:
    state = model.new_run(AdapterConfig(rank=16, seed=1))
    train(model, state, 0)
    seen = set()
    for _ in range(TIMES[device]):
        state.arena.buffers["grads"].zero_()
        result = backward(model, state, examples(1, LENGTHS[device]))
        logprobs = [each["logprobs"].tobytes() for each in result.outputs]
        seen.add((*logprobs, buffers(state)["grads"]))
    assert len(seen) == 1
    assert any(buffers(state)["grads"])


def test_restored_run_equals_the_uninterrupted_one(model: Model, device: str) -> None:
    config = AdapterConfig(rank=16, seed=1)
    state, restored = model.new_run(config), model.new_run(config, initialise=False)
    train(model, state, 0, 1)
    backward(model, state, examples(9, LENGTHS[device]))  # gradients are pending
    content, meta = files(state, optimizer=True)
    expected = train(model, state, 2, 3)
    restored.restore(content, meta, optimizer=True)
    assert train(model, restored, 2, 3) == expected


def test_capture_that_is_written_while_training_goes_on_is_exact(model: Model) -> None:
    state = model.new_run(AdapterConfig(rank=16, seed=1))
    train(model, state, 0)
    for number in range(4):
        expected, _ = files(state, optimizer=True)
        capture = state.capture(optimizer=True)
        found: dict[str, bytes] = {}

        def write() -> None:
            for name, chunks in capture.files(once=True).items():  # noqa: B023  joined below
                found[name] = b"".join(map(bytes, chunks))  # noqa: B023
            capture.release()  # noqa: B023

        writer = threading.Thread(target=write)
        if number % 2:
            train(model, state, number)  # before anything is read
        writer.start()
        train(model, state, number + 1)
        writer.join()
        assert found == expected


def test_sample_has_the_same_bits_among_any_number_of_rows(model: Model, device: str) -> None:
    first, second = random_adapter(model, 1), random_adapter(model, 2)
    wanted = SampleSpec(np.arange(1, 12), max_tokens=12, seed=7, use_eos=False)
    alone = {used: sample(model, wanted, used).sequences[0] for used in (None, first)}
    for rows in ROWS[device]:
        half = (rows - 2) // 2
        crowd = [
            (SampleSpec(np.arange(3, 20), half, max_tokens=20, seed=1, use_eos=False), second),
            (SampleSpec(np.arange(5, 9), half, max_tokens=20, seed=2, use_eos=False), first),
        ]
        found = sample_all(model, [*crowd, (wanted, None), (wanted, first)])
        for used, output in zip((None, first), found[2:], strict=True):
            assert output.sequences[0].tokens.tolist() == alone[used].tokens.tolist()
            assert output.sequences[0].logprobs.tobytes() == alone[used].logprobs.tobytes()


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0.7},
    {"top_k": 40},
    {"top_p": 0.9},
    {"top_k": 60, "top_p": 0.9, "temperature": 1.3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_device_draws_the_hosts_tokens_among_any_number_of_rows(
    device: str, settings: dict[str, Any]
) -> None:
    vocabulary = {"cpu": 1003, "cuda": 151_936}[device]
    count = max(ROWS[device])
    logits = np.random.default_rng(1).normal(0, 3, (count, vocabulary)).astype(np.float32)
    logits = logits.round(2)  # with equal ones
    spec = SampleSpec(np.arange(1, 3), topk_sample_logprobs=3, **settings)

    def draw(rows: int) -> Chosen:
        streams = [stream(1, row) for row in range(rows)]
        with settings_of(device):
            on_device = torch.from_numpy(logits[:rows]).to(device)
            return device_choice.draw(on_device, [Rows(slice(0, rows), spec, streams)])[0]

    everything = draw(count).draws
    host = token_choice.draw(logits, spec, [stream(1, row) for row in range(count)])
    assert everything.tokens == host.tokens
    assert everything.logprobs == pytest.approx(host.logprobs, abs=1e-6)
    assert [t[0].tolist() for t in everything.top] == [t[0].tolist() for t in host.top]
    for rows in (1, *ROWS[device]):
        few = draw(rows).draws
        assert few.tokens == everything.tokens[:rows]
        assert few.logprobs == everything.logprobs[:rows]  # to the bit
        for ours, theirs in zip(few.top, everything.top[:rows], strict=True):
            assert ours[1].tobytes() == theirs[1].tobytes()


def digest_of(model: Model) -> str:
    """Hash the bits of training and of a sample with its result."""
    state = model.new_run(AdapterConfig(rank=16, seed=1))
    hasher = hashlib.sha256(b"".join(train(model, state, 0, 1)))
    spec = SampleSpec(np.arange(1, 9), 3, max_tokens=8, seed=4, use_eos=False)
    for sequence in sample(model, spec, adapter(model, state)).sequences:
        hasher.update(sequence.tokens.tobytes() + sequence.logprobs.tobytes())
    return hasher.hexdigest()


_PROGRAM = """
import json, sys
import torch
from everstep.engine import load_model
from tests.engine.test_device_exactness import digest_of

torch.set_num_threads(1)
print(json.dumps(digest_of(load_model("m", sys.argv[1], device=sys.argv[2], dtype=sys.argv[3]))))
"""


@pytest.mark.slow
@pytest.mark.long(reason="another process imports torch and loads the model")
def test_fresh_process_computes_the_same_bits(model: Model, device: str, directory: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(directory), device, model.info.dtype],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert json.loads(run.stdout) == digest_of(model)
