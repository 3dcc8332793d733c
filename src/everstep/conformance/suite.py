"""Suite: connects to a service, runs the checks, and cleans up."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from everstep.conformance.bench import Bench
from everstep.conformance.registry import Check, all_checks
from everstep.conformance.runs import Session
from everstep.conformance.transport import Transport, Unreachable
from everstep.conformance.verdicts import CheckEnded, CheckError, Result, Verdict
from everstep.wire import types

_DEFAULT_TIMEOUT = 120.0


@dataclass(frozen=True)
class Target:
    """The service to check.

    Attributes:
        base_url: its address.
        api_key: a key.
        second_api_key: a key of another account.
        model: the base model to train. None: the first one that the service lists.
        timeout: seconds to wait for one result.
    """

    base_url: str
    api_key: str
    second_api_key: str | None = None
    model: str | None = None
    timeout: float = _DEFAULT_TIMEOUT


class UnknownCheck(ValueError):
    """No check has that name."""


def chosen(names: Sequence[str]) -> list[Check]:
    """Return the checks of these names, or all of them if none is given.

    Raises:
        UnknownCheck: no check has one of the names.
    """
    checks = all_checks()
    unknown = [name for name in names if name not in {check.name for check in checks}]
    if unknown:
        known = ", ".join(check.name for check in checks)
        raise UnknownCheck(f"There is no check {unknown[0]!r}. The checks are {known}.")
    return [check for check in checks if not names or check.name in names]


@contextlib.contextmanager
def opened(target: Target) -> Iterator[Bench]:
    """Connect to a service, and delete the checks' checkpoints at the end.

    Raises:
        Unreachable: the service does not respond.
        CheckError: the service responds, but can't train a run.
    """
    with contextlib.ExitStack() as stack:
        transport = Transport(target.base_url, target.api_key)
        stack.callback(transport.close)
        model = target.model or _first_model(transport)
        session = Session(transport, target.timeout)
        stack.callback(_clean_up, session)
        session.json_passes = _needs_json(Bench(session, model))
        stranger = None
        if target.second_api_key is not None:
            other = Transport(target.base_url, target.second_api_key)
            stack.callback(other.close)
            stranger = Session(other, target.timeout)
            stack.callback(_clean_up, stranger)
        yield Bench(session, model, stranger)


def run(bench: Bench, checks: Sequence[Check]) -> Iterator[Result]:
    """Run checks, and yield the result of each."""
    for check in checks:
        begin = time.monotonic()
        try:
            remark = check.body(bench) or ""
        except CheckEnded as end:
            outcome = (end.verdict, end.detail, end.sent, end.came_back)
        except Unreachable as error:
            outcome = (Verdict.ERROR, "The service did not respond.", str(error), "")
        except ValidationError as error:
            text = f"A response can't be parsed: {error.errors()[0]['msg']}"
            outcome = (Verdict.ERROR, text, "", "")
        else:
            outcome = (Verdict.PASS, remark, "", "")
        seconds = time.monotonic() - begin
        yield Result(check.name, check.promise, *outcome, seconds=seconds)


def _first_model(transport: Transport) -> str:
    answer = transport.send("GET", "/get_server_capabilities")
    if not answer.ok:
        raise CheckError("The service does not list its models", answer.sent, answer.came_back)
    try:
        models = types.GetServerCapabilitiesResponse.model_validate(answer.json()).supported_models
    except ValidationError:
        models = []
    for model in models:
        if model.model_name and model.trainable is not False:
            return model.model_name
    raise CheckError("The service lists no trainable model", answer.sent, answer.came_back)


def _needs_json(bench: Bench) -> bool:
    """Return whether training passes have to be JSON: protobuf is refused, but JSON isn't."""
    outcome = bench.new_run().forward(bench.data()).outcome()
    if outcome.ok or outcome.status == 200:
        return False
    bench.session.json_passes = True
    bench.new_run().forward(bench.data()).outcome().require("A training pass")
    return True


def _clean_up(session: Session) -> None:
    """Delete the checks' checkpoints, as far as possible, and end the session."""
    with contextlib.suppress(Unreachable, CheckEnded):
        for each in session.runs:
            bench = Bench(session, "")
            for checkpoint in bench.checkpoints(each).values():
                bench.delete(each, checkpoint.checkpoint_id)
        session.finish()
