"""Tenants: another key gives no access to a run, its checkpoints and its results."""

from __future__ import annotations

from collections.abc import Callable

from everstep.conformance.bench import Bench
from everstep.conformance.registry import check
from everstep.conformance.runs import Run, Session, saved_path
from everstep.conformance.verdicts import NotSupported, PromiseBroken
from everstep.wire import types

Attempt = Callable[[], tuple[bool, str, str]]
"""Returns whether it worked, the request, and the response."""


@check(
    "isolation",
    "Another key gives no access to a run, its checkpoints and its results: they can't be read, "
    "loaded, sampled from, listed, trained or deleted.",
)
def isolation(bench: Bench) -> str:
    """Try everything that takes an id with the second key."""
    stranger = bench.stranger
    if stranger is None:
        raise NotSupported("the check needs a second key (--second-api-key)")
    run = bench.from_base()
    save = run.save("mine")
    path = saved_path(save.outcome().require("Saving a checkpoint"))
    before = bench.logprobs(run)
    attempts = _attempts(stranger, run, bench.from_base(), path, save.request_id or "")
    tried = {action: attempt() for action, attempt in attempts.items()}
    worked = {action: result for action, result in tried.items() if result[0]}
    if len(worked) == len(tried):
        raise NotSupported("the service does not distinguish keys: everything belongs to everyone")
    for action, (_, sent, came_back) in worked.items():
        raise PromiseBroken(f"With another key it was possible to {action}.", sent, came_back)
    if path not in bench.checkpoints(run):
        raise PromiseBroken(
            "With another key a checkpoint was deleted, although the request was refused."
        )
    bench.must_equal(bench.logprobs(run), before, "With another key a run was changed.")
    return f"{len(tried)} attempts were refused"


def _attempts(
    stranger: Session, run: Run, bait: Run, path: str, request_id: str
) -> dict[str, Attempt]:
    """Return the attempts of a stranger, harmless ones first.

    Args:
        stranger: the session of the second key.
        run: a run of the first key.
        bait: another run of the first key, to be trained. The sequence id of its next operation is
            unknown afterwards.
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
