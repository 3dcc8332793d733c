"""Nothing of one key can be read, used or deleted with another."""

from __future__ import annotations

from collections.abc import Callable

from everstep.conformance.bench import Bench
from everstep.conformance.registry import check
from everstep.conformance.runs import Run, Session, saved_path
from everstep.conformance.verdicts import Broken, NotSupported
from everstep.wire import types

Attempt = Callable[[], tuple[bool, str, str]]
"""Whether it worked, what was sent, what came back."""


@check(
    "isolation",
    "With another key a run, its checkpoints and its results can't be read, loaded, sampled from, "
    "listed, trained or deleted.",
)
def isolation(bench: Bench) -> str:
    """Everything that takes an id, tried with the second key."""
    stranger = bench.stranger
    if stranger is None:
        raise NotSupported("it takes a second key (--second-api-key)")
    run = bench.from_base()
    save = run.save("mine")
    path = saved_path(save.outcome().needed("Saving a checkpoint"))
    before = bench.look(run)
    attempts = _attempts(stranger, run, bench.from_base(), path, save.request_id or "")
    tried = {what: attempt() for what, attempt in attempts.items()}
    worked = {what: told for what, told in tried.items() if told[0]}
    if len(worked) == len(tried):
        raise NotSupported("the service does not tell keys apart: everything is everyone's")
    for what, (_, sent, came_back) in worked.items():
        raise Broken(f"With another key it was possible to {what}.", sent, came_back)
    if path not in bench.checkpoints(run):
        raise Broken("With another key a checkpoint was deleted, though that was refused.")
    bench.must_equal(bench.look(run), before, "With another key a run was changed.")
    return f"{len(tried)} attempts were refused"


def _attempts(
    stranger: Session, run: Run, bait: Run, path: str, request_id: str
) -> dict[str, Attempt]:
    """What a stranger may try, the harmless first.

    Args:
        stranger: who tries.
        run: whose is tried.
        bait: another run of the same key, to be trained; which place its next operation has is
            not known afterwards.
        path: a checkpoint of the run.
        request_id: an operation of the run.
    """
    there = f"/training_runs/{run.model_id}"
    send = stranger.transport.send

    def read(method: str, url: str, body: dict[str, object] | None = None) -> Attempt:
        def attempt() -> tuple[bool, str, str]:
            answer = send(method, url, body)
            return answer.ok and "error" not in answer.json(), answer.sent, answer.came_back

        return attempt

    def listed(url: str, text: str) -> Attempt:
        def attempt() -> tuple[bool, str, str]:
            answer = send("GET", url)
            return text in answer.body.decode(errors="replace"), answer.sent, answer.came_back

        return attempt

    def load() -> tuple[bool, str, str]:
        outcome = stranger.create_from_state(path, optimizer=True)
        return outcome.ok, outcome.sent, outcome.came_back

    def step() -> tuple[bool, str, str]:
        request = types.OptimStepRequest(
            model_id=bait.model_id, seq_id=1, adam_params=types.AdamParams()
        )
        outcome = stranger.submit("/optim_step", request).outcome()
        return outcome.ok, outcome.sent, outcome.came_back

    sampler = {
        "session_id": stranger.session_id,
        "sampling_session_seq_id": stranger.next_sampler(),
        "model_path": path,
    }
    return {
        "read a run": read("GET", there),
        "list a run's checkpoints": read("GET", f"{there}/checkpoints"),
        "see a run in the list of runs": listed("/training_runs?limit=100", run.model_id),
        "see a checkpoint in the list of checkpoints": listed("/checkpoints?limit=100", path),
        "read weights_info": read("POST", "/weights_info", {"tinker_path": path}),
        "read a run's model": read("POST", "/get_info", {"model_id": run.model_id}),
        "read a result": read("POST", "/retrieve_future", {"request_id": request_id}),
        "load a checkpoint": load,
        "sample from a checkpoint": read("POST", "/create_sampling_session", sampler),
        "train a run": step,
        "delete a checkpoint": read("DELETE", f"{there}/checkpoints/weights/mine"),
    }
