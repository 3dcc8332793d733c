"""The state of a home's service: whether it runs, where, since when, and what it serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import httpx

from everstep import service_home
from everstep.addresses import without_proxies
from everstep.cli.common.errors import Code
from everstep.cli.common.output import messages, print_facts, print_json, size_text, when_text
from everstep.cli.serve.options import command_on
from everstep.cli.serve.process import Client, clients_of, memory_of
from everstep.service_home import ServiceRecord

_PROBE_SECONDS = 5.0


class State(StrEnum):
    """State of a service."""

    READY = "ready"
    STARTING = "starting"
    RECOVERING = "recovering"
    STOPPING = "stopping"
    SILENT = "not answering"
    NONE = "not running"


_CODES = {State.READY: Code.DONE, State.NONE: Code.NOT_FOUND}
_MEANINGS = {
    State.READY: "ready",
    State.STARTING: "starting",
    State.RECOVERING: "not ready: its worker is starting, or recovers runs",
    State.STOPPING: "stopping: it saves its runs",
    State.SILENT: "not answering",
}

_BEGAN = {State.STARTING: "starts since", State.STOPPING: "stops since"}


@dataclass(frozen=True)
class Status:
    """The service of a home.

    Attributes:
        state: its state.
        record: as it describes itself. None if it is not known.
        refused: the models that it can't serve, by name, with the reason.
    """

    state: State
    record: ServiceRecord | None = None
    refused: dict[str, str] = field(default_factory=dict)


def find_status(home: Path) -> Status:
    """Find out whether a service runs on a home, and whether it is ready.

    Args:
        home: the home's full path.

    Returns:
        The state. The record of a service that does not run is that of one which was killed,
        crashed or did not become ready.
    """
    record = service_home.living(home)
    if record is not None and record.stopping:
        return Status(State.STOPPING, record)
    if record is not None:
        return _probe(record) if record.ready else Status(State.STARTING, record)
    if service_home.is_held(service_home.run_lock_path(home)):
        return Status(State.STOPPING)  # its record is gone already
    if service_home.is_starting(home):
        return Status(State.STARTING)
    return Status(State.NONE, service_home.recorded(home))


def _probe(record: ServiceRecord) -> Status:
    url = f"{record.address}/api/v1/everstep/info"
    try:
        with httpx.Client(timeout=_PROBE_SECONDS, mounts=without_proxies(url)) as client:
            answer = client.get(url)
            info: dict[str, Any] = answer.json() if answer.is_success else {}
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return Status(State.SILENT, record)
    state = State.READY if info.get("ready") else State.RECOVERING
    return Status(state, record, info.get("refused_models", {}))


def print_status(home: Path, as_json: bool) -> Code:
    """Print the state of a home's service.

    Args:
        home: the home.
        as_json: print JSON.

    Returns:
        The exit code: 0 if it is ready, 4 if it runs but is not ready, 3 if none runs.
    """
    home = home.expanduser().resolve()
    found = find_status(home)
    living = None if found.state is State.NONE else found.record
    process = 0 if living is None else living.process
    clients = clients_of(home, process) if living is not None and living.embedded else []
    memory = memory_of(process) if process else None
    if as_json:
        print_json(_content(home, found, clients, memory))
    elif found.state is State.NONE:
        _print_none(home, found.record)
    else:
        _print(home, found, clients, memory)
    return _CODES.get(found.state, Code.UNREACHABLE)


def _content(
    home: Path, found: Status, clients: Sequence[Client], memory: int | None
) -> dict[str, object]:
    record = None if found.state is State.NONE else found.record
    known = record or ServiceRecord("", 0)
    return {
        "home": str(home),
        "state": found.state,
        "running": found.state is not State.NONE,
        "ready": found.state is State.READY,
        "address": known.address or None,
        "process": known.process or None,
        "since": known.since or None,
        "version": known.version or None,
        "models": known.models,
        "refused_models": found.refused,
        "embedded": known.embedded,
        "clients": [asdict(each) for each in clients],
        "memory_bytes": memory,
        "log": known.log or None,
    }


def _print(home: Path, found: Status, clients: Sequence[Client], memory: int | None) -> None:
    facts: list[tuple[str, str | None]] = [("service", _MEANINGS[found.state]), ("home", str(home))]
    if (record := found.record) is not None:
        models = sorted(record.models.keys() - found.refused.keys())
        facts += [
            ("address", record.address or None),
            ("process", str(record.process) if record.process else None),
            (_BEGAN.get(found.state, "ready since"), _since(record)),
            ("release", record.version or None),
            ("models", ", ".join(models) or None),
            *(("refused", f"{name} {reason}") for name, reason in found.refused.items()),
            ("runs", _kind(record)),
            *(("client", f"process {each.process}: {each.command}") for each in clients),
            ("memory", None if memory is None else size_text(memory)),
            ("log", record.log or "where it was started"),
        ]
    print_facts(facts)


def _kind(record: ServiceRecord) -> str:
    if record.embedded:
        return "embedded: its clients started it, and it ends with the last of them"
    return "in the background" if record.log else "in the foreground"


def _since(record: ServiceRecord) -> str | None:
    try:
        return when_text(datetime.fromisoformat(record.since))
    except ValueError:
        return None


def _print_none(home: Path, last: ServiceRecord | None) -> None:
    print(f"No service runs on {home}.")
    if last is None:
        return
    ended, began = "was killed or crashed", "ready"
    if last.stopping:
        ended, began = "was killed while it stopped", "stopping"
    elif not last.ready:
        ended, began = "did not become ready", "starting"
    since = _since(last)
    when = "" if since is None else f" ({began} since {since})"
    shown = command_on(home, "everstep serve logs")
    hint = f" Its log: {shown}." if last.log else ""
    process = f", process {last.process}," * bool(last.process)
    messages().print(f"The last one{process} {ended}{when}.{hint} The next start resumes its runs.")
