"""Training and sampler checkpoints are two kinds: apart by name, and good for different things."""

from __future__ import annotations

from everstep.conformance.bench import Bench
from everstep.conformance.operations import route_absent
from everstep.conformance.registry import check
from everstep.conformance.runs import saved_path
from everstep.conformance.verdicts import Broken, NotSupported


@check(
    "same-name-apart",
    "weights/x and sampler_weights/x are two checkpoints: each gives its own weights.",
)
def same_name_apart(bench: Bench) -> None:
    """Save both under one name, a step apart."""
    run = bench.from_base()
    save = run.save("twin").outcome().needed("Saving a checkpoint")
    then = bench.look(run)
    bench.train(run, 1)
    control = run.save_for_sampler("control").outcome().needed("Saving for sampling")
    twin = run.save_for_sampler("twin").outcome()
    twin.must("A name taken under weights/ could not be used under sampler_weights/.")
    if saved_path(save) == saved_path(twin):
        raise Broken("Both kinds got one path.", twin.sent, twin.came_back)
    bench.must_equal(
        bench.look(bench.run_from(saved_path(save))),
        then,
        "weights/twin no longer gives the weights it was saved with.",
        twin.sent,
    )
    bench.must_equal(
        bench.sample_from(saved_path(twin)),
        bench.sample_from(saved_path(control)),
        "sampler_weights/twin does not give the weights it was saved with.",
        twin.sent,
    )


@check(
    "delete-apart",
    "Deleting a checkpoint ends it, and it alone: the one of the other kind with its name stays.",
)
def delete_apart(bench: Bench) -> None:
    """Delete weights/x beside sampler_weights/x."""
    run = bench.from_base()
    training = saved_path(run.save("twin").outcome().needed("Saving a checkpoint"))
    sampler = saved_path(run.save_for_sampler("twin").outcome().needed("Saving for sampling"))
    answer = bench.delete(run, "weights/twin")
    if not answer.ok:
        raise Broken("A checkpoint could not be deleted.", answer.sent, answer.came_back)
    listed = bench.checkpoints(run)
    if training in listed:
        raise Broken("A deleted checkpoint is still listed.", answer.sent, str(sorted(listed)))
    load = bench.session.create_from_state(training, optimizer=True)
    load.must_blame_user("A deleted checkpoint could not be refused when it was loaded.")
    if sampler not in listed:
        raise Broken(
            "Deleting weights/twin deleted sampler_weights/twin.", answer.sent, str(sorted(listed))
        )
    answer = bench.sampler(sampler)
    if not answer.ok:
        raise Broken(
            "With weights/twin deleted, sampler_weights/twin can't be sampled from.",
            answer.sent,
            answer.came_back,
        )


@check(
    "external-apart",
    "external_weights/x is a checkpoint of its own beside the others with its name, and its "
    "name is taken.",
)
def external_apart(bench: Bench) -> None:
    """Save all three kinds under one name, the external one twice; delete that one."""
    run = bench.from_base()
    others = {saved_path(run.save("all").outcome().needed("Saving a checkpoint"))}
    others.add(saved_path(run.save_for_sampler("all").outcome().needed("Saving for sampling")))
    pending = run.save_external("all")
    if route_absent(pending.submit):
        raise NotSupported("the service has no external checkpoints")
    saved = pending.outcome()
    saved.must("A name taken under weights/ could not be used under external_weights/.")
    external = saved_path(saved)
    if external in others:
        raise Broken("Two kinds got one path.", saved.sent, saved.came_back)
    again = run.save_external("all").outcome()
    again.must_blame_user("A name was taken twice under external_weights/.")
    answer = bench.delete(run, "external_weights/all")
    if not answer.ok:
        raise Broken("A checkpoint could not be deleted.", answer.sent, answer.came_back)
    listed = set(bench.checkpoints(run))
    if listed & {external, *others} != others:
        raise Broken(
            "Deleting external_weights/all did not delete it alone.", answer.sent, str(listed)
        )


@check(
    "optimizer-of-sampler",
    "Loading a sampler checkpoint with the optimizer fails and says so: there is no optimizer "
    "state in it, and no cold start in its place.",
)
def optimizer_of_sampler(bench: Bench) -> None:
    """As a new run and into a live one, beside a training checkpoint of the same name."""
    run = bench.from_base()
    run.save("only").outcome().needed("Saving a checkpoint")
    name = saved_path(run.save_for_sampler("only").outcome().needed("Saving for sampling"))
    promise = "A sampler checkpoint was loaded with an optimizer state that it doesn't have."
    bench.session.create_from_state(name, optimizer=True).must_blame_user(promise)
    run.load(name, optimizer=True).outcome().must_blame_user(promise)


@check(
    "sampling-of-kinds",
    "A sampler checkpoint can be sampled from; a training checkpoint gives its own weights or is "
    "refused; a path that names nothing is refused.",
)
def sampling_of_kinds(bench: Bench) -> str | None:
    """Create samplers on the three."""
    run = bench.from_base()
    sampler = saved_path(run.save_for_sampler("same").outcome().needed("Saving for sampling"))
    training = saved_path(run.save("same").outcome().needed("Saving a checkpoint"))
    wanted = bench.sample_from(sampler)
    absent = bench.sampler(run.path_of("sampler_weights", "never-saved"))
    if absent.ok or not absent.refused:
        raise Broken("A sampler on nothing was not refused.", absent.sent, absent.came_back)
    answer = bench.sampler(training)
    if answer.refused:
        return "training checkpoints can't be sampled from"
    if not answer.ok:
        raise Broken(
            "A sampler on a training checkpoint failed as if the service had.",
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
