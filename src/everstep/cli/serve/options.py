"""What ``everstep serve`` was asked to serve, and the words that name its home in a command."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from everstep.cli.common.options import DEFAULT_HOME


@dataclass(frozen=True)
class ServeOptions:
    """Options of a service.

    Attributes:
        home: the home.
        host: address to listen on.
        port: port to listen on, or 0 for a free one.
        models: ``NAME=PATH_OR_HUB_ID`` of each base model, or none for everstep/pico.
        settings: ``NAME=VALUE`` of each setting.
        vault: bucket of the home's vault, as a URL. None: as the home remembers.
    """

    home: Path
    host: str
    port: int
    models: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    vault: str | None = None

    def arguments(self) -> list[str]:
        """Return the arguments of ``everstep serve`` that give these options."""
        words = [f"--home={self.home}", f"--host={self.host}", f"--port={self.port}"]
        words += [f"--model={each}" for each in self.models]
        words += [f"--set={each}" for each in self.settings]
        return words if self.vault is None else [*words, f"--vault={self.vault}"]


def command_on(home: Path, command: str) -> str:
    """Return a command as it is typed for a home.

    Args:
        home: the home's full path.
        command: the command without ``--home``.
    """
    usual = Path(os.environ.get("EVERSTEP_HOME") or DEFAULT_HOME).expanduser().resolve()
    return command if home == usual else f"{command} --home {shlex.quote(str(home))}"
