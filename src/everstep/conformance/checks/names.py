"""Names: invalid names and paths are refused, and change nothing."""

from __future__ import annotations

from everstep.conformance.bench import Bench
from everstep.conformance.numbers import Trace
from everstep.conformance.operations import route_absent
from everstep.conformance.registry import check
from everstep.conformance.runs import Run, saved_path
from everstep.conformance.transport import short
from everstep.conformance.verdicts import NotSupported, PromiseBroken

BAD_NAMES = (
    "",
    ".",
    "..",
    "../../x",
    "../bystander",
    "a/b",
    "/etc/x",
    "a\\..\\b",
    "%2e%2e",
    "%2e%2e%2fx",
    "a?b",
    "a#b",
    "a\x00b",
    "a\nb",
    "x" * 1000,
)


@check(
    "bad-names",
    "A save under an invalid name (../../x, %2e%2e, empty, very long, …) is refused as a wrong "
    "request, and changes nothing.",
)
def bad_names(bench: Bench) -> None:
    """Save both kinds, beside a checkpoint that has to stay unchanged."""
    bystander, path, before = _bystander(bench)
    run = bench.from_base()
    refused = [
        (name, submit(name)) for name in BAD_NAMES for submit in (run.save, run.save_for_sampler)
    ]
    for name, pending in refused:
        pending.outcome().must_blame_user(f"A checkpoint could be named {short(repr(name), 60)}.")
    sent = "saves under invalid names"
    if listed := bench.checkpoints(run):
        raise PromiseBroken("A refused name is listed.", sent, str(sorted(listed)))
    _must_be_unchanged(bench, bystander, path, before, sent)


@check(
    "bad-paths",
    "Paths that are not tinker://<run>/<kind>/<name> are refused by every call that takes one, and "
    "lead to no checkpoint.",
)
def bad_paths(bench: Bench) -> None:
    """Use path traversals to an existing checkpoint."""
    bystander, path, before = _bystander(bench)
    run = bench.from_base()
    other = f"{bystander.model_id}/weights/bystander"
    detours = (
        f"tinker://{run.model_id}/weights/../../{other}",
        f"tinker://{run.model_id}/weights/%2e%2e%2f%2e%2e%2f{other}",
        f"tinker://{run.model_id}/../{other}",
        f"tinker://{other}/",
        f"tinker:///{other}",
        f"/{other}",
        f"tinker://{bystander.model_id}/weights/./bystander",
        "tinker://",
        "",
    )
    for detour in detours:
        outcome = bench.session.create_from_state(detour, optimizer=False)
        outcome.must_blame_user("A run could be created from an invalid path.")
        answer = bench.info(detour)
        if not answer.refused and not route_absent(answer):
            text = "weights_info did not refuse an invalid path."
            raise PromiseBroken(text, answer.sent, answer.came_back)
        answer = bench.sampler(detour)
        if not answer.refused and not route_absent(answer):
            text = "A sampler could be created on an invalid path."
            raise PromiseBroken(text, answer.sent, answer.came_back)
    _must_be_unchanged(bench, bystander, path, before, "invalid paths")


@check(
    "bad-deletions",
    "A deletion through an encoded path traversal deletes nothing.",
)
def bad_deletions(bench: Bench) -> None:
    """Use %2e%2e, %2f and the like in the address of another run's checkpoint."""
    bystander, path, before = _bystander(bench)
    run = bench.from_base()
    here = saved_path(run.save("here").outcome().require("Saving a checkpoint"))
    up = f"%2e%2e/%2e%2e/{bystander.model_id}/checkpoints/weights/bystander"
    detours = (
        f"weights/{up}",
        f"weights/{up.replace('/', '%2f')}",
        f"%2e%2e/%2e%2e/{up}",
        "weights/%2e%2e%2fweights%2fhere",
        "sampler_weights/%2e%2e/weights/here",
        "%2e/weights/here",
        "weights/",
        "weights/%2e",
        "%2a/here",
        "weights/%2a",
    )
    sent = ""
    for detour in detours:
        answer = bench.delete(run, detour)
        if answer.status >= 500:
            text = "A deletion through a path traversal failed with a server error."
            raise PromiseBroken(text, answer.sent, answer.came_back)
        sent = answer.sent
        if here not in bench.checkpoints(run):
            raise PromiseBroken(
                "A deletion through a path traversal deleted a checkpoint.", sent, here
            )
    _must_be_unchanged(bench, bystander, path, before, sent)
    if route_absent(bench.delete(run, "weights/here")):
        raise NotSupported("the service does not delete checkpoints")


def _bystander(bench: Bench) -> tuple[Run, str, Trace]:
    """Create a run with a checkpoint that must not change, and return its logprobs."""
    run = bench.from_base()
    path = saved_path(run.save("bystander").outcome().require("Saving a checkpoint"))
    return run, path, bench.logprobs(run)


def _must_be_unchanged(bench: Bench, run: Run, path: str, before: Trace, sent: str) -> None:
    listed = sorted(bench.checkpoints(run))
    if listed != [path]:
        raise PromiseBroken("Another run's checkpoints were changed.", sent, f"it has {listed}")
    load = bench.session.create_from_state(path, optimizer=True)
    load.must_succeed("Another run's checkpoint can no longer be loaded.")
    after = bench.logprobs(bench.session.run_of(load, "load_weights"))
    bench.must_equal(after, before, "Another run's checkpoint gives other weights.", sent)
