"""``everstep serve``."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import structlog
import typer

from everstep.cli import running
from everstep.engine.pico import PICO_NAME


def serve(
    home: Path,
    host: str,
    port: int,
    models: list[str],
    settings: list[str],
    vault: str | None,
    until_stdin_closes: bool,
) -> None:
    """Run the service in the foreground; see the command's help."""
    from everstep.ledger import LedgerError
    from everstep.runtime import OperationFailed, Settings
    from everstep.server import PortTaken, run
    from everstep.vault import VaultError

    _configure_logs()
    try:
        chosen = Settings.parse(settings)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    home = home.expanduser().resolve()
    owner = os.getppid() if until_stdin_closes else None
    try:
        run(
            home,
            host,
            port,
            parse_models(models),
            lambda address: _tell(home, address, owner),
            settings=chosen,
            vault_url=vault,
            until_stdin_closes=until_stdin_closes,
        )
    except (PortTaken, LedgerError, OperationFailed, VaultError, OSError) as error:
        print(f"everstep: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    running.retire(home)


def _tell(home: Path, address: str, owner: int | None) -> None:
    running.announce(home, address, owner)
    print(f"everstep: ready at {address}", flush=True)


def parse_models(specs: list[str]) -> dict[str, str]:
    """``NAME=PATH_OR_HUB_ID`` as a mapping; a bare NAME is its own source; none: everstep/pico."""
    models: dict[str, str] = {}
    for spec in specs or [PICO_NAME]:
        name, equals, source = spec.partition("=")
        if not name or (equals and not source):
            raise typer.BadParameter(f"{spec!r} is not NAME=PATH_OR_HUB_ID")
        if name in models:
            raise typer.BadParameter(f"model {name!r} is given twice")
        models[name] = source or name
    return models


def _configure_logs() -> None:
    """Readable lines on standard error."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
