"""Samplers: sampling and training do not affect each other."""

from __future__ import annotations

from everstep.conformance.bench import LEARNING_RATE, Bench
from everstep.conformance.numbers import Trace
from everstep.conformance.registry import check
from everstep.conformance.runs import Run, saved_path
from everstep.conformance.verdicts import NotSupported


@check(
    "sampling-leaves-run",
    "Sampling from an older checkpoint of a run does not change the live run's weights, moments "
    "and pending gradients.",
)
def sampling_leaves_run(bench: Bench) -> None:
    """Sample between gradients and their step."""
    expected = _train_around(bench, bench.from_base(), None)
    run = bench.from_base()
    old = saved_path(run.save_for_sampler("old").outcome().require("Saving for sampling"))
    trace = _train_around(bench, run, old)
    bench.must_equal(
        trace,
        expected,
        "Sampling from an older checkpoint changed the live run.",
        f"create_sampling_session and asample with model_path {old}",
    )


@check(
    "sampler-stays",
    "A sampler keeps the weights it was created from while its run is trained further.",
)
def sampler_stays(bench: Bench) -> None:
    """Use a named and an unnamed sampler."""
    run = bench.from_base()
    saved = run.save_for_sampler("named").outcome().require("Saving for sampling")
    samplers = [bench.sampler_id(saved_path(saved))]
    unnamed = run.save_for_sampler(None).outcome()
    if unnamed.ok:
        samplers.append(str(unnamed.value.get("sampling_session_id")))
    before = [bench.sample(sampler, 0) for sampler in samplers]
    bench.train(run, 2)
    moved = run.save_for_sampler("moved").outcome().require("Saving for sampling")
    if bench.same(bench.sample_from(saved_path(moved)), before[0]):
        raise NotSupported("training does not change the samples")
    for sampler, wanted in zip(samplers, before, strict=True):
        bench.must_equal(
            bench.sample(sampler, 1),
            wanted,
            "A sampler changed when its run was trained further.",
            f"asample with sampling_session_id {sampler}",
        )


def _train_around(bench: Bench, run: Run, old: str | None) -> Trace:
    trace = bench.train(run, 2)
    run.forward_backward(bench.data(50))
    if old is not None:
        bench.sample_from(old)
    run.optim_step(LEARNING_RATE)
    return [*trace, *bench.train(run, 2, shift=20)]
