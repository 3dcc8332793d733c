"""Lineage: a checkpoint names its parent, with or without a crash in between."""

from __future__ import annotations

from pathlib import Path
from threading import Semaphore
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.cli.vault.rebuild import rebuild_database
from everstep.engine import Model
from everstep.vault import Vault
from everstep.wire.paths import parse_path
from everstep.worker.protocol.lineage import Lineage, parent_of, standing
from tests.runtime.local import Local


def save(service: Local, run: str, name: str, *, overwrite: bool = False) -> str:
    return str(service.do(run, "save_weights", path=name, overwrite=overwrite)["path"])


def sampler(service: Local, run: str, name: str) -> str:
    return str(service.do(run, "save_weights_for_sampler", path=name)["path"])


def load(service: Local, run: str, path: str, *, optimizer: bool = True) -> None:
    service.do(run, "load_weights", path=path, optimizer=optimizer)


def parents(service: Local, path: str) -> list[str]:
    at = parse_path(path)
    vault = Vault(service.home / "vault", writer=False)
    return vault.manifest(str(at.kind), at.run_id, at.name).parents


def from_state(service: Local, path: str) -> str:
    body: dict[str, Any] = {
        "session_id": service.session(),
        "model_seq_id": service._runs,
        "path": path,
    }
    service._runs += 1
    asked = service.post("load_weights", **body, optimizer=True)
    return str(service.result(asked["request_id"])["model_id"])


def test_checkpoint_names_its_parent(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        early = sampler(service, run, "early")
        first = save(service, run, "first")
        service.train(run, 0)
        second = save(service, run, "second")
        beside = sampler(service, run, "second")
        assert [parents(service, each) for each in (early, first, second, beside)] == [
            [],
            [],
            [first],
            [second],
        ]
        load(service, run, first, optimizer=False)
        assert parents(service, save(service, run, "third")) == [first]
        load(service, run, beside, optimizer=False)
        assert parents(service, save(service, run, "fourth")) == [beside]


def test_failed_load_leaves_lineage_unchanged(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        first = save(service, run, "first")
        beside = sampler(service, run, "beside")
        failed = service.send(run, "load_weights", path=beside, optimizer=True)
        assert service.result(failed)["category"] == "user"
        assert parents(service, save(service, run, "second")) == [first]


def test_overwriting_checkpoint_keeps_the_parent(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        first = save(service, run, "first")
        latest = save(service, run, "latest")
        service.train(run, 0)
        assert save(service, run, "latest", overwrite=True) == latest
        assert parents(service, latest) == [first]
        load(service, run, latest)
        save(service, run, "latest", overwrite=True)
        assert parents(service, latest) == [first]
        assert parents(service, save(service, run, "last")) == [latest]


def three(service: Local, run: str) -> list[list[str]]:
    """Parents of three saves and a sampler's save that are captured before one is written."""
    with service.writes.shut():
        asked = [service.send(run, "save_weights", path=f"saved-{n}") for n in range(3)]
        asked.append(service.send(run, "save_weights_for_sampler", path="sampled"))
        asked.append(service.send(run, "optim_step", adam_params={"learning_rate": 0.01}))
        service.result(asked[-1])
    return [parents(service, service.result(each)["path"]) for each in asked[:-1]]


def test_save_being_written_is_a_parent(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        saved = [f"tinker://{run}/weights/saved-{n}" for n in range(3)]
        assert three(service, run) == [[], [saved[0]], [saved[1]], [saved[2]]]


def test_failed_save_is_no_parent(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        write = service.write_checkpoint

        def fail(vault: Vault, capture: Any, draft: Any, *rest: Any) -> Any:
            if draft["name"] == "saved-1":
                capture.release()
                raise OSError("There is no room.")
            return write(vault, capture, draft, *rest)

        service.write_checkpoint = fail
        with service.writes.shut():
            asked = [service.send(run, "save_weights", path=f"saved-{n}") for n in range(3)]
            service.result(service.send(run, "optim_step", adam_params={"learning_rate": 0.01}))
            service.writes.open()
            done = [service.result(each) for each in asked]
        assert "no room" in done[1]["error"]
        assert parents(service, done[2]["path"]) == [done[0]["path"]]
        assert parents(service, save(service, run, "after")) == [done[2]["path"]]


def test_saves_lost_in_a_crash_keep_their_parents(home: Path, pico: Model) -> None:
    with Local(home, pico).killed() as service:
        run, reference = service.new_run(), service.new_run()
        expected = [[p.replace(reference, run) for p in each] for each in three(service, reference)]
        lost = Semaphore(0)

        def lose(vault: Vault, capture: Any, draft: Any, *rest: Any) -> Any:
            lost.release()
            raise OSError

        service.write_checkpoint = lose
        service.writes.close()
        asked = [service.send(run, "save_weights", path=f"saved-{n}") for n in range(3)]
        asked.append(service.send(run, "save_weights_for_sampler", path="sampled"))
        service.train(run, 0)
        service.kill()
        service.writes.open()
        assert lost.acquire(timeout=60), "the first save did not reach its write"
    with service.after() as service:
        found = [parents(service, service.result(each)["path"]) for each in asked]
        assert found == expected


@pytest.mark.parametrize("end", ["killed", "stopped", "unloaded"])
def test_restored_run_keeps_its_lineage(home: Path, pico: Model, end: str) -> None:
    with Local(home, pico).killed() if end == "killed" else Local(home, pico) as service:
        run = service.new_run()
        first = save(service, run, "first")
        child = from_state(service, first)
        service.train(run, 0)
        latest = save(service, run, "latest")
        save(service, run, "latest", overwrite=True)
        service.train(run, 1)
        if end == "unloaded":
            for each in (run, child):
                service.result(service.post("unload_model", model_id=each)["request_id"])
    with service.after() as service:
        service.train(run, 2)
        assert parents(service, save(service, run, "next")) == [latest]
        save(service, run, "latest", overwrite=True)
        assert parents(service, latest) == [f"tinker://{run}/weights/next"]
        assert parents(service, save(service, child, "own")) == [first]


def test_deleted_checkpoint_stays_a_parent(home: Path, pico: Model) -> None:
    with Local(home, pico).killed() as service:
        run = service.new_run()
        gone = save(service, run, "gone")
        answer = service.http.delete(f"training_runs/{run}/checkpoints/weights/gone")
        assert answer.status_code < 300, answer.text
    with service.after() as service:
        assert parents(service, save(service, run, "next")) == [gone]


def test_run_of_rebuilt_ledger_keeps_its_lineage(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        first = save(service, run, "first")
        child = from_state(service, first)
    for path in home.glob("ledger.sqlite*"):
        path.unlink()
    assert rebuild_database(home, None, as_json=True)
    with service.after() as service:
        assert parents(service, save(service, child, "own")) == [first]


NAMES = st.sampled_from("abc")
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("save"), NAMES, st.booleans(), st.integers(0, 2)),
        st.tuples(st.just("load"), st.sampled_from("xyabc"), st.just(True), st.just(0)),
    ),
    max_size=12,
)


@given(EVENTS, st.integers(0, 12))
def test_replayed_lineage_equals_the_first(
    events: list[tuple[str, str, bool, int]], crash: int
) -> None:
    """For saves that are being written, that fail, and that a snapshot comes after."""
    live, unwritten, behind = Lineage(), set[str](), list[tuple[str, str]]()
    made: dict[str, list[str]] = {}
    recorded, snapshots = [], [standing(live.line(), ())]
    for number, (what, path, written, late) in enumerate(events):
        if what == "load":
            while behind:
                finish_writes(live, unwritten, behind)  # a load waits for them
            live.begin([path, *made.get(path, [])])
        else:
            while any(each == path for _, each in behind):
                finish_writes(live, unwritten, behind)  # its lock is held until then
            line = live.line(path)
            if not written:
                unwritten.add(str(number))
            live.saving(str(number), path)
            behind.append((str(number), path))
            if written:
                made[path] = parent_of(line, unwritten)
            recorded.append(parent_of(line, unwritten))
        snapshots.append(standing(live.line(), unwritten))
        while len(behind) > late:
            finish_writes(live, unwritten, behind)

    back = Lineage()
    begin = min(crash, len(events))
    back.begin(snapshots[begin])
    again: dict[str, list[str]] = {}
    for what, path, written, _ in events[:begin]:
        again |= {path: made_then(events, path, begin)} if what == "save" and written else {}
    for number, (what, path, written, _) in enumerate(events[begin:], begin):
        if what == "load":
            back.begin([path, *again.get(path, [])])
        elif written:
            again[path] = parent_of(back.line(path), ())
            assert again[path] == recorded[sum(e[0] == "save" for e in events[:number])]
            back.stand_on(path)
        assert standing(back.line(), ()) == snapshots[number + 1]


def finish_writes(live: Lineage, unwritten: set[str], behind: list[tuple[str, str]]) -> None:
    """Record the oldest save that is being written."""
    request_id, path = behind.pop(0)
    if request_id in unwritten:
        live.failed(request_id)
    else:
        live.saved(request_id, path)


def made_then(events: list[tuple[str, str, bool, int]], path: str, upto: int) -> list[str]:
    """Compute the parents of a path's newest checkpoint before an event."""
    line, made = Lineage(), dict[str, list[str]]()
    for what, each, written, _ in events[:upto]:
        if what == "load":
            line.begin([each, *made.get(each, [])])
        elif written:
            made[each] = parent_of(line.line(each), ())
            line.stand_on(each)
    return made.get(path, [])
