"""Commands as they are typed, against a service that runs."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from everstep.cli import app

KEY = "tml-test"


def typed(url: str, *words: object, answer: str | bytes | None = None) -> Result:
    """What a command gives, typed with a service's address in the environment."""
    env = {"TINKER_BASE_URL": url, "TINKER_API_KEY": KEY, "TERM": "dumb", "COLUMNS": "200"}
    return CliRunner().invoke(app, [str(word) for word in words], env=env, input=answer)


def said(url: str, *words: object, answer: str | None = None) -> str:
    """What a command that succeeds prints."""
    done = typed(url, *words, answer=answer)
    assert done.exit_code == 0, done.output
    return done.stdout


def told(url: str, *words: object) -> Any:
    """What a command that succeeds tells programs."""
    return json.loads(said(url, *words, "--json"))


def refused(url: str, *words: object, answer: str | bytes | None = None) -> tuple[int, str]:
    """The exit code of a command that fails, and what it says of that in one line."""
    done = typed(url, *words, answer=answer)
    assert done.exit_code not in (0, None)
    assert "Traceback" not in done.output
    return done.exit_code, done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
