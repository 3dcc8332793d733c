"""Saves: names are used once or replaced atomically, and a retry is no conflict."""

from __future__ import annotations

from typing import Any

from everstep.conformance.bench import Bench
from everstep.conformance.numbers import Trace
from everstep.conformance.registry import check
from everstep.conformance.runs import Run, saved_path
from everstep.conformance.verdicts import NotSupported, PromiseBroken

_LOADS_DURING_OVERWRITE = 3


@check(
    "name-taken",
    "A save under a used name fails as a wrong request, and the existing checkpoint stays.",
)
def name_taken(bench: Bench) -> None:
    """Save twice under a name, a step apart."""
    run, path, before = _saved(bench, "taken")
    bench.train(run, 1)
    second = run.save("taken").outcome()
    second.must_blame_user("A name was used again without overwrite.")
    bench.must_equal(
        bench.logprobs(bench.run_from(path)),
        before,
        "A refused save changed the checkpoint of that name.",
        second.sent,
    )


@check(
    "overwrite",
    "A save with overwrite replaces the checkpoint atomically. Until then, the old one can be "
    "loaded.",
)
def overwrite(bench: Bench) -> None:
    """Load the name repeatedly while it is replaced."""
    run, path, before = _saved(bench, "replaced", user_metadata={"version": "old"})
    bench.train(run, 1)
    after = bench.logprobs(run)
    bench.must_differ(after, before, "A step changed nothing.")
    pending = run.save("replaced", overwrite=True)
    for _ in range(_LOADS_DURING_OVERWRITE):
        load = bench.session.create_from_state(path, optimizer=True)
        load.must_succeed("While a checkpoint was being replaced, its name could not be loaded.")
        seen = bench.logprobs(bench.session.run_of(load, "load_weights"))
        if not (bench.same(seen, before) or bench.same(seen, after)):
            raise PromiseBroken(
                "While a checkpoint was being replaced, its name gave neither the old weights nor "
                "the new ones.",
                load.sent,
            )
        if pending.completes_within(0):
            break
    replaced = pending.outcome()
    replaced.must_succeed("A save with overwrite under a used name failed.")
    bench.must_equal(
        bench.logprobs(bench.run_from(path)),
        after,
        "After an overwrite the name does not give the new weights.",
        replaced.sent,
    )
    listed = bench.checkpoints(run)
    if path not in listed:
        raise PromiseBroken(
            "An overwritten checkpoint is not listed.", replaced.sent, str(sorted(listed))
        )
    if listed[path].user_metadata:
        raise PromiseBroken(
            "An overwritten checkpoint kept user_metadata of the old one.",
            replaced.sent,
            f"user_metadata {listed[path].user_metadata}",
        )


@check(
    "retried-save",
    "A save that is retried, because its response was lost, gets the same request_id and path, and "
    "does not conflict with itself.",
)
def retried_save(bench: Bench) -> None:
    """Send each save twice, and once more when it is done."""
    run = bench.from_base()
    for operation in ("save_weights", "save_weights_for_sampler"):
        submit = run.save if operation == "save_weights" else run.save_for_sampler
        (seq_id,) = run.reserve()
        first = submit("again", seq_id=seq_id)
        second = submit("again", seq_id=seq_id)
        path = saved_path(first.outcome().require("Saving a checkpoint"))
        third = submit("again", seq_id=seq_id)
        for retry in (second, third):
            outcome = retry.outcome()
            outcome.must_succeed(f"A retried {operation} failed.")
            if retry.request_id != first.request_id or saved_path(outcome) != path:
                raise PromiseBroken(
                    f"A retried {operation} became another operation; the first one was "
                    f"{first.request_id}.",
                    retry.submit.sent,
                    retry.submit.came_back,
                )


@check(
    "retried-sampler",
    "An unnamed save for sampling that is retried, with another sampling_session_seq_id as clients "
    "send it, gets the same request_id and sampler.",
)
def retried_sampler(bench: Bench) -> None:
    """Retry with the next sampling_session_seq_id, as clients do."""
    run = bench.from_base()
    (seq_id,) = run.reserve()
    first = run.save_for_sampler(None, seq_id=seq_id)
    if first.outcome().blames_user:
        raise NotSupported("the service does not support unnamed saves for sampling")
    sampler = first.outcome().require("Saving for sampling").value.get("sampling_session_id")
    retry = run.save_for_sampler(None, seq_id=seq_id)
    again = retry.outcome()
    again.must_succeed("A retried save for sampling failed.")
    if retry.request_id != first.request_id or again.value.get("sampling_session_id") != sampler:
        raise PromiseBroken(
            f"A retried save for sampling became another one; the first one was "
            f"{first.request_id}, sampler {sampler}.",
            again.sent,
            again.came_back,
        )


@check(
    "retried-step",
    "A forward_backward and an optim_step that are retried are applied once.",
)
def retried_step(bench: Bench) -> None:
    """Compare with a run to which each request was sent once."""
    expected = bench.train(bench.from_base(), 2)
    run = bench.from_base()
    trace, retried = [], ""
    for step in range(2):
        first, second = run.reserve(2)
        passes = [run.forward_backward(bench.data(step), seq_id=first) for _ in range(2)]
        updates = [run.optim_step(2e-3, seq_id=second) for _ in range(2)]
        for pair in (passes, updates):
            pair[1].outcome().must_succeed("A retried operation failed.")
        trace.append(bench.point(passes[0]))
        retried = updates[1].submit.sent
    trace.append(bench.point(run.forward(bench.data())))
    bench.must_equal(trace, expected, "A retried operation was applied twice.", retried)


@check(
    "unnamed-save",
    "Saves without a name get different names: none replaces another.",
)
def unnamed_save(bench: Bench) -> None:
    """Save twice without a name, a step apart."""
    run = bench.from_base()
    before = bench.logprobs(run)
    first = run.save(None).outcome()
    if first.blames_user:
        raise NotSupported("the service requires a name for every save")
    first.require("Saving without a name")
    bench.train(run, 1)
    second = run.save(None).outcome()
    second.must_succeed("A second save without a name failed.")
    if saved_path(first) == saved_path(second):
        raise PromiseBroken("Two saves without a name got one path.", second.sent, second.came_back)
    bench.must_equal(
        bench.logprobs(bench.run_from(saved_path(first))),
        before,
        "A second save without a name changed the first.",
        second.sent,
    )


def _saved(bench: Bench, name: str, **options: Any) -> tuple[Run, str, Trace]:
    run = bench.from_base()
    path = saved_path(run.save(name, **options).outcome().require("Saving a checkpoint"))
    return run, path, bench.logprobs(run)
