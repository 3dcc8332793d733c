"""ttl_seconds: within its bounds, listed as expires_at, and meant."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

from everstep.conformance.bench import Bench
from everstep.conformance.operations import route_absent
from everstep.conformance.registry import check
from everstep.conformance.runs import Run, saved_path
from everstep.conformance.verdicts import Broken, NotSupported
from everstep.wire import types

_HOUR = 3600
_ABOVE_TEN_YEARS = 11 * 366 * 24 * _HOUR
_CLOCKS_APART = timedelta(minutes=10)
_SOON_SECONDS = 15.0
_POLL_SECONDS = 0.2


@check(
    "ttl",
    "ttl_seconds is kept: a checkpoint with one is listed with expires_at, one without is not, "
    "and nonsense is refused.",
)
def ttl(bench: Bench) -> str | None:
    """An hour, none at all, and values out of bounds."""
    run = bench.from_base()
    for index, seconds in enumerate((0, -5, _ABOVE_TEN_YEARS)):
        outcome = run.save(f"never-{index}", ttl_seconds=seconds).outcome()
        outcome.must_blame_user(f"ttl_seconds={seconds} was not refused.")
    hour = run.save("hour", ttl_seconds=_HOUR).outcome()
    hour.must("A save with ttl_seconds=3600 failed.")
    sampler = run.save_for_sampler("hour", ttl_seconds=_HOUR).outcome()
    sampler.must("A save for sampling with ttl_seconds=3600 failed.")
    always = run.save("always").outcome().needed("Saving a checkpoint")
    listed = bench.checkpoints(run)
    for outcome in (hour, sampler):
        _must_expire(listed, saved_path(outcome), _HOUR, outcome.sent)
    entry = listed.get(saved_path(always))
    if entry is None or entry.expires_at is not None:
        raise Broken(
            "A save without ttl_seconds is not listed as one that stays.",
            always.sent,
            f"listed as {entry}",
        )
    return _must_end(bench, run)


@check(
    "ttl-change",
    "PUT …/ttl sets a checkpoint's ttl_seconds from now on, and null takes it away.",
)
def ttl_change(bench: Bench) -> None:
    """Set it, clear it, and look at the list each time."""
    run = bench.from_base()
    path = saved_path(run.save("changed").outcome().needed("Saving a checkpoint"))
    url = f"/training_runs/{run.model_id}/checkpoints/weights/changed/ttl"
    answer = bench.session.transport.send("PUT", url, {"ttl_seconds": 2 * _HOUR})
    if route_absent(answer):
        raise NotSupported(f"PUT …/ttl answers {answer.status}")
    if not answer.ok:
        raise Broken("ttl_seconds could not be set.", answer.sent, answer.came_back)
    _must_expire(bench.checkpoints(run), path, 2 * _HOUR, answer.sent)
    answer = bench.session.transport.send("PUT", url, {"ttl_seconds": None})
    if not answer.ok:
        raise Broken("ttl_seconds could not be taken away.", answer.sent, answer.came_back)
    entry = bench.checkpoints(run).get(path)
    if entry is None or entry.expires_at is not None:
        raise Broken("ttl_seconds was not taken away.", answer.sent, f"listed as {entry}")


def _must_expire(listed: dict[str, types.Checkpoint], path: str, seconds: int, sent: str) -> None:
    entry = listed.get(path)
    if entry is None:
        raise Broken("A checkpoint with ttl_seconds is not listed.", sent, str(sorted(listed)))
    if entry.expires_at is None:
        raise Broken("A checkpoint with ttl_seconds is listed without expires_at.", sent)
    wanted = datetime.now(UTC) + timedelta(seconds=seconds)
    expires = entry.expires_at
    expires = expires if expires.tzinfo else expires.replace(tzinfo=UTC)
    if abs(expires - wanted) > _CLOCKS_APART:
        raise Broken(
            f"expires_at is not {seconds} s from now, which would be {wanted:%Y-%m-%d %H:%M} UTC.",
            sent,
            f"expires_at {expires.isoformat()}",
        )


def _must_end(bench: Bench, run: Run) -> str | None:
    """Where so short a life is allowed: it ends."""
    brief = run.save("brief", ttl_seconds=1).outcome()
    if brief.blames_user:
        return "too short a ttl_seconds is refused, so no checkpoint was seen to expire"
    path = saved_path(brief.must("A save with ttl_seconds=1 failed."))
    deadline = time.monotonic() + _SOON_SECONDS
    while path in bench.checkpoints(run):
        if time.monotonic() > deadline:
            text = f"A checkpoint with ttl_seconds=1 is listed after {_SOON_SECONDS:.0f} s."
            raise Broken(text, brief.sent)
        time.sleep(_POLL_SECONDS)
    load = bench.session.create_from_state(path, optimizer=True)
    load.must_blame_user("An expired checkpoint was loaded.")
    return None
