"""Operations are executed by their sequence ids, in whatever order they arrive."""

from __future__ import annotations

from everstep.conformance.bench import LEARNING_RATE, Bench
from everstep.conformance.numbers import Trace
from everstep.conformance.registry import check
from everstep.conformance.verdicts import Broken

_WAIT_SECONDS = 0.3


@check(
    "chunk-order",
    "Chunks of one forward_backward may arrive in any order, as clients send them; the run comes "
    "to be what it would be had they arrived in theirs.",
)
def chunk_order(bench: Bench) -> None:
    """Chunks 2, 3, 1 of three, then the step; and once more with the step before chunk 1."""
    expected = _passes(bench, [0, 1, 2, 3, 4])
    for arrival in ([1, 2, 0, 3, 4], [1, 2, 3, 0, 4]):
        bench.must_equal(
            _passes(bench, arrival),
            expected,
            "Chunks were not executed by their seq_id.",
            f"forward_backward 1, 2, 3, optim_step 4, forward 5, sent in the order "
            f"{', '.join(str(i + 1) for i in arrival)}",
        )


@check(
    "gaps-wait",
    "An operation whose seq_id leaves a gap waits until the missing one has come, and is then "
    "executed after it.",
)
def gaps_wait(bench: Bench) -> None:
    """A step that arrives before its gradients."""
    reference = bench.from_base()
    reference.forward_backward(bench.data())
    reference.optim_step(LEARNING_RATE)
    expected = bench.look(reference)
    run = bench.from_base()
    first, second = run.take(2)
    step = run.optim_step(LEARNING_RATE, seq_id=second)
    if step.settles_within(_WAIT_SECONDS):
        text = "An operation did not wait for the one before it."
        raise Broken(text, step.submit.sent, step.outcome().came_back)
    run.forward_backward(bench.data(), seq_id=first).outcome().needed("forward_backward")
    step.outcome().must("An operation that had waited for the one before it failed.")
    bench.must_equal(bench.look(run), expected, "A gap was not waited for.", step.submit.sent)


def _passes(bench: Bench, arrival: list[int]) -> Trace:
    """Three chunks, a step, a look: what each gives, by sequence id."""
    run = bench.from_base()
    ids = run.take(5)
    submit = [
        lambda: run.forward_backward(bench.data(0), seq_id=ids[0]),
        lambda: run.forward_backward(bench.data(5), seq_id=ids[1]),
        lambda: run.forward_backward(bench.data(9), seq_id=ids[2]),
        lambda: run.optim_step(LEARNING_RATE, seq_id=ids[3]),
        lambda: run.forward(bench.data(0), seq_id=ids[4]),
    ]
    sent = {index: submit[index]() for index in arrival}
    sent[3].outcome().must("A step after chunks that arrived out of order failed.")
    return [bench.point(sent[index]) for index in (0, 1, 2, 4)]
