"""Loads: one without the optimizer is cold, and a restored run keeps its adapter's settings."""

from __future__ import annotations

from typing import Any

from everstep.conformance.bench import Bench
from everstep.conformance.registry import check
from everstep.conformance.runs import saved_path
from everstep.conformance.verdicts import NotSupported, PromiseBroken

_STEPS = 2
_FLAGS = {"train_attn": True, "train_mlp": False, "train_unembed": False}
_RANK = 4
_LEAK = "Optimizer state leaked into a load without it."


@check(
    "cold-load",
    "A run created from a checkpoint without its optimizer equals a new run with those weights: no "
    "moment, step count or pending gradient is restored.",
)
def cold_load(bench: Bench) -> None:
    """Steps of learning rate 0 give moments and a count, and leave the weights unchanged."""
    fresh, trained = _fresh_and_trained(bench)
    expected = bench.train(bench.run_from(fresh), _STEPS)
    cold = bench.session.create_from_state(trained, optimizer=False)
    cold.must_succeed("A checkpoint could not be restored without its optimizer.")
    trace = bench.train(bench.session.run_of(cold, "load_weights"), _STEPS)
    bench.must_equal(trace[:1], expected[:1], "Restored weights are not those saved.", cold.sent)
    bench.must_equal(trace, expected, _LEAK, cold.sent)


@check(
    "cold-load-live",
    "A load without the optimizer into a live run clears the run's moments, step count and pending "
    "gradients.",
)
def cold_load_live(bench: Bench) -> None:
    """Load into a run in the middle of its training."""
    fresh, trained = _fresh_and_trained(bench)
    expected = bench.train(bench.run_from(fresh), _STEPS)
    run = bench.from_base()
    bench.train(run, 2, shift=60)
    run.forward_backward(bench.data(77))
    load = run.load(trained, optimizer=False).outcome()
    if not load.ok and "not permitted" in load.error:
        raise NotSupported("the service only allows a load as a run's first operation")
    load.must_succeed("A checkpoint could not be loaded into a live run.")
    trace = bench.train(run, _STEPS)
    bench.must_equal(trace[:1], expected[:1], "Loaded weights are not those saved.", load.sent)
    bench.must_equal(trace, expected, _LEAK, load.sent)


@check(
    "lora-flags",
    "Rank and train_attn, train_mlp, train_unembed are kept: weights_info returns them, and a run "
    "created from the checkpoint has them.",
)
def lora_flags(bench: Bench) -> None:
    """Save a run with non-default settings, create another from it, and save that."""
    created = bench.session.create(bench.model, rank=_RANK, **_FLAGS)
    if created.blames_user:
        raise NotSupported(f"the service does not take rank {_RANK} with train_attn alone")
    run = bench.session.run_of(created, "create_model")
    bench.train(run, 1)
    path = saved_path(run.save("flags").outcome().require("Saving a checkpoint"))
    _must_have_flags(bench, path, "weights_info of the checkpoint")
    again = bench.session.create_from_state(path, optimizer=True)
    again.must_succeed("A checkpoint could not be restored with its optimizer.")
    restored = bench.session.run_of(again, "load_weights")
    kept = saved_path(restored.save("again").outcome().require("Saving a checkpoint"))
    _must_have_flags(bench, kept, "weights_info of a checkpoint saved by a run created from it")


def _fresh_and_trained(bench: Bench) -> tuple[str, str]:
    """Save the same weights twice: new, and with optimizer state and pending gradients."""
    run = bench.new_run()
    fresh = saved_path(run.save("fresh").outcome().require("Saving a checkpoint"))
    bench.train(run, 2, shift=40, learning_rate=0.0)
    run.forward_backward(bench.data(50))
    return fresh, saved_path(run.save("worn").outcome().require("Saving a checkpoint"))


def _must_have_flags(bench: Bench, path: str, where: str) -> None:
    answer = bench.info(path)
    if answer.status in (405, 501):
        raise NotSupported("the service has no weights_info")
    if not answer.ok:
        raise PromiseBroken(f"{where} was refused.", answer.sent, answer.came_back)
    wanted: dict[str, Any] = {"lora_rank": _RANK, **_FLAGS}
    wrong = [
        f"{field} is {answer.json().get(field)}, saved was {value}"
        for field, value in wanted.items()
        if answer.json().get(field) != value
    ]
    if wrong:
        raise PromiseBroken(f"{where}: {'; '.join(wrong)}.", answer.sent, answer.came_back)
