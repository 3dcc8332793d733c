"""Numerics: choices of arithmetic that a run keeps, and what they do to its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from everstep.engine import AdapterConfig, Model, RunState, load_model
from everstep.engine.kernels.low_rank import AdaptedProduct
from everstep.engine.kernels.low_rank_base import AdaptedBaseProduct
from everstep.engine.numerics import (
    MAX_TOKENS,
    MIN_TOKENS,
    TOKENS_PER_MICRO_BATCH,
    Numerics,
    tokens_per_micro_batch,
)
from tests.engine.helpers import backward, buffers, examples

GIB = 1 << 30
LLAMA_8B = [
    *[(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096)] * 32,
    *[(4096, 14336), (4096, 14336), (14336, 4096)] * 32,
    (4096, 128256),
]


@pytest.mark.parametrize(
    ("device", "tokens"), [(24, 512), (80, 4096), (141, 8192), (8, MIN_TOKENS), (4096, MAX_TOKENS)]
)
def test_micro_batches_follow_the_devices_memory(device: int, tokens: int) -> None:
    assert tokens_per_micro_batch(LLAMA_8B, 2, 16 * GIB, device * GIB) == tokens


def test_more_memory_never_means_fewer_tokens() -> None:
    found = [tokens_per_micro_batch(LLAMA_8B, 2, 16 * GIB, size * GIB) for size in range(400)]
    assert found == sorted(found)
    assert len(set(found)) > 4
    assert all(tokens.bit_count() == 1 for tokens in found)


@pytest.mark.parametrize("numerics", [Numerics(), Numerics(8192), Numerics(256, "base")])
def test_environment_records_them(numerics: Numerics) -> None:
    assert Numerics.recorded({"threads": 2, **numerics.environment()}) == numerics


def test_float32_products_add_no_name_to_the_environment() -> None:
    assert Numerics().environment() == {"micro_batch_tokens": TOKENS_PER_MICRO_BATCH}
    assert Numerics.recorded({"threads": 2}) is Numerics.recorded(None) is None


def test_run_keeps_its_own_micro_batches(llama: Model) -> None:
    def gradients(tokens: int) -> bytes:
        state = llama.new_run(AdapterConfig(rank=4, seed=1), numerics=Numerics(tokens))
        backward(llama, state, examples(1, (40, 30, 20)))
        return buffers(state)["grads"]

    assert gradients(2048) == gradients(4096)
    assert gradients(2048) != gradients(32), "the partition moves bits"


# Products in the base's dtype


@pytest.fixture(scope="module")
def half(directories: dict[str, Path]) -> Model:
    return load_model(
        "llama", str(directories["llama"]), device="cpu", dtype="bfloat16", lora_products="base"
    )


def gradients(model: Model, products: str) -> torch.Tensor:
    state = model.new_run(AdapterConfig(rank=4, seed=1), numerics=Numerics(2048, products))
    noise = torch.Generator().manual_seed(1)
    state.arena.buffers["params"].normal_(0, 0.05, generator=noise)
    backward(model, state, examples(1, (40, 30, 20)))
    return state.arena.buffers["grads"]


def test_base_products_are_near_those_in_float32(half: Model) -> None:
    wide, own = gradients(half, "float32"), gradients(half, "base")
    assert wide.norm() > 0.1
    assert 0 < (wide - own).norm() < 3e-2 * wide.norm()
    assert torch.equal(own, gradients(half, "base"))


def test_new_runs_have_the_models_choice(half: Model, llama: Model) -> None:
    def new(model: Model) -> RunState:
        return model.new_run(AdapterConfig(rank=4, seed=1))

    assert new(half).numerics.lora_products == "base"
    assert new(llama).numerics == Numerics()


def test_float32_weights_have_float32_products(directories: dict[str, Path]) -> None:
    model = load_model("m", str(directories["llama"]), device="cpu", lora_products="base")
    assert model.new_run(AdapterConfig(rank=4, seed=1)).numerics == Numerics()


def test_sums_of_base_products_are_in_float32() -> None:
    """One large number and many small ones: sums in bfloat16 would lose all of these."""
    rows = 1024
    x = torch.full((rows, 1), 2.0**-8, dtype=torch.bfloat16)
    x[0] = 1.0
    a, b = torch.ones(1, 1), torch.zeros(1, 1)
    weight = torch.zeros(1, 1, dtype=torch.bfloat16)
    found: dict[Any, list[torch.Tensor]] = {}
    for product in (AdaptedProduct, AdaptedBaseProduct):
        leaves = [each.clone().requires_grad_() for each in (a, b)]
        y = product.apply(x, x.float(), weight, None, *leaves, 1.0)  # type: ignore[no-untyped-call]
        found[product] = list(torch.autograd.grad(y.sum(), leaves))
    assert float(found[AdaptedBaseProduct][1]) == 1 + (rows - 1) * 2.0**-8
    for one, other in zip(*found.values(), strict=True):
        assert torch.equal(one, other)
        assert other.dtype == torch.float32
