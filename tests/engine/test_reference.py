"""Comparison of the engine with a plain PEFT and torch loop on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from everstep.engine import (
    AdamParams,
    AdapterConfig,
    Model,
    RunState,
    forward_backward,
    optim_step,
)
from everstep.wire.messages.passes import Example
from tests.engine.helpers import CONFIG, examples, finish


def export(state: RunState, directory: Path) -> Path:
    directory.mkdir()
    capture = state.capture(optimizer=False)
    for name, chunks in capture.files().items():
        (directory / name).write_bytes(b"".join(bytes(chunk) for chunk in chunks))
    capture.release()
    return directory


def reference(
    family: str, directories: dict[str, Path], adapter: Path, dtype: torch.dtype = torch.float32
) -> Any:
    base = AutoModelForCausalLM.from_pretrained(directories[family], dtype=dtype)
    loaded = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)
    loaded.eval()
    return loaded


def reference_loss(module: Any, data: list[Example]) -> torch.Tensor:
    total = torch.zeros(())
    for example in data:
        logits = module(torch.from_numpy(example.tokens).unsqueeze(0)).logits[0].float()
        logprobs = torch.log_softmax(logits, -1)
        targets = torch.from_numpy(example.inputs["target_tokens"]).unsqueeze(1)
        weights = torch.from_numpy(example.inputs["weights"])
        total = total - (logprobs.gather(1, targets)[:, 0] * weights).sum()
    return total


def trainable(module: Any) -> dict[str, torch.Tensor]:
    return {
        name.replace(".default", ""): parameter
        for name, parameter in module.named_parameters()
        if "lora_" in name
    }


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Return the norm of the difference relative to the norm of the second."""
    assert theirs
    difference = torch.cat([(ours[name] - theirs[name]).ravel() for name in theirs])
    norm = torch.cat([each.ravel() for each in theirs.values()]).norm()
    return float((difference.norm() / norm).detach())


def test_loss_gradients_and_five_steps_equal_pefts(
    family: str, model: Model, directories: dict[str, Path], tmp_path: Path
) -> None:
    check_five_steps(model, family, directories, tmp_path, clip=0.0)


def test_five_steps_with_clipping_equal_pefts(
    llama: Model, directories: dict[str, Path], tmp_path: Path
) -> None:
    check_five_steps(llama, "llama", directories, tmp_path, clip=0.5)


def check_five_steps(
    model: Model, family: str, directories: dict[str, Path], tmp_path: Path, clip: float
) -> None:
    state = model.new_run(CONFIG)
    finish(forward_backward(model, state, examples(9), "cross_entropy", {}, backward=True))
    optim_step(state, AdamParams(learning_rate=0.01))  # B is no longer zero
    module = reference(family, directories, export(state, tmp_path / "adapter"))
    parameters = trainable(module)
    assert set(parameters) == set(state.arena.shapes), "PEFT loads every tensor under its name"
    state.arena.buffers["exp_avg"].zero_()
    state.arena.buffers["exp_avg_sq"].zero_()
    state.step = 0
    # A large eps: where a gradient is almost zero, Adam turns its rounding into a whole step.
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=1e-3, betas=(0.9, 0.95), eps=1e-2, weight_decay=0.1
    )
    for step in range(5):
        data = examples(step)
        result = finish(forward_backward(model, state, data, "cross_entropy", {}, backward=True))
        loss = reference_loss(module, data)
        assert result.metrics["loss:sum"] == pytest.approx(float(loss.detach()), rel=1e-6)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = state.arena.views("grads")
        if step == 0:
            theirs = {n: p.grad for n, p in parameters.items() if p.grad is not None}
            assert theirs.keys() == parameters.keys()
            assert distance(gradients, theirs) < 1e-6
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters.values(), clip)
        optimizer.step()
        optim_step(state, AdamParams(1e-3, 0.9, 0.95, 1e-2, 0.1, clip))
    assert distance(state.arena.views("params"), parameters) < 1e-6


def test_exported_files_give_the_same_logits_in_peft(
    family: str, model: Model, directories: dict[str, Path], tmp_path: Path
) -> None:
    state = model.new_run(CONFIG)
    finish(forward_backward(model, state, examples(1), "cross_entropy", {}, backward=True))
    optim_step(state, AdamParams(learning_rate=0.05))
    module = reference(family, directories, export(state, tmp_path / "adapter"))
    tokens = torch.arange(1, 20).unsqueeze(0)
    with torch.no_grad(), model.bind_weights(state.layout, state.leaves()):
        ours = model.logits(model.hidden(tokens))
        theirs = module(tokens).logits
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_wrapped_model_without_adapters_equals_the_base_bit_for_bit(
    family: str, model: Model, directories: dict[str, Path]
) -> None:
    base = AutoModelForCausalLM.from_pretrained(
        directories[family], dtype=torch.float32, attn_implementation="everstep"
    )
    tokens = torch.arange(1, 20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model.logits(model.hidden(tokens)), base(tokens).logits)


def test_a_captured_state_does_not_change_during_training(model: Model) -> None:
    state = model.new_run(CONFIG)
    finish(forward_backward(model, state, examples(1), "cross_entropy", {}, backward=True))
    capture = state.capture(optimizer=True)
    before = {n: b"".join(bytes(c) for c in chunks) for n, chunks in capture.files().items()}
    optim_step(state, AdamParams(learning_rate=0.05))
    finish(forward_backward(model, state, examples(2), "cross_entropy", {}, backward=True))
    after = {n: b"".join(bytes(c) for c in chunks) for n, chunks in capture.files().items()}
    assert before == after
    restored = model.new_run(AdapterConfig(rank=4, seed=99))
    restored.restore({n: memoryview(c) for n, c in before.items()}, capture.meta, optimizer=True)
    capture.release()
    optim_step(restored, AdamParams(learning_rate=0.05))
    finish(forward_backward(model, restored, examples(2), "cross_entropy", {}, backward=True))
    assert restored.adapter_hash() == state.adapter_hash()
    for name in ("grads", "exp_avg", "exp_avg_sq"):
        assert torch.equal(restored.arena.buffers[name], state.arena.buffers[name])


def test_a_pass_of_many_lengths_equals_each_datum_alone(model: Model) -> None:
    data = examples(3, (4, 30, 11, 11, 60, 7))
    state = model.new_run(CONFIG)
    together = finish(forward_backward(model, state, data, "cross_entropy", {}, backward=False))
    for example, output in zip(data, together.outputs, strict=True):
        alone = finish(
            forward_backward(model, state, [example], "cross_entropy", {}, backward=False)
        )
        assert np.allclose(alone.outputs[0]["logprobs"], output["logprobs"], atol=1e-5)
