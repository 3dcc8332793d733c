"""Deletion by ``everstep run delete`` and ``everstep session delete``, and by REST clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

import everstep
from everstep.client._transport.errors import ConflictError, NotFoundError
from tests.cli.remote import failure, invoke, print_of, read_json
from tests.client.keeping_service import KeepingService
from tests.conftest import Service
from tests.scenario import MODEL, connect, train

pytestmark = pytest.mark.slow


@pytest.fixture
def url(service: Service) -> str:
    return service.url


@pytest.fixture
def runs(url: str) -> Callable[..., list[str]]:
    """Create runs with a checkpoint each, in a session that is finished unless it is kept open."""

    def make(count: int = 1, name: str | None = None, client: Any = None) -> list[str]:
        opened = client or connect(everstep, url)
        made = []
        metadata = {"everstep_run": name} if name is not None else None
        for seed in range(count):
            run = opened.create_lora_training_client(
                MODEL, 4, seed, user_metadata=metadata
            ).result()
            train(everstep, run, 1)
            run.save_state("a").result()
            made.append(run.model_id)
        if client is None:
            opened.close("success").result()
        return made

    return make


def exists(url: str, run: str) -> bool:
    return httpx.get(f"{url}/api/v1/training_runs/{run}").status_code == 200


def session_of(run: str) -> str:
    return run.partition(":")[0]


def test_runs_are_deleted_after_a_question(url: str, runs: Callable[..., list[str]]) -> None:
    a, b, c = runs(3)
    dry = print_of(url, "run", "delete", a, b, "--dry-run")
    assert a in dry and b in dry and c not in dry and "KiB" in dry
    code, text = failure(url, "run", "delete", a, b, answer="n\n")
    assert (code, text) == (1, "everstep: Nothing was deleted.")
    assert failure(url, "run", "delete", a)[0] == 1, "nobody is there to say yes"
    assert failure(url, "run", "delete", a, "--json")[0] == 2
    assert exists(url, a) and exists(url, b)
    done = invoke(url, "run", "delete", a, b, answer="y\n")
    assert done.exit_code == 0 and "Delete 2 runs with 2 checkpoints, " in done.output
    assert f"deleted {a}\ndeleted {b}\n" in done.output
    assert "checkpoint gc --grace 0s" in done.output
    assert not exists(url, a) and not exists(url, b) and exists(url, c)
    (result,) = read_json(url, "run", "delete", c, "--yes")["results"]
    assert (result["training_run_id"], result["error"]) == (c, None)
    assert result["checkpoints"] == 1 and result["freed_bytes"] > 0 and result["deleted_at"]
    code, text = failure(url, "run", "delete", c, "--yes")
    assert code == 3 and "everstep run list" in text


def test_sessions_are_deleted_with_their_runs(url: str, runs: Callable[..., list[str]]) -> None:
    a, b = runs(2)
    session = session_of(a)
    (dry,) = read_json(url, "session", "delete", session, "--dry-run")["results"]
    assert (dry["session_id"], dry["training_run_ids"]) == (session, [a, b])
    assert dry["deleted_at"] is None and exists(url, a)
    done = invoke(url, "session", "delete", session[:8], answer="y\n")
    assert done.exit_code == 0, done.output
    assert "Delete 1 session with 2 runs and 2 checkpoints, " in done.output
    assert not exists(url, a) and not exists(url, b)
    assert failure(url, "session", "delete", session, "--yes")[0] == 3
    assert failure(url, "session", "info", session)[0] == 3


def test_run_in_use_is_refused_and_the_others_are_deleted(
    url: str, runs: Callable[..., list[str]]
) -> None:
    (idle,) = runs()
    with connect(everstep, url) as client:
        (used,) = runs(client=client)
        done = invoke(url, "run", "delete", used, idle, "--yes")
        assert done.exit_code == 1
        assert f"everstep session finish {session_of(used)}" in done.stderr
        assert exists(url, used) and not exists(url, idle)
        code, text = failure(url, "session", "delete", session_of(used), "--yes")
        assert code == 1 and "in use" in text
    read_json(url, "session", "finish", session_of(used), "--yes")
    assert print_of(url, "run", "delete", used, "--yes").endswith(f"deleted {used}\n")


def test_runs_are_named_by_a_beginning_or_by_a_name(
    url: str, runs: Callable[..., list[str]]
) -> None:
    a, b = runs(2, name="a-run-to-delete")
    code, text = failure(url, "run", "delete", session_of(a), "--yes")
    assert code == 2 and "means 2 runs" in text
    code, text = failure(url, "run", "delete", b, session_of(a), "--yes")
    assert code == 2 and exists(url, b), "wrong usage is reported before any change"
    assert failure(url, "run", "delete", "", "--yes")[0] == 2
    done = invoke(url, "run", "delete", "no-such-run", "a-run-to-delete", "--yes")
    assert done.exit_code == 3 and "no-such-run" in done.stderr
    assert [exists(url, a), exists(url, b)].count(True) == 1, "the one that was used last"


def test_rest_client_deletes_runs_and_sessions(url: str, runs: Callable[..., list[str]]) -> None:
    a, b = runs(2)
    with connect(everstep, url) as client:
        rest = client.create_rest_client()
        (used,) = runs(client=client)
        with pytest.raises(ConflictError, match="in use"):
            rest.delete_training_run(used).result()
        planned = rest.delete_training_run(a, dry_run=True).result()
        assert planned.dry_run and exists(url, a)
        done = rest.delete_training_run(a).result()
        assert (done.id, done.training_run_ids, done.checkpoints) == (a, [a], 1)
        assert rest.delete_training_run(a).result() == done
        with pytest.raises(NotFoundError, match="was deleted on"):
            rest.get_training_run(a).result()
        assert asyncio.run(gone(rest, session_of(b))).training_run_ids == [b]
        with pytest.raises(NotFoundError, match="was deleted with session"):
            rest.delete_training_run(b).result()


async def gone(rest: Any, session: str) -> Any:
    return await rest.delete_session_async(session)


def test_other_service_does_not_offer_it() -> None:
    with KeepingService() as other:
        with connect(everstep, other.url) as client:
            run = client.create_lora_training_client("fake/model", 4, 1).result()
        for words in (("run", "delete", run.model_id), ("session", "delete", "session-0")):
            code, text = failure(other.url, *words, "--yes")
            assert code == 6 and "does not offer" in text, words
