"""Failures: a failed operation uses its sequence id and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from everstep.conformance.bench import LEARNING_RATE, Bench
from everstep.conformance.numbers import Trace
from everstep.conformance.operations import Pending
from everstep.conformance.registry import check
from everstep.conformance.runs import Run, saved_path
from everstep.conformance.verdicts import NotSupported, PromiseBroken
from everstep.wire import types

_NO_TOKEN = 2**30


@check(
    "failed-operation",
    "A forward_backward that fails uses its seq_id, so that later operations continue, and leaves "
    "no gradient.",
)
def failed_operation(bench: Bench) -> str:
    """Submit a good datum and a bad one in one request: neither leaves a gradient."""
    expected = bench.train(bench.from_base(), 2)
    for fault, submit in _BAD.items():
        run = bench.from_base()
        failed = submit(bench, run).outcome()
        if failed.ok:
            continue
        failed.must_blame_user(f"A forward_backward with {fault} did not fail.")
        bench.must_equal(
            bench.train(run, 2),
            expected,
            f"A forward_backward with {fault} failed and left something behind.",
            failed.sent,
        )
        return f"tried with {fault}"
    raise NotSupported(f"the service refuses none of: {', '.join(_BAD)}")


@check(
    "failed-load",
    "A load that fails leaves the run as it was: weights, moments and pending gradients.",
)
def failed_load(bench: Bench) -> None:
    """Load missing checkpoints, an invalid path, and an optimizer state that doesn't exist."""
    run = bench.from_base()
    saved = run.save_for_sampler("weak").outcome().require("Saving for sampling")
    wrong = [
        (run.path_of("weights", "never-saved"), False),
        (run.path_of("weights", "never-saved"), True),
        ("not a path", False),
        (saved_path(saved), True),
    ]
    expected, _ = _around(bench, bench.from_base(), [])
    trace, sent = _around(bench, run, wrong)
    bench.must_equal(trace, expected, "A load that failed changed the run.", sent)


@check(
    "failed-create",
    "A run whose checkpoint can't be loaded is not created.",
)
def failed_create(bench: Bench) -> None:
    """Create a run from a missing checkpoint, then request that run."""
    run = bench.from_base()
    number = bench.session.next_run()
    outcome = bench.session.create_from_state(
        run.path_of("weights", "never-saved"), optimizer=False, model_seq_id=number
    )
    outcome.must_blame_user("A run was created from a checkpoint that does not exist.")
    model_id = f"{bench.session.session_id}:train:{number}"
    answer = bench.session.post("/get_info", types.GetInfoRequest(model_id=model_id))
    if not answer.refused:
        text = "A run exists although its checkpoint could not be loaded."
        raise PromiseBroken(text, answer.sent, answer.came_back)


def _around(bench: Bench, run: Run, loads: Sequence[tuple[str, bool]]) -> tuple[Trace, str]:
    """Train with failing loads between gradients and their step. Also returns the last request."""
    trace = bench.train(run, 2)
    run.forward_backward(bench.data(50))
    sent = ""
    for path, optimizer in loads:
        outcome = run.load(path, optimizer=optimizer).outcome()
        outcome.must_blame_user("A load of a checkpoint that can't be loaded did not fail.")
        sent = outcome.sent
    run.optim_step(LEARNING_RATE)
    return [*trace, *bench.train(run, 2, shift=20)], sent


def _token_outside(bench: Bench, run: Run) -> Pending:
    good, bad = bench.data(count=2)
    tokens = [1, _NO_TOKEN, *bad.model_input.to_ints()[2:]]
    return run.forward_backward(
        [good, bad.model_copy(update={"model_input": types.ModelInput.from_ints(tokens)})]
    )


def _targets_too_short(bench: Bench, run: Run) -> Pending:
    good, bad = bench.data(count=2)
    inputs = {**bad.loss_fn_inputs, "target_tokens": types.TensorData([1, 2], "int64")}
    return run.forward_backward([good, bad.model_copy(update={"loss_fn_inputs": inputs})])


def _unknown_loss(bench: Bench, run: Run) -> Pending:
    return run.forward_backward(bench.data(count=2), loss_fn="no_such_loss")


_BAD: dict[str, Callable[[Bench, Run], Pending]] = {
    "a token outside of the vocabulary": _token_outside,
    "too few targets": _targets_too_short,
    "an unknown loss": _unknown_loss,
}
