"""The zygote of a service starts before the command line is parsed, and only for a service."""

from __future__ import annotations

import sys

import pytest

import everstep.cli
import everstep.cli.app


@pytest.mark.parametrize(
    ("command", "early"),
    [
        ("serve", True),
        ("serve --home X --port 0 --until-unused --start-lock 5", True),
        ("serve --home X --detach", False),
        ("serve --home X -d", False),
        ("serve --help", False),
        ("serve status --home X", False),
        ("train data.jsonl", False),
        ("", False),
    ],
)
def test_zygote_starts_before_a_service_and_before_nothing_else(
    command: str, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(everstep.cli, "start_early", lambda: order.append("zygote"))
    monkeypatch.setattr(everstep.cli.app, "run", lambda: order.append("command"))
    monkeypatch.setattr(sys, "argv", ["everstep", *command.split()])
    everstep.cli.main()
    assert order == (["zygote", "command"] if early else ["command"])
