"""A run that goes on from a checkpoint with its optimizer is the run that never stopped."""

from __future__ import annotations

from everstep.conformance.bench import Bench
from everstep.conformance.numbers import Trace, difference
from everstep.conformance.registry import check
from everstep.conformance.runs import Run, saved_path
from everstep.conformance.verdicts import Broken, NotSupported

_STEPS_AFTER = 2
_SHIFT_AFTER = 10


@check(
    "exact-resume",
    "A run saved at step k and created again from there with its optimizer gives the losses and "
    "logprobs of the run that was never interrupted, bit for bit.",
)
def exact_resume(bench: Bench) -> None:
    """Save between two steps."""
    _, path, expected = _interrupted(bench, pending=False)
    _must_be_exact(bench, path, expected)


@check(
    "exact-resume-pending",
    "The same holds for a run saved with gradients that no step has used yet: they are part of "
    "its state.",
)
def exact_resume_pending(bench: Bench) -> None:
    """Save between a forward_backward and its optim_step."""
    _, path, expected = _interrupted(bench, pending=True)
    _must_be_exact(bench, path, expected)


@check(
    "exact-resume-live",
    "The same holds for a live run that has gone elsewhere and loads the checkpoint with its "
    "optimizer.",
)
def exact_resume_live(bench: Bench) -> None:
    """Load into the run that saved, after it went on, with gradients pending."""
    run, path, expected = _interrupted(bench, pending=True)
    run.forward_backward(bench.data(77))
    load = run.load(path, optimizer=True).outcome()
    if not load.ok and "not permitted" in load.error:
        raise NotSupported("the service takes a load as a run's first operation only")
    load.must("A checkpoint could not be loaded with its optimizer into the run that saved it.")
    apart = difference(_go_on(bench, run), expected)
    if apart.count:
        raise Broken(
            "The run is not the one that was saved: it went on otherwise.",
            load.sent,
            bench.told(apart),
        )


@check(
    "optimizer-restored",
    "Restored with its optimizer a run goes on as if uninterrupted, restored without it it "
    "doesn't: the optimizer's state is really there, and really left out.",
)
def optimizer_restored(bench: Bench) -> None:
    """Three-way: uninterrupted = resumed ≠ cold."""
    _, path, uninterrupted = _interrupted(bench, pending=False)
    resumed = bench.session.create_from_state(path, optimizer=True)
    resumed.must("A checkpoint could not be restored with its optimizer.")
    resumed_trace = _go_on(bench, bench.session.run_of(resumed, "load_weights"))
    cold = bench.session.create_from_state(path, optimizer=False)
    cold.must("A checkpoint could not be restored without its optimizer.")
    cold_trace = _go_on(bench, bench.session.run_of(cold, "load_weights"))
    bench.must_equal(
        cold_trace[:1], uninterrupted[:1], "Restored weights are not those saved.", cold.sent
    )
    bench.must_equal(
        resumed_trace,
        uninterrupted,
        "The run restored with its optimizer goes on otherwise than the uninterrupted one.",
        resumed.sent,
    )
    bench.must_differ(
        cold_trace,
        uninterrupted,
        "The run restored without its optimizer goes on as if it had it: the state leaked in.",
        cold.sent,
    )


def _interrupted(bench: Bench, *, pending: bool) -> tuple[Run, str, Trace]:
    """A run that saves twice and goes on at once; its second checkpoint, and what came after."""
    run = bench.new_run()
    bench.train(run, 1)
    run.save("early")
    bench.train(run, 1, shift=5)
    if pending:
        run.forward_backward(bench.data(50))
    save = run.save("half")
    expected = _go_on(bench, run)
    return run, saved_path(save.outcome().needed("Saving a checkpoint")), expected


def _go_on(bench: Bench, run: Run) -> Trace:
    return bench.train(run, _STEPS_AFTER, shift=_SHIFT_AFTER)


def _must_be_exact(bench: Bench, path: str, expected: Trace) -> None:
    restored = bench.session.create_from_state(path, optimizer=True)
    restored.must("A checkpoint could not be restored with its optimizer.")
    resumed = _go_on(bench, bench.session.run_of(restored, "load_weights"))
    apart = difference(resumed, expected)
    if apart.count:
        raise Broken(
            "The resumed run is not the uninterrupted one.", restored.sent, bench.told(apart)
        )
