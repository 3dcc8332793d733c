"""Threads of a pass: one computes a small micro-batch, and their number is put back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from everstep.engine import Model, numerics, training_pass
from everstep.engine.errors import Diverged
from everstep.engine.kernels import threads
from tests.engine.helpers import backward, examples, trained

THREADS = 2


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def used(model: Model, monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...]) -> set[int]:
    """Return the numbers of threads that compute a pass."""
    found = set()
    state = trained(model)
    original = type(model).text_states

    def text_states(*args: torch.Tensor) -> torch.Tensor:
        found.add(torch.get_num_threads())
        hidden = original(*args)  # type: ignore[arg-type]
        hidden.register_hook(lambda gradient: found.add(torch.get_num_threads()))  # type: ignore[no-untyped-call]
        return hidden

    monkeypatch.setattr(type(model), "text_states", text_states)
    backward(model, state, examples(1, lengths))
    return found


@pytest.mark.usefixtures("two_threads")
def test_a_small_pass_is_computed_by_one_thread(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "MIN_WORK", 40 * llama.size)
    assert used(llama, monkeypatch, (20, 19)) == {1}
    assert torch.get_num_threads() == THREADS


@pytest.mark.usefixtures("two_threads")
def test_a_larger_pass_is_computed_by_all_threads(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "MIN_WORK", 40 * llama.size)
    assert used(llama, monkeypatch, (20, 20)) == {THREADS}
    assert torch.get_num_threads() == THREADS


@pytest.mark.usefixtures("two_threads")
def test_threads_are_put_back_between_micro_batches_and_after_a_failure(llama: Model) -> None:
    state, data = trained(llama), examples(1, (60, 60))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numerics, "TOKENS_PER_MICRO_BATCH", 64)
        state.numerics = numerics.Numerics()
        steps = training_pass.forward_backward(
            llama, state, data, "cross_entropy", {}, backward=True
        )
        next(steps)
        assert torch.get_num_threads() == THREADS
        steps.close()
    state.arena.buffers["params"].fill_(float("nan"))
    with pytest.raises(Diverged):
        backward(llama, state, data)
    assert torch.get_num_threads() == THREADS
