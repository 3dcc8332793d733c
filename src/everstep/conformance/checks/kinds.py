"""Kinds: training and sampler checkpoints have separate names and different uses."""

from __future__ import annotations

from everstep.conformance.bench import Bench
from everstep.conformance.operations import route_absent
from everstep.conformance.registry import check
from everstep.conformance.runs import saved_path
from everstep.conformance.verdicts import NotSupported, PromiseBroken


@check(
    "same-name-apart",
    "weights/x and sampler_weights/x are two checkpoints: each gives its own weights.",
)
def same_name_apart(bench: Bench) -> None:
    """Save both kinds under one name, a step apart."""
    run = bench.from_base()
    save = run.save("shared").outcome().require("Saving a checkpoint")
    then = bench.logprobs(run)
    bench.train(run, 1)
    control = run.save_for_sampler("control").outcome().require("Saving for sampling")
    sampler = run.save_for_sampler("shared").outcome()
    sampler.must_succeed("A name used under weights/ could not be used under sampler_weights/.")
    if saved_path(save) == saved_path(sampler):
        raise PromiseBroken("Both kinds got one path.", sampler.sent, sampler.came_back)
    bench.must_equal(
        bench.logprobs(bench.run_from(saved_path(save))),
        then,
        "weights/shared no longer gives the weights it was saved with.",
        sampler.sent,
    )
    bench.must_equal(
        bench.sample_from(saved_path(sampler)),
        bench.sample_from(saved_path(control)),
        "sampler_weights/shared does not give the weights it was saved with.",
        sampler.sent,
    )


@check(
    "delete-apart",
    "Deleting a checkpoint deletes no other: the one of the other kind with its name stays.",
)
def delete_apart(bench: Bench) -> None:
    """Delete weights/x beside sampler_weights/x."""
    run = bench.from_base()
    training = saved_path(run.save("shared").outcome().require("Saving a checkpoint"))
    sampler = saved_path(run.save_for_sampler("shared").outcome().require("Saving for sampling"))
    answer = bench.delete(run, "weights/shared")
    if not answer.ok:
        raise PromiseBroken("A checkpoint could not be deleted.", answer.sent, answer.came_back)
    listed = bench.checkpoints(run)
    if training in listed:
        raise PromiseBroken(
            "A deleted checkpoint is still listed.", answer.sent, str(sorted(listed))
        )
    load = bench.session.create_from_state(training, optimizer=True)
    load.must_blame_user("A load of a deleted checkpoint was not refused.")
    if sampler not in listed:
        raise PromiseBroken(
            "Deleting weights/shared deleted sampler_weights/shared.",
            answer.sent,
            str(sorted(listed)),
        )
    answer = bench.sampler(sampler)
    if not answer.ok:
        raise PromiseBroken(
            "With weights/shared deleted, sampler_weights/shared can't be sampled from.",
            answer.sent,
            answer.came_back,
        )


@check(
    "external-apart",
    "external_weights/x is a checkpoint separate from the others with its name, and its name "
    "can't be used twice.",
)
def external_apart(bench: Bench) -> None:
    """Save all three kinds under one name, the external one twice, and delete that one."""
    run = bench.from_base()
    others = {saved_path(run.save("all").outcome().require("Saving a checkpoint"))}
    others.add(saved_path(run.save_for_sampler("all").outcome().require("Saving for sampling")))
    pending = run.save_external("all")
    if route_absent(pending.submit):
        raise NotSupported("the service has no external checkpoints")
    saved = pending.outcome()
    saved.must_succeed("A name used under weights/ could not be used under external_weights/.")
    external = saved_path(saved)
    if external in others:
        raise PromiseBroken("Two kinds got one path.", saved.sent, saved.came_back)
    again = run.save_external("all").outcome()
    again.must_blame_user("A name was used twice under external_weights/.")
    answer = bench.delete(run, "external_weights/all")
    if not answer.ok:
        raise PromiseBroken("A checkpoint could not be deleted.", answer.sent, answer.came_back)
    listed = set(bench.checkpoints(run))
    if listed & {external, *others} != others:
        raise PromiseBroken(
            "Deleting external_weights/all did not delete it alone.", answer.sent, str(listed)
        )


@check(
    "optimizer-of-sampler",
    "Loading a sampler checkpoint with the optimizer fails: it has no optimizer state, and a cold "
    "start must not replace it.",
)
def optimizer_of_sampler(bench: Bench) -> None:
    """Load as a new run and into a live one, beside a training checkpoint of the same name."""
    run = bench.from_base()
    run.save("only").outcome().require("Saving a checkpoint")
    name = saved_path(run.save_for_sampler("only").outcome().require("Saving for sampling"))
    promise = "A sampler checkpoint was loaded with an optimizer state that it doesn't have."
    bench.session.create_from_state(name, optimizer=True).must_blame_user(promise)
    run.load(name, optimizer=True).outcome().must_blame_user(promise)


@check(
    "sampling-of-kinds",
    "A sampler checkpoint can be sampled from, a training checkpoint gives its own weights or is "
    "refused, and a path that names nothing is refused.",
)
def sampling_of_kinds(bench: Bench) -> str | None:
    """Create samplers on a checkpoint of each kind and on a missing one."""
    run = bench.from_base()
    sampler = saved_path(run.save_for_sampler("same").outcome().require("Saving for sampling"))
    training = saved_path(run.save("same").outcome().require("Saving a checkpoint"))
    wanted = bench.sample_from(sampler)
    absent = bench.sampler(run.path_of("sampler_weights", "never-saved"))
    if absent.ok or not absent.refused:
        raise PromiseBroken(
            "A sampler on a path that names nothing was not refused.", absent.sent, absent.came_back
        )
    answer = bench.sampler(training)
    if answer.refused:
        return "the service refuses to sample from training checkpoints"
    if not answer.ok:
        raise PromiseBroken(
            "A sampler on a training checkpoint failed with a server error.",
            answer.sent,
            answer.came_back,
        )
    sampler_id = str(answer.json().get("sampling_session_id"))
    bench.must_equal(
        bench.sample(sampler_id, 0),
        wanted,
        "A sampler on a training checkpoint gives other weights.",
        answer.sent,
    )
    return None
