"""Running the checks: connect, check one after another, clean up."""

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
from everstep.conformance.verdicts import CheckEnded, Result, Stuck, Verdict
from everstep.wire import types

_DEFAULT_TIMEOUT = 120.0


@dataclass(frozen=True)
class Target:
    """The service to look at.

    Attributes:
        base_url: its address.
        api_key: a key.
        second_api_key: another one, of somebody else.
        model: the base model to train; None takes the first that is listed.
        timeout: seconds to wait for one result.
    """

    base_url: str
    api_key: str
    second_api_key: str | None = None
    model: str | None = None
    timeout: float = _DEFAULT_TIMEOUT


class UnknownCheck(ValueError):
    """There is no check of that name."""


def chosen(names: Sequence[str]) -> list[Check]:
    """The checks of these names; all of them where none is given.

    Raises:
        UnknownCheck: there is none of that name.
    """
    checks = all_checks()
    unknown = [name for name in names if name not in {check.name for check in checks}]
    if unknown:
        known = ", ".join(check.name for check in checks)
        raise UnknownCheck(f"There is no check {unknown[0]!r}; there are {known}.")
    return [check for check in checks if not names or check.name in names]


@contextlib.contextmanager
def opened(target: Target) -> Iterator[Bench]:
    """Connect to a service; what the checks made there is deleted at the end.

    Raises:
        Unreachable: it does not answer.
        Stuck: it answers, but no run can be trained on it.
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
    """Run checks; yields what came of each."""
    for check in checks:
        begin = time.monotonic()
        try:
            remark = check.body(bench) or ""
        except CheckEnded as end:
            told = (end.verdict, end.detail, end.sent, end.came_back)
        except Unreachable as error:
            told = (Verdict.ERROR, "The service did not answer.", str(error), "")
        except ValidationError as error:
            text = f"An answer can't be read: {error.errors()[0]['msg']}"
            told = (Verdict.ERROR, text, "", "")
        else:
            told = (Verdict.PASS, remark, "", "")
        seconds = time.monotonic() - begin
        yield Result(check.name, check.promise, *told, seconds=seconds)


def _first_model(transport: Transport) -> str:
    answer = transport.send("GET", "/get_server_capabilities")
    if not answer.ok:
        raise Stuck("The service does not list its models", answer.sent, answer.came_back)
    try:
        models = types.GetServerCapabilitiesResponse.model_validate(answer.json()).supported_models
    except ValidationError:
        models = []
    for model in models:
        if model.model_name and model.trainable is not False:
            return model.model_name
    raise Stuck("The service lists no model to train", answer.sent, answer.came_back)


def _needs_json(bench: Bench) -> bool:
    """Whether training passes have to travel as JSON: protobuf is refused, and JSON isn't."""
    outcome = bench.new_run().forward(bench.data()).outcome()
    if outcome.ok or outcome.status == 200:
        return False
    bench.session.json_passes = True
    bench.new_run().forward(bench.data()).outcome().needed("A training pass")
    return True


def _clean_up(session: Session) -> None:
    """Delete the checkpoints that were made, as far as that is possible, and end the session."""
    with contextlib.suppress(Unreachable, CheckEnded):
        for each in session.runs:
            bench = Bench(session, "")
            for checkpoint in bench.checkpoints(each).values():
                bench.delete(each, checkpoint.checkpoint_id)
        session.finish()
