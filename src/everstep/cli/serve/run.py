"""The service in the foreground: settings, logs, and its address for other commands."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import typer

from everstep import logs, service_home
from everstep._version import __version__
from everstep.addresses import connectable
from everstep.cli.common.errors import Refused
from everstep.cli.serve.options import ServeOptions
from everstep.cli.serve.start_lock import open_start_lock, require_unused, wait_for
from everstep.service_home import Lock, ServiceRecord
from everstep.worker.zygote.owner import Zygote
from everstep.worker.zygote.shared import start_early

_STDERR = 2


def run_service(
    options: ServeOptions,
    until_stdin_closes: bool = False,
    until_unused: bool = False,
    handed_over: int | None = None,
) -> None:
    """Run the service until it is stopped.

    Args:
        options: what to serve, and where.
        until_stdin_closes: stop when standard input closes.
        until_unused: stop with the last client.
        handed_over: the file of the home's start lock, which the process that started this one
            holds.

    Raises:
        typer.BadParameter: a setting or a model is malformed.
        typer.Exit: with 1, after printing the reason, if the service can't start.
    """
    home = options.home.expanduser().resolve()
    host = options.host.removeprefix("[").removesuffix("]")
    options = replace(options, home=home, host=host)
    with contextlib.ExitStack() as locks:
        record = _describe(home, until_unused)
        try:
            starting = _begin(home, record, handed_over, locks)
        except (Refused, OSError) as error:
            raise _refused(str(error)) from error
        zygote = start_early()
        if zygote is not None:
            locks.callback(zygote.close)
        until: Callable[[], None] | None = _stdin_closes if until_stdin_closes else None
        if until_unused:
            until = partial(_clients_leave, home, locks)
        _serve(options, record, until, starting, zygote)


def _describe(home: Path, embedded: bool) -> ServiceRecord:
    """Describe this service as one that starts."""
    return ServiceRecord(
        address="",
        process=os.getpid(),
        embedded=embedded,
        directory=str(Path.cwd()),
        ready=False,
        since=_now(),
        version=__version__,
        log=service_home.log_of(home, _STDERR),
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _begin(
    home: Path, record: ServiceRecord, handed_over: int | None, locks: contextlib.ExitStack
) -> Lock:
    """Take the home for this service. Returns the start lock, to be released when it is ready.

    Raises:
        Refused: the home can't be used, or another service runs there.
        OSError: the service can't be recorded there.
    """
    starting = locks.enter_context(open_start_lock(home, handed_over))
    if handed_over is None:
        wait_for(starting, home)
    require_unused(home)
    service_home.claim(home, record, locks.enter_context(service_home.run_lock(home)))
    return starting


def _refused(text: str) -> typer.Exit:
    print(f"everstep: {text}", file=sys.stderr)
    return typer.Exit(1)


def _stdin_closes() -> None:
    from everstep.server.serve import stdin_closes

    stdin_closes()


def _clients_leave(home: Path, locks: contextlib.ExitStack) -> None:
    """Wait until no client is left. New ones wait from then on, until this process has ended."""
    locks.enter_context(service_home.clients_lock(home)).hold()


def _serve(
    options: ServeOptions,
    record: ServiceRecord,
    until: Callable[[], None] | None,
    starting: Lock,
    zygote: Zygote | None,
) -> None:
    from everstep.ledger import LedgerError
    from everstep.runtime import OperationFailed, Settings
    from everstep.server import PortTaken, run
    from everstep.vault import VaultError

    home, host = options.home, options.host
    logs.configure(sys.stderr, partial(service_home.bound_log, home) if record.log else None)
    try:
        chosen = Settings.load(home, options.settings)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    served = parse_models(options.models)

    def report_ready(address: str) -> None:
        nonlocal record
        settings = chosen.model_dump(mode="json")
        record = replace(record, address=address, models=served, settings=settings)
        record = replace(record, ready=True, since=_now())
        service_home.publish(home, record)
        starting.unlock()
        with contextlib.suppress(BrokenPipeError):  # whoever started it is gone
            if connectable(host) != host:
                print(f"everstep: listening on every address of this machine ({host})")
            print(f"everstep: ready at {address}", flush=True)

    def report_stop() -> None:
        if not record.ready:
            return  # the start has failed
        with contextlib.suppress(OSError):  # a full disk, say: it stops all the same
            service_home.publish(home, replace(record, stopping=True, since=_now()))

    try:
        run(
            home,
            host,
            options.port,
            served,
            report_ready,
            settings=chosen,
            vault_url=options.vault,
            until=until,
            zygote=zygote,
            stopping=report_stop,
        )
    except (PortTaken, LedgerError, OperationFailed, VaultError, OSError) as error:
        raise _refused(str(error)) from error
    service_home.withdraw(home)


def parse_models(specs: Sequence[str]) -> dict[str, str]:
    """Map model names to their sources.

    Args:
        specs: ``NAME=PATH_OR_HUB_ID``, or a NAME that is its own source, or none for everstep/pico.

    Raises:
        typer.BadParameter: one is malformed, or a name is given twice.
    """
    from everstep.engine.models.pico import PICO_NAME

    models: dict[str, str] = {}
    for spec in specs or [PICO_NAME]:
        name, equals, source = spec.partition("=")
        if not name or (equals and not source):
            raise typer.BadParameter(f"{spec!r} is not NAME=PATH_OR_HUB_ID")
        if name in models:
            raise typer.BadParameter(f"model {name!r} is given twice")
        models[name] = source or name
    return models
