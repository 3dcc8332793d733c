"""Beginnings of ids, without a service."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from everstep.cli.common import names
from everstep.cli.common.errors import NotFound, WrongUsage
from everstep.client import RestClient


def rest(*sessions: str) -> RestClient:
    """A client of a service with these sessions."""

    def list_sessions(limit: int, offset: int) -> Any:
        page = SimpleNamespace(sessions=list(sessions[offset : offset + limit]))
        return SimpleNamespace(result=lambda: page)

    return cast("RestClient", SimpleNamespace(list_sessions=list_sessions))


def test_beginning_of_one_id_is_enough() -> None:
    assert names.session_id(rest("abc", "abd", "x"), "x") == "x"
    assert names.session_id(rest("abc", "abd", "x"), "abd") == "abd"
    assert names.session_id(rest("ab", "abd"), "ab") == "ab", "a whole id is not a beginning"


def test_beginning_of_several_ids_lists_them() -> None:
    with pytest.raises(WrongUsage, match=r"'ab' means 2 sessions: abc, abd\. Give more of"):
        names.session_id(rest("abc", "abd", "x"), "ab")
    with pytest.raises(WrongUsage, match=r"means 9 sessions: s0, s1, s2, s3, s4, …"):
        names.session_id(rest(*(f"s{n}" for n in range(9))), "s")


def test_beginning_of_no_id_is_reported() -> None:
    with pytest.raises(NotFound, match="everstep session list"):
        names.session_id(rest("abc"), "b")
    with pytest.raises(WrongUsage, match="empty"):
        names.session_id(rest("abc"), " ")


@pytest.mark.parametrize("text", ["x", ":latest", "run:", ""])
def test_text_that_names_no_checkpoint_says_what_does(text: str) -> None:
    with pytest.raises(WrongUsage, match="<run>:latest"):
        names.checkpoint_path(rest(), text)
