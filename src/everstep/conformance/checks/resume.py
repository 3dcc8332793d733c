"""Resume: a run that is restored with its optimizer continues as if it had never stopped."""

from __future__ import annotations

from everstep.conformance.bench import Bench
from everstep.conformance.numbers import Trace, difference
from everstep.conformance.registry import check
from everstep.conformance.runs import Run, saved_path
from everstep.conformance.verdicts import NotSupported, PromiseBroken

_STEPS_AFTER = 2
_SHIFT_AFTER = 10


@check(
    "exact-resume",
    "A run saved at step k and restored with its optimizer gives the losses and logprobs of the "
    "uninterrupted run, bit for bit.",
)
def exact_resume(bench: Bench) -> None:
    """Save between two steps."""
    _, path, expected = _interrupted(bench, pending=False)
    _must_be_exact(bench, path, expected)


@check(
    "exact-resume-pending",
    "The same holds for a run saved with pending gradients, which are part of its state.",
)
def exact_resume_pending(bench: Bench) -> None:
    """Save between a forward_backward and its optim_step."""
    _, path, expected = _interrupted(bench, pending=True)
    _must_be_exact(bench, path, expected)


@check(
    "exact-resume-live",
    "The same holds for a live run that has trained further and loads the checkpoint with its "
    "optimizer.",
)
def exact_resume_live(bench: Bench) -> None:
    """Load into the run that saved, after further training, with gradients pending."""
    run, path, expected = _interrupted(bench, pending=True)
    run.forward_backward(bench.data(77))
    load = run.load(path, optimizer=True).outcome()
    if not load.ok and "not permitted" in load.error:
        raise NotSupported("the service only allows a load as a run's first operation")
    load.must_succeed(
        "A checkpoint could not be loaded with its optimizer into the run that saved it."
    )
    apart = difference(_continue(bench, run), expected)
    if apart.count:
        raise PromiseBroken(
            "The run does not continue as the one that was saved.",
            load.sent,
            bench.describe(apart),
        )


@check(
    "optimizer-restored",
    "A run restored with its optimizer continues as if uninterrupted, and one restored without it "
    "does not: the optimizer state is really restored, and really left out.",
)
def optimizer_restored(bench: Bench) -> None:
    """Compare three runs: uninterrupted = resumed ≠ cold."""
    _, path, uninterrupted = _interrupted(bench, pending=False)
    resumed = bench.session.create_from_state(path, optimizer=True)
    resumed.must_succeed("A checkpoint could not be restored with its optimizer.")
    resumed_trace = _continue(bench, bench.session.run_of(resumed, "load_weights"))
    cold = bench.session.create_from_state(path, optimizer=False)
    cold.must_succeed("A checkpoint could not be restored without its optimizer.")
    cold_trace = _continue(bench, bench.session.run_of(cold, "load_weights"))
    bench.must_equal(
        cold_trace[:1], uninterrupted[:1], "Restored weights are not those saved.", cold.sent
    )
    bench.must_equal(
        resumed_trace,
        uninterrupted,
        "The run restored with its optimizer differs from the uninterrupted one.",
        resumed.sent,
    )
    bench.must_differ(
        cold_trace,
        uninterrupted,
        "The run restored without its optimizer continues as if it had it: the state leaked in.",
        cold.sent,
    )


def _interrupted(bench: Bench, *, pending: bool) -> tuple[Run, str, Trace]:
    """Train a run that saves twice and continues at once.

    Returns:
        The run, its second checkpoint, and the results of its further training.
    """
    run = bench.new_run()
    bench.train(run, 1)
    run.save("early")
    bench.train(run, 1, shift=5)
    if pending:
        run.forward_backward(bench.data(50))
    save = run.save("half")
    expected = _continue(bench, run)
    return run, saved_path(save.outcome().require("Saving a checkpoint")), expected


def _continue(bench: Bench, run: Run) -> Trace:
    return bench.train(run, _STEPS_AFTER, shift=_SHIFT_AFTER)


def _must_be_exact(bench: Bench, path: str, expected: Trace) -> None:
    restored = bench.session.create_from_state(path, optimizer=True)
    restored.must_succeed("A checkpoint could not be restored with its optimizer.")
    resumed = _continue(bench, bench.session.run_of(restored, "load_weights"))
    apart = difference(resumed, expected)
    if apart.count:
        raise PromiseBroken(
            "The resumed run differs from the uninterrupted one.",
            restored.sent,
            bench.describe(apart),
        )
