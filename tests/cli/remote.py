"""Commands, run in the test's process against a running service."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from everstep.cli.app import app

KEY = "tml-test"


def invoke(url: str, *words: object, answer: str | bytes | None = None) -> Result:
    """Run a command with a service's address in the environment."""
    env = {"TINKER_BASE_URL": url, "TINKER_API_KEY": KEY, "TERM": "dumb", "COLUMNS": "200"}
    return CliRunner().invoke(app, [str(word) for word in words], env=env, input=answer)


def print_of(url: str, *words: object, answer: str | None = None) -> str:
    """Return the standard output of a command that succeeds."""
    done = invoke(url, *words, answer=answer)
    assert done.exit_code == 0, done.output
    return done.stdout


def read_json(url: str, *words: object) -> Any:
    """Return the JSON of a command that succeeds."""
    return json.loads(print_of(url, *words, "--json"))


def failure(url: str, *words: object, answer: str | bytes | None = None) -> tuple[int, str]:
    """Return the exit code of a command that fails, and the last line of its error output."""
    done = invoke(url, *words, answer=answer)
    assert done.exit_code not in (0, None)
    assert "Traceback" not in done.output
    return done.exit_code, done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
