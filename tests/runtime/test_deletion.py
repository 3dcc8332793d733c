"""Deletion of runs and sessions: all that they own goes, and nothing of anybody else's."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from everstep.cli.vault.rebuild import rebuild_database
from everstep.engine import Model
from everstep.interchange.archive import adapter_files, pack
from everstep.ledger import Deleted, Event, Ledger, deletion_rows, tables
from everstep.ledger.checkpoint_metadata import CheckpointMetadata
from everstep.runtime import deletion
from everstep.runtime.checkpoints.catalog import CheckpointCatalog
from everstep.runtime.execution.run_actor import RunActor
from everstep.vault import Vault, gc
from everstep.vault.storage.keys import KINDS
from everstep.vault.storage.local import LocalStorage
from everstep.wire import types
from tests.faults.test_imports import adapter
from tests.runtime.local import Local, batch
from tests.waiting import eventually, eventually_async

KEPT = {"audit", "tombstones", "position"}
"""Tables that mention what was deleted, or nothing: the log of changes, and the tombstones."""
OWNERS = {"id", "run_id", "session_id", "scope", "sampler_id", "path", "model_path", "inflight_run"}
REFERENCES = OWNERS | {"request_id", "pin", "weights", "deleted_with"}
"""Names of columns that say whose a row is."""


def rows(home: Path, table: str) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(home / "ledger.sqlite")) as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute(f"SELECT * FROM {table}")]


def mentions(home: Path, texts: set[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every table that hold one of some texts, by table."""

    def held(value: Any) -> bool:
        text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
        return any(each in text for each in texts)

    return {
        table: [row for row in rows(home, table) if any(map(held, row.values()))]
        for table in tables.metadata.tables
    }


def requests(home: Path, scope: str) -> set[str]:
    """Return the request ids of the operations of a scope and of those below it."""
    found = rows(home, "operations")
    return {r["request_id"] for r in found if r["scope"].startswith((scope, f"{scope}:"))}


def manifests(home: Path, run: str) -> list[tuple[str, str]]:
    vault = Vault(home / "vault", writer=False)
    return [(kind, name) for kind in KINDS for _, name in vault.names(kind, run)]


def delete(service: Local, run: str, **params: Any) -> Any:
    answer = service.http.delete(f"everstep/training_runs/{run}", params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


def delete_refused(service: Local, path: str, status: int = 409) -> str:
    answer = service.http.delete(f"everstep/{path}")
    assert answer.status_code == status, answer.text
    return str(answer.json()["detail"])


def finish(service: Local, session: str | None = None) -> str:
    session = session or service.session()
    service.post(f"sessions/{session}/finish", reason={"type": "success"})
    return session


def new_session(service: Local) -> str:
    """Open another session, in which the next runs are created. The client counts from 0 there."""
    service._session, service._runs = None, 0
    return service.session()


def from_state(service: Local, path: str, *, optimizer: bool = True) -> str:
    """Create a run from a checkpoint in the present session."""
    body: dict[str, Any] = {"session_id": service.session(), "model_seq_id": service._runs}
    body["path"] = path
    service._runs += 1
    made = service.post("load_weights", **body, optimizer=optimizer)
    return str(service.result(made["request_id"])["model_id"])


def sample_body(sampler: str, seq_id: int = 0) -> dict[str, Any]:
    return {
        "sampling_session_id": sampler,
        "seq_id": seq_id,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]},
        "sampling_params": {"max_tokens": 3, "seed": 1, "stop": []},
    }


def sample(service: Local, sampler: str, **more: Any) -> str:
    return str(service.post("asample", **sample_body(sampler), **more)["request_id"])


def fill(service: Local, run: str) -> None:
    """Give a run a row in every table."""
    service.train(run, 0)
    path = service.do(run, "save_weights", path="a")["path"]
    service.do(run, "save_weights", path="b")
    service.http.delete(f"training_runs/{run}/checkpoints/weights/b").raise_for_status()
    unnamed = service.do(run, "save_weights_for_sampler", sampling_session_seq_id=0)
    service.result(sample(service, unnamed["sampling_session_id"], record_stability_info=True))
    service.post("everstep/weights_access_tokens", tinker_path=path, ttl_seconds=3600)
    service.post("unload_model", model_id=run)


@pytest.fixture(params=["run", "session"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function after which no client counts as alive."""
    return lambda: monkeypatch.setattr(deletion, "CLIENT_SECONDS", 0.0)


def test_every_row_goes_and_no_other_does(home: Path, pico: Model, kind: str) -> None:
    with Local(home, pico) as service:
        other = service.new_run()
        fill(service, other)
        before = new_session(service)
        run = service.new_run()
        fill(service, run)
        copied = service.post(
            "copy_weights",
            {"X-Idempotency-Key": "once"},
            source_path=f"tinker://{run}/weights/a",
            session_id=before,
            model_seq_id=7,
        )["tinker_path"]
        copy_run = copied.split("/")[2]
        finish(service)
    owned = [before] if kind == "session" else [run, copy_run]
    texts = {*owned, *(id_ for each in owned for id_ in requests(home, each))}
    pin = sorted(requests(home, run))[0]
    with closing(sqlite3.connect(home / "ledger.sqlite")) as database:
        database.execute("INSERT INTO pins VALUES (?, '2026-01-01 00:00:00')", (pin,))
        database.commit()
    found = mentions(home, texts)
    covered = {
        table
        for table, columns in (
            (t.name, set(t.columns.keys())) for t in tables.metadata.sorted_tables
        )
        if columns & REFERENCES and table not in KEPT
    }
    for table in covered - ({"sessions"} if kind == "run" else set()):
        assert found[table], f"this test gives {table} no row of a {kind}, so it proves nothing"

    async def remove() -> None:
        """Delete in the ledger alone."""
        ledger = await Ledger.open(home / "ledger.sqlite")
        for each in owned:
            what = await ledger.deletions.owned(kind, each)
            assert what is not None
            event = Event(f"{kind}_delete", "me", run_id=each)
            await ledger.deletions.bury(kind, each, event, deletion._since(), {})
        for tombstone in await ledger.deletions.unfinished():
            await ledger.deletions.remove_rows(tombstone)
        assert await ledger.find_damaged_rows() == []
        await ledger.close()

    theirs = {other, *requests(home, other)}
    untouched = {t: r for t, r in mentions(home, theirs).items() if t not in KEPT}
    asyncio.run(remove())
    left = {table: found for table, found in mentions(home, texts).items() if found}
    assert left.keys() <= KEPT and left["audit"] and left["tombstones"]
    assert {t: r for t, r in mentions(home, theirs).items() if t not in KEPT} == untouched
    assert untouched["operations"] and untouched["recorded_samples"]


def test_rows_go_in_batches(
    home: Path, pico: Model, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(deletion_rows, "REMOVED_AT_ONCE", 2)
    with Local(home, pico) as service:
        run = service.new_run()
        fill(service, run)
        session = finish(service)
        if kind == "run":
            delete(service, run)
        else:
            service.http.delete(f"everstep/sessions/{session}").raise_for_status()
    assert not rows(home, "operations") and not rows(home, "recorded_samples")


def test_run_whose_id_begins_alike_stays(
    home: Path, pico: Model, silent: Callable[[], None]
) -> None:
    with Local(home, pico) as service:
        short = service.new_run()
        service._runs = 10
        long = service.new_run()
        service._runs = 1
        first = service.new_run()
        assert long.startswith(first)
        expected = service.train(short, 0, 1)
        seen = service.train(long, 0)
        fill(service, first)
        saved = service.do(long, "save_weights", path="a")["path"]
        silent()
        before = requests(home, long)
        delete(service, first)
        assert requests(home, long) == before and before
        assert seen + service.train(long, 1) == expected
        assert service.http.get(f"training_runs/{long}").status_code == 200
        assert service.do(long, "load_weights", path=saved, optimizer=True)["path"] == saved


# Shared files, copies and runs that began from its checkpoints


def blobs(home: Path) -> dict[str, int]:
    directory = home / "vault" / "blobs"
    return {path.name: path.stat().st_size for path in directory.rglob("*") if path.is_file()}


def test_space_comes_back_by_garbage_collection(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        kept = service.new_run()
        service.train(kept, 0)
        service.do(kept, "save_weights", path="a")
        new_session(service)
        run = service.new_run(seed=2)
        service.train(run, 1)
        service.do(run, "save_weights", path="a")
        service.post("unload_model", model_id=run)
        service.post("everstep/vault/collect", grace_seconds=0)
        finish(service)
        before = blobs(home)
        dry = delete(service, run, dry_run=True)
        assert (dry["dry_run"], dry["deleted_at"]) == (True, None)
        answer = delete(service, run)
        assert {**answer, "dry_run": True, "deleted_at": None} == dry
        assert (answer["checkpoints"], answer["snapshots"]) == (1, 1)
        assert answer["freed_bytes"] > 0
        assert blobs(home) == before, "a reader of the files is not disturbed"
        collected = service.post("everstep/vault/collect", grace_seconds=0)
        assert collected["bytes"] == answer["freed_bytes"]
        gone = {name: size for name, size in before.items() if name not in blobs(home)}
        assert sum(gone.values()) == answer["freed_bytes"]
        assert manifests(home, run) == []
        assert service.post("everstep/vault/collect", grace_seconds=0)["files"] == []
        service.train(kept, 2)


@pytest.mark.parametrize("optimizer", [True, False])
def test_copies_and_runs_that_began_from_it_go_on(home: Path, pico: Model, optimizer: bool) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        service.train(run, 0)
        path = service.do(run, "save_weights", path="a")["path"]
        copied = service.post("copy_weights", source_path=path, destination_project_id="p")
        reference = from_state(service, copied["tinker_path"], optimizer=optimizer)
        expected = service.train(reference, 1, 2, 3)
        first = service.session()
        new_session(service)
        fork, loaded = from_state(service, path, optimizer=optimizer), service.new_run(seed=3)
        service.train(loaded, 5)
        service.do(loaded, "load_weights", path=path, optimizer=optimizer)
        seen = {each: service.train(each, 1) for each in (fork, loaded)}
        session = service.session()
        finish(service, first)
        service.http.delete(f"everstep/sessions/{first}").raise_for_status()
        assert manifests(home, run) == [] == manifests(home, reference)
        service.post("everstep/vault/collect", grace_seconds=0)
        service.lose_worker()
        for each in (fork, loaded):
            seen[each] += service.train(each, 2)
    with service.after() as service:
        for each in (fork, loaded):
            assert seen[each] + service.train(each, 3) == expected
        service._session = session
        again = from_state(service, copied["tinker_path"], optimizer=optimizer)
        assert service.train(again, 1, 2, 3) == expected


def unsnapshotted(home: Path, run: str) -> None:
    """Lose the snapshots of a run, as by damage of the disk."""
    lost = [name for kind, name in manifests(home, run) if kind == "snapshot"]
    assert lost
    for name in lost:
        Vault(home / "vault", writer=False).delete("snapshot", run, name)


def forked(home: Path, pico: Model) -> tuple[Local, str, str, list[Any]]:
    """A run, a fork that has lost its snapshots, and what the fork's next step gives."""
    with Local(home, pico) as service:
        run = service.new_run()
        service.train(run, 0)
        path = service.do(run, "save_weights", path="a")["path"]
        first = service.session()
        new_session(service)
        reference = from_state(service, path)
        expected = service.train(reference, 1, 2)
        fork = from_state(service, path)
        assert service.train(fork, 1) == expected[:2]
        finish(service, first)
        service.kill()
    unsnapshotted(home, fork)
    return service, run, fork, expected[2:]


def test_fork_without_a_snapshot_gets_one_before_the_run_is_deleted(
    home: Path, pico: Model
) -> None:
    service, run, fork, expected = forked(home, pico)
    with service.after() as service:
        assert [kind for kind, _ in manifests(home, fork)] == []
        delete(service, run)
        assert "snapshot" in [kind for kind, _ in manifests(home, fork)]
        service.kill()
    with service.after() as service:
        assert service.train(fork, 2) == expected


def test_run_is_not_deleted_while_a_fork_needs_it(home: Path, pico: Model) -> None:
    service, run, fork, expected = forked(home, pico)
    with service.after(disk_reserve_bytes=1 << 60) as service:
        text = delete_refused(service, f"training_runs/{run}")
        assert fork in text and "snapshot" in text
        assert ("training", "a") in manifests(home, run)
        assert service.http.get(f"training_runs/{run}").status_code == 200
    with service.after() as service:
        assert service.train(fork, 2) == expected


def test_run_is_not_deleted_while_another_loads_its_checkpoint(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        path = service.do(run, "save_weights", path="a")["path"]
        first = service.session()
        new_session(service)
        other = service.new_run()
        finish(service, first)
        with service.steps.shut():
            loading = service.send(other, "load_weights", path=path, optimizer=True)
            text = delete_refused(service, f"training_runs/{run}")
            assert other in text and "loaded" in text
        assert service.result(loading)["path"] == path
        delete(service, run)
        service.train(other, 1)


# In use


def test_run_of_a_live_client_is_refused_with_what_to_do(
    home: Path, pico: Model, kind: str
) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        session = service.session()
        path = f"training_runs/{run}" if kind == "run" else f"sessions/{session}"
        text = delete_refused(service, path)
        assert f"everstep session finish {session}" in text and "heard of" in text
        assert service.http.delete(f"everstep/{path}?dry_run=true").status_code == 409
        service.train(run, 0)
        finish(service)
        service.http.delete(f"everstep/{path}").raise_for_status()


def test_run_of_a_client_that_went_away_is_deleted(
    home: Path, pico: Model, silent: Callable[[], None]
) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        silent()
        with service.steps.shut():
            request = service.send(run, "forward_backward", forward_backward_input=batch())
            text = delete_refused(service, f"training_runs/{run}")
            assert "1 operation" in text and "session finish" in text
        service.result(request)
        assert delete(service, run)["unfinished_operations"] == 0


def test_client_of_a_sampler_keeps_the_run_alive(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        path = service.do(run, "save_weights_for_sampler", path="a")["path"]
        finish(service)
        session = new_session(service)
        sampler = service.post("create_sampling_session", session_id=session, model_path=path,
                               sampling_session_seq_id=0)["sampling_session_id"]  # fmt: skip
        assert session in delete_refused(service, f"training_runs/{run}")
        service.result(sample(service, sampler))
        finish(service)
        assert delete(service, run)["sampler_ids"] == [sampler]
        status, text = service.refused("retrieve_futures", target={
            "sampling_session_id": sampler, "cloned_sampler_id": 0}, prev_cursor=0)  # fmt: skip
        assert status == 404 and f"was deleted with run {run}" in text


def test_unfinished_operations_of_a_finished_session_are_deleted(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run, other = service.new_run(), service.new_run()
        expected = service.train(other, 0)
        saved = service.do(run, "save_weights_for_sampler", sampling_session_seq_id=0)
        service.steps.close()
        sent = service.step(run, 0)
        sent.append(service.send(run, "save_weights", path="late"))
        sent.append(sample(service, saved["sampling_session_id"]))
        finish(service)
        answers: list[Any] = []
        polls = [
            threading.Thread(target=lambda each=each: answers.append(service.poll(each)))
            for each in sent
        ]
        for poll in polls:
            poll.start()
        removal = threading.Thread(target=lambda: answers.insert(0, delete(service, run)))
        removal.start()
        service.steps.open()
        for thread in (removal, *polls):
            thread.join()
        assert answers[0]["unfinished_operations"] >= 1
        assert manifests(home, run) == []
        for each in sent:
            assert service.poll(each).status_code == 404
        assert expected and not requests(home, run)
        assert service.http.get(f"training_runs/{other}").status_code == 200
    assert rows(home, "checkpoints") == [] == rows(home, "samplers")


def test_poll_of_a_deleted_operation_says_that_it_was_deleted(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        late = service.send(run, "forward_backward", 5, forward_backward_input=batch())
        finish(service)
        answers: list[Any] = []
        poll = threading.Thread(target=lambda: answers.append(service.poll(late)))
        poll.start()
        futures = service.app.state.runtime._scheduler.futures
        eventually("the poll waits", lambda: late in futures._waiting)
        delete(service, run)
        poll.join()
        (answer,) = answers
        assert answer.status_code == 404 and f"Run {run} was deleted on" in answer.json()["detail"]


def test_poll_that_begins_during_the_deletion_does_not_wait_for_ever(
    home: Path, pico: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        late = service.send(run, "forward_backward", 5, forward_backward_input=batch())
        finish(service)
        runtime, polls = service.app.state.runtime, list[Any]()
        complete = CheckpointCatalog.finish_deletions

        async def poll_first(self: CheckpointCatalog) -> None:
            polls.append(asyncio.create_task(runtime.wait(late, 3600.0)))
            waiting = runtime._scheduler.futures._waiting
            await eventually_async("it waits", lambda: late in waiting)
            await runtime._ledger.operation(late)  # its look-up was queued before this one
            await complete(self)

        monkeypatch.setattr(CheckpointCatalog, "finish_deletions", poll_first)
        delete(service, run)
        assert service.http.portal is not None
        with pytest.raises(Deleted, match="was deleted on"):
            service.http.portal.call(asyncio.wait_for, polls[0], 5.0)
        assert service.poll(late).status_code == 404


def test_run_goes_on_when_its_client_comes_back_during_the_deletion(
    home: Path, pico: Model, monkeypatch: pytest.MonkeyPatch, silent: Callable[[], None]
) -> None:
    with Local(home, pico) as service:
        run, other = service.new_run(), service.new_run()
        expected = service.train(other, 0, 1)
        seen = service.train(run, 0)
        silent()
        monkeypatch.setattr(
            deletion, "_STOPPED", lambda: monkeypatch.setattr(deletion, "CLIENT_SECONDS", 60.0)
        )
        assert "heard of" in delete_refused(service, f"training_runs/{run}")
        assert seen + service.train(run, 1) == expected


def test_operation_that_came_during_the_deletion_is_executed(
    home: Path, pico: Model, monkeypatch: pytest.MonkeyPatch, silent: Callable[[], None]
) -> None:
    with Local(home, pico) as service:
        run, other = service.new_run(), service.new_run()
        expected = service.train(other, 0, 1)
        assert service.train(run, 0, 1) == expected
        silent()
        end, late = RunActor.end, list[str]()

        async def end_late(self: RunActor) -> None:
            await end(self)
            step = types.OptimStepRequest(model_id=run, seq_id=5, adam_params=types.AdamParams())
            late.append((await service.app.state.runtime.submit(step)).request_id)

        with monkeypatch.context() as patch:
            patch.setattr(RunActor, "end", end_late)
            assert "1 operation" in delete_refused(service, f"training_runs/{run}")
        assert "error" not in service.result(late[0])


@pytest.mark.parametrize("what", ["save", "snapshot"])
def test_what_is_being_written_is_finished_before_the_run_is_deleted(
    home: Path, pico: Model, what: str
) -> None:
    """Else its manifest would appear when the run is gone."""
    with Local(home, pico, replay_seconds=0.0) as service:
        run = service.new_run()
        with service.writes.shut():
            if what == "save":
                service.send(run, "save_weights", path="late")
            else:
                service.train(run, 0)
            service.writes.wait_reached()
            finish(service)
            removal = threading.Thread(target=lambda: delete(service, run))
            removal.start()
            actors = service.app.state.runtime._scheduler.runs
            eventually("it is stopping", actors.find(run)._stopping.is_set)
            assert rows(home, "runs"), "nothing is deleted before"
        removal.join()
        assert manifests(home, run) == [] == rows(home, "checkpoints")
        service.post("everstep/vault/collect", grace_seconds=0)
        assert blobs(home) == {}


# Afterwards


def test_requests_for_a_deleted_run_say_when_it_was_deleted(
    home: Path, pico: Model, silent: Callable[[], None]
) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        session = service.session()
        path = service.do(run, "save_weights", path="a")["path"]
        unnamed = service.do(run, "save_weights_for_sampler", sampling_session_seq_id=0)
        sampler = unnamed["sampling_session_id"]
        silent()
        answer = delete(service, run)
        when = f"{answer['deleted_at'][:10]} {answer['deleted_at'][11:19]} UTC"
        assert delete(service, run) == answer, "a deletion that is repeated is no error"
        for method, route in (
            ("get", f"training_runs/{run}"),
            ("get", f"training_runs/{run}/checkpoints"),
            ("get", f"samplers/{sampler}"),
            ("delete", f"training_runs/{run}/checkpoints/weights/a"),
        ):
            found = service.http.request(method, route)
            assert found.status_code == 404 and when in found.json()["detail"], route
        for route, body in (
            ("forward_backward", {"model_id": run, "seq_id": 9, "forward_backward_input": batch()}),
            ("optim_step", {"model_id": run, "seq_id": 9, "adam_params": {}}),
            ("save_weights", {"model_id": run, "seq_id": 9, "path": "x"}),
            ("unload_model", {"model_id": run}),
            ("get_info", {"model_id": run}),
            ("weights_info", {"tinker_path": path}),
            ("everstep/vault/prune", {"run_id": run, "keep_last": 1}),
            ("join_sampling_session", {"sampling_session_id": sampler}),
            ("copy_weights", {"source_path": path, "destination_project_id": "p"}),
            (
                "create_sampling_session",
                {"session_id": session, "sampling_session_seq_id": 5, "model_path": path},
            ),
            (
                "create_model",
                {"session_id": session, "model_seq_id": 0, "base_model": "everstep/pico"},
            ),
        ):
            status, text = service.refused(route, **body)
            assert status == 404 and when in text and run in text, (route, status, text)
        other = service.new_run()
        failed = service.do(other, "load_weights", path=path, optimizer=True)
        assert when in failed["error"]
        service.train(other, 1)
    with service.after() as service:
        assert when in service.http.get(f"training_runs/{run}").json()["detail"]
        assert run not in str(service.http.get("training_runs").json())


def test_requests_for_a_deleted_session_say_when_it_was_deleted(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run, session = service.new_run(), service.session()
        base = service.post("create_sampling_session", session_id=session,
                            sampling_session_seq_id=1, base_model="everstep/pico")  # fmt: skip
        trace = service.http.get(f"sessions/{session}/trace_export").json()["url"]
        finish(service)
        answer = service.http.delete(f"everstep/sessions/{session}").json()
        assert answer["training_run_ids"] == [run]
        assert answer["sampler_ids"] == [base["sampling_session_id"]]
        when = f"{answer['deleted_at'][:10]} {answer['deleted_at'][11:19]} UTC"
        for method, route in (
            ("get", f"sessions/{session}"),
            ("get", f"sessions/{session}/trace_export"),
            ("get", f"training_runs/{run}"),
            ("delete", f"everstep/training_runs/{run}"),
            ("get", f"samplers/{base['sampling_session_id']}"),
        ):
            found = service.http.request(method, route)
            assert found.status_code == 404 and when in found.json()["detail"], route
        for route, body in (
            ("session_heartbeat", {"session_id": session}),
            (f"sessions/{session}/finish", {}),
            (
                "create_model",
                {"session_id": session, "model_seq_id": 3, "base_model": "everstep/pico"},
            ),
        ):
            status, text = service.refused(route, **body)
            assert status == 404 and when in text, (route, status, text)
        moved = service.http.put(f"sessions/{session}/project", json={"project_id": "p"})
        assert moved.status_code == 404 and when in moved.json()["detail"]
        assert service.http.get(trace).status_code == 404, "a timeline is part of the session"
        assert session not in service.http.get("sessions").json()["sessions"]
        log = service.http.get("audit").json()["entries"]
        (entry,) = [each for each in log if each["event"] == "session_delete"]
        assert entry["event_details"]["session_id"] == session


def test_unknown_run_is_not_found(home: Path, pico: Model, kind: str) -> None:
    with Local(home, pico) as service:
        what = "training_runs" if kind == "run" else "sessions"
        assert "does not exist" in delete_refused(service, f"{what}/nothing", 404)


def test_deleted_collection_can_be_imported_again(home: Path, pico: Model, tmp_path: Path) -> None:
    body = b"".join(
        pack(adapter_files(adapter(tmp_path / "adapter", pico.module.config.hidden_size)))
    )
    with Local(home, pico) as service:

        def put() -> Any:
            query = {"name": "x", "collection": "nightly"}
            answer = service.http.post("everstep/checkpoints/import", params=query, content=body)
            return answer.raise_for_status().json()["tinker_path"]

        path = put()
        run = path.split("/")[2]
        for what in (f"training_runs/{run}", f"sessions/{run.partition(':')[0]}"):
            service.http.delete(f"everstep/{what}").raise_for_status()
            assert manifests(home, run) == []
            assert put() == path
            service.post("everstep/vault/collect", grace_seconds=0)
            assert from_state(service, path, optimizer=False)
        assert service.http.get(f"training_runs/{run}").status_code == 200


def test_copy_is_not_made_again_by_a_late_retry(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        path = service.do(service.new_run(), "save_weights", path="a")["path"]
        body = {"source_path": path, "destination_project_id": "p"}
        key = {"X-Idempotency-Key": "once"}
        copy = service.post("copy_weights", key, **body)["tinker_path"].split("/")[2]
        delete(service, copy)
        late = service.http.post("copy_weights", json=body, headers=key)
        assert late.status_code == 404 and "was deleted on" in late.json()["detail"]
        assert manifests(home, copy) == []


@pytest.mark.parametrize(
    "late", ["optim_step", "asample", "create_sampling_session", "everstep/weights_access_tokens"]
)
def test_request_that_found_the_run_before_adds_nothing_after(
    home: Path, pico: Model, monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    """A request is admitted while the run is there, and reaches the ledger when it is gone."""
    with Local(home, pico) as service:
        run, session = service.new_run(), service.session()
        path = service.do(run, "save_weights_for_sampler", path="a")["path"]
        saved = service.do(run, "save_weights_for_sampler", sampling_session_seq_id=0)
        other = new_session(service)
        body: dict[str, Any] = {
            "optim_step": {"model_id": run, "seq_id": 5, "adam_params": {}},
            "asample": sample_body(saved["sampling_session_id"]),
            "create_sampling_session": {
                "session_id": other,
                "sampling_session_seq_id": 0,
                "model_path": path,
            },
            "everstep/weights_access_tokens": {"tinker_path": path, "ttl_seconds": 3600},
        }[late]
        runtime = service.app.state.runtime

        def after(call: Any) -> Any:
            async def deleted(*arguments: Any, **more: Any) -> Any:
                await runtime._ledger.finish_session(session, "success", None)
                await runtime.deletion.delete_run(run)
                return await call(*arguments, **more)

            return deleted

        for owner, name in (
            (Ledger, "accept"),
            (Ledger, "create_sampler"),
            (CheckpointMetadata, "add_token"),
        ):
            monkeypatch.setattr(owner, name, after(getattr(owner, name)))
        status, text = service.refused(late, **body)
        assert status == 404 and run in text and "was deleted" in text
    assert not requests(home, run)
    assert rows(home, "runs") == [] == rows(home, "weights_tokens") == rows(home, "samplers")


def test_audit_log_names_what_was_deleted(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        path = service.do(run, "save_weights", path="a")["path"]
        finish(service)
        delete(service, run)
        entries = service.http.get("audit").json()["entries"]
        (entry,) = [each for each in entries if each["event"] == "run_delete"]
        assert entry["model_id"] == run
        assert entry["event_details"]["tinker_paths"] == [path]
        assert [e for e in entries if e["event"] == "checkpoint_create"], "earlier entries stay"


# Interrupted


def interrupted(home: Path, pico: Model, monkeypatch: pytest.MonkeyPatch) -> tuple[Local, str]:
    """A run whose deletion is recorded, and whose vault did not answer."""
    with Local(home, pico) as service:
        run = service.new_run()
        service.train(run, 0)
        service.do(run, "save_weights", path="a")
        service.post("unload_model", model_id=run)
        finish(service)

        def fail(*_: Any) -> None:
            raise OSError("the disk is away")

        with monkeypatch.context() as patch:
            patch.setattr(gc, "remove_runs", fail)
            with pytest.raises(OSError, match="away"):
                service.http.delete(f"everstep/training_runs/{run}")
    assert {kind for kind, _ in manifests(home, run)} == {"training", "snapshot"}
    return service, run


def test_rebuild_does_not_bring_a_deleted_run_back(
    home: Path, pico: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = interrupted(home, pico, monkeypatch)
    assert rebuild_database(home, None, as_json=True)
    assert rows(home, "runs") == [] == rows(home, "checkpoints")
    assert manifests(home, run), "nothing but the tombstone has stopped it"


def test_deletion_is_finished_at_the_next_start(
    home: Path, pico: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, run = interrupted(home, pico, monkeypatch)
    with service.after() as service:
        assert manifests(home, run) == []
        assert delete(service, run)["checkpoints"] == 1
    assert [row["unfinished"] for row in rows(home, "tombstones")] == [0]


def test_repeated_deletion_finishes_an_interrupted_one(
    home: Path, pico: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, run = interrupted(home, pico, monkeypatch)

    def fail(*_: Any) -> None:
        raise OSError("the disk is still away")

    with monkeypatch.context() as patch:
        patch.setattr(gc, "remove_runs", fail)
        with service.after() as service:
            assert manifests(home, run), "a start does not depend on the disk"
            patch.undo()
            delete(service, run)
            assert manifests(home, run) == []


def test_quarantined_and_damaged_checkpoints_go_as_well(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        service.train(run, 0)
        for name in ("a", "b"):
            service.do(run, "save_weights", path=name)
        finish(service)
        for name in ("a", "b"):
            path = home / "vault" / "manifests" / "training" / run / f"{name}.json"
            path.write_bytes(path.read_bytes()[:-9])
        Vault(home / "vault", writer=False).quarantine.add(
            f"manifests/training/{run}/a.json", "damaged", []
        )
        delete(service, run)
        vault = Vault(home / "vault", writer=False)
        assert manifests(home, run) == [] and list(vault.quarantine.records()) == []
        service.post("everstep/vault/collect", grace_seconds=0)
    assert blobs(home) == {}


def test_runs_of_a_session_are_removed_with_one_sync(
    home: Path, pico: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Local(home, pico) as service:
        runs = [service.new_run() for _ in range(3)]
        for run in runs:
            service.do(run, "save_weights", path="a")
        session = finish(service)
        synced, sync = list[str](), LocalStorage.sync

        def noted(self: LocalStorage, prefix: str) -> None:
            synced.append(prefix)
            sync(self, prefix)

        monkeypatch.setattr(LocalStorage, "sync", noted)
        service.http.delete(f"everstep/sessions/{session}").raise_for_status()
        assert synced == ["manifests/"]
        assert [manifests(home, run) for run in runs] == [[], [], []]


def test_two_deletions_at_a_time_are_one(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        runs = [service.new_run() for _ in range(3)]
        session = finish(service)
        answers: list[int] = []
        routes = [f"sessions/{session}", *(f"training_runs/{run}" for run in runs)]
        threads = [
            threading.Thread(
                target=lambda route=route: answers.append(
                    service.http.delete(f"everstep/{route}").status_code
                )
            )
            for route in routes * 2
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(answers) <= {200, 404} and answers.count(200) >= 2
        assert [manifests(home, run) for run in runs] == [[], [], []]
    assert rows(home, "runs") == [] == rows(home, "operations")
    assert all(not row["unfinished"] for row in rows(home, "tombstones"))
