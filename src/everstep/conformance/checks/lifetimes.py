"""Lifetimes: ttl_seconds is bounded, listed as expires_at, and enforced."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

from everstep.conformance.bench import Bench
from everstep.conformance.operations import route_absent
from everstep.conformance.registry import check
from everstep.conformance.runs import Run, saved_path
from everstep.conformance.verdicts import NotSupported, PromiseBroken
from everstep.wire import types

_HOUR = 3600
_OVER_TEN_YEARS = 11 * 366 * 24 * _HOUR
_MAX_CLOCK_SKEW = timedelta(minutes=10)
_EXPIRY_WAIT_SECONDS = 15.0
_POLL_SECONDS = 0.2


@check(
    "ttl",
    "ttl_seconds is honoured: a checkpoint with one is listed with expires_at, one without is not, "
    "and invalid values are refused.",
)
def ttl(bench: Bench) -> str | None:
    """Use an hour, no ttl_seconds, and values out of bounds."""
    run = bench.from_base()
    for index, seconds in enumerate((0, -5, _OVER_TEN_YEARS)):
        outcome = run.save(f"never-{index}", ttl_seconds=seconds).outcome()
        outcome.must_blame_user(f"ttl_seconds={seconds} was not refused.")
    hour = run.save("hour", ttl_seconds=_HOUR).outcome()
    hour.must_succeed("A save with ttl_seconds=3600 failed.")
    sampler = run.save_for_sampler("hour", ttl_seconds=_HOUR).outcome()
    sampler.must_succeed("A save for sampling with ttl_seconds=3600 failed.")
    always = run.save("always").outcome().require("Saving a checkpoint")
    listed = bench.checkpoints(run)
    for outcome in (hour, sampler):
        _must_expire(listed, saved_path(outcome), _HOUR, outcome.sent)
    entry = listed.get(saved_path(always))
    if entry is None or entry.expires_at is not None:
        raise PromiseBroken(
            "A save without ttl_seconds is not listed as permanent.",
            always.sent,
            f"listed as {entry}",
        )
    return _must_expire_soon(bench, run)


@check(
    "ttl-change",
    "PUT …/ttl sets a checkpoint's ttl_seconds from now on, and null clears it.",
)
def ttl_change(bench: Bench) -> None:
    """Set and clear it, and read the list each time."""
    run = bench.from_base()
    path = saved_path(run.save("changed").outcome().require("Saving a checkpoint"))
    url = f"/training_runs/{run.model_id}/checkpoints/weights/changed/ttl"
    answer = bench.session.transport.send("PUT", url, {"ttl_seconds": 2 * _HOUR})
    if route_absent(answer):
        raise NotSupported(f"PUT …/ttl answers {answer.status}")
    if not answer.ok:
        raise PromiseBroken("ttl_seconds could not be set.", answer.sent, answer.came_back)
    _must_expire(bench.checkpoints(run), path, 2 * _HOUR, answer.sent)
    answer = bench.session.transport.send("PUT", url, {"ttl_seconds": None})
    if not answer.ok:
        raise PromiseBroken("ttl_seconds could not be cleared.", answer.sent, answer.came_back)
    entry = bench.checkpoints(run).get(path)
    if entry is None or entry.expires_at is not None:
        raise PromiseBroken("ttl_seconds was not cleared.", answer.sent, f"listed as {entry}")


def _must_expire(listed: dict[str, types.Checkpoint], path: str, seconds: int, sent: str) -> None:
    entry = listed.get(path)
    if entry is None:
        raise PromiseBroken(
            "A checkpoint with ttl_seconds is not listed.", sent, str(sorted(listed))
        )
    if entry.expires_at is None:
        raise PromiseBroken("A checkpoint with ttl_seconds is listed without expires_at.", sent)
    wanted = datetime.now(UTC) + timedelta(seconds=seconds)
    expires = entry.expires_at
    expires = expires if expires.tzinfo else expires.replace(tzinfo=UTC)
    if abs(expires - wanted) > _MAX_CLOCK_SKEW:
        raise PromiseBroken(
            f"expires_at is not {seconds} s from now, which would be {wanted:%Y-%m-%d %H:%M} UTC.",
            sent,
            f"expires_at {expires.isoformat()}",
        )


def _must_expire_soon(bench: Bench, run: Run) -> str | None:
    """Check that a checkpoint of one second expires, if that is allowed."""
    brief = run.save("brief", ttl_seconds=1).outcome()
    if brief.blames_user:
        return "a short ttl_seconds is refused, so the expiry itself was not tested"
    path = saved_path(brief.must_succeed("A save with ttl_seconds=1 failed."))
    deadline = time.monotonic() + _EXPIRY_WAIT_SECONDS
    while path in bench.checkpoints(run):
        if time.monotonic() > deadline:
            waited = f"{_EXPIRY_WAIT_SECONDS:.0f} s"
            text = f"A checkpoint with ttl_seconds=1 is still listed after {waited}."
            raise PromiseBroken(text, brief.sent)
        time.sleep(_POLL_SECONDS)
    load = bench.session.create_from_state(path, optimizer=True)
    load.must_blame_user("An expired checkpoint was loaded.")
    return None
