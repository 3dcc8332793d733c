"""Order: operations are executed by sequence id, in whatever order they arrive."""

from __future__ import annotations

from everstep.conformance.bench import LEARNING_RATE, Bench
from everstep.conformance.numbers import Trace
from everstep.conformance.registry import check
from everstep.conformance.verdicts import PromiseBroken

_WAIT_SECONDS = 0.3


@check(
    "chunk-order",
    "Chunks of one forward_backward may arrive in any order, as clients send them. The run equals "
    "one whose chunks arrived in order.",
)
def chunk_order(bench: Bench) -> None:
    """Send chunks 2, 3, 1 of three, then the step, and once more with the step before chunk 1."""
    expected = _passes(bench, [0, 1, 2, 3, 4])
    for arrival in ([1, 2, 0, 3, 4], [1, 2, 3, 0, 4]):
        bench.must_equal(
            _passes(bench, arrival),
            expected,
            "Chunks were not executed in the order of their seq_id.",
            f"forward_backward 1, 2, 3, optim_step 4, forward 5, sent in the order "
            f"{', '.join(str(i + 1) for i in arrival)}",
        )


@check(
    "gaps-wait",
    "An operation whose seq_id leaves a gap waits for the missing operation, and is executed after "
    "it.",
)
def gaps_wait(bench: Bench) -> None:
    """Send a step before its gradients."""
    reference = bench.from_base()
    reference.forward_backward(bench.data())
    reference.optim_step(LEARNING_RATE)
    expected = bench.logprobs(reference)
    run = bench.from_base()
    first, second = run.reserve(2)
    step = run.optim_step(LEARNING_RATE, seq_id=second)
    if step.completes_within(_WAIT_SECONDS):
        text = "An operation did not wait for the one before it."
        raise PromiseBroken(text, step.submit.sent, step.outcome().came_back)
    run.forward_backward(bench.data(), seq_id=first).outcome().require("forward_backward")
    step.outcome().must_succeed("An operation that had waited for the one before it failed.")
    bench.must_equal(bench.logprobs(run), expected, "A gap was not waited for.", step.submit.sent)


def _passes(bench: Bench, arrival: list[int]) -> Trace:
    """Submit three chunks, a step and a forward. Returns the results by sequence id."""
    run = bench.from_base()
    ids = run.reserve(5)
    submit = [
        lambda: run.forward_backward(bench.data(0), seq_id=ids[0]),
        lambda: run.forward_backward(bench.data(5), seq_id=ids[1]),
        lambda: run.forward_backward(bench.data(9), seq_id=ids[2]),
        lambda: run.optim_step(LEARNING_RATE, seq_id=ids[3]),
        lambda: run.forward(bench.data(0), seq_id=ids[4]),
    ]
    sent = {index: submit[index]() for index in arrival}
    sent[3].outcome().must_succeed("A step after chunks that arrived out of order failed.")
    return [bench.point(sent[index]) for index in (0, 1, 2, 4)]
