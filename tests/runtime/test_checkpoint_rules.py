"""Rules of checkpoints: names, overwriting, time to live, and when a load is allowed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from everstep.engine import Model
from everstep.ledger import queries
from tests.runtime.local import Local, batch
from tests.scenario import MODEL

DAY = 24 * 3600


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Moves the clock that the index compares expiry times with."""

    def advance(seconds: float) -> None:
        monkeypatch.setattr(queries, "now", lambda: datetime.now(UTC) + timedelta(seconds=seconds))

    return advance


def paths(service: Local, run: str) -> list[list[str]]:
    """The paths in each of the three lists."""
    of_run = service.http.get(f"training_runs/{run}/checkpoints").json()["checkpoints"]
    of_all = service.http.get("checkpoints").json()["checkpoints"]
    last = service.http.get(f"training_runs/{run}").json()["last_checkpoint"]
    return [[c["tinker_path"] for c in each] for each in (of_run, of_all, [last] if last else [])]


def test_expired_checkpoint_is_neither_listed_nor_loadable_and_frees_its_name(
    home: Path, pico: Model, clock: Any
) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        path = service.do(run, "save_weights", path="a", ttl_seconds=DAY)["path"]
        listed = service.http.get("checkpoints").json()["checkpoints"][0]
        expires = datetime.fromisoformat(listed["expires_at"])
        assert expires - datetime.fromisoformat(listed["time"]) == pytest.approx(
            timedelta(days=1), abs=timedelta(seconds=5)
        )
        clock(DAY - 60)
        assert paths(service, run) == [[path]] * 3
        clock(DAY + 60)
        assert paths(service, run) == [[]] * 3
        status, text = service.refused("weights_info", tinker_path=path)
        assert (status, "has expired" in text) == (404, True)
        for optimizer in (False, True):
            answer = service.do(run, "load_weights", path=path, optimizer=optimizer)
            assert (answer["category"], "has expired" in answer["error"]) == ("user", True)
        body: dict[str, Any] = {"session_id": service.session(), "model_seq_id": 7}
        created = service.post("load_weights", **body, path=path)
        assert "has expired" in service.result(created["request_id"])["error"]
        sampler: dict[str, Any] = {"session_id": service.session(), "sampling_session_seq_id": 0}
        status, text = service.refused("create_sampling_session", **sampler, model_path=path)
        assert (status, "has expired" in text) == (404, True)
        assert service.do(run, "save_weights", path="a")["path"] == path
    with service.after() as service:
        assert paths(service, run) == [[path]] * 3
        service.train(run, 0)


@pytest.mark.parametrize("route", ["save_weights", "save_weights_for_sampler"])
def test_save_fails_for_ttl_out_of_bounds_and_names_them(
    home: Path, pico: Model, route: str
) -> None:
    with Local(home, pico, min_ttl_seconds=60, max_ttl_seconds=120) as service:
        run = service.new_run()
        for ttl in (0, -1, 59, 121):
            answer = service.do(run, route, path="a", ttl_seconds=ttl)
            assert answer["category"] == "user"
            assert "ttl_seconds must be from 60 to 120" in answer["error"]
            assert f"got {ttl}" in answer["error"]
        for ttl in (60, 120):
            assert "path" in service.do(run, route, path=f"b{ttl}", ttl_seconds=ttl)
    with service.after() as service:  # as it is without settings
        assert "from 3600 to" in service.do(run, route, path="c", ttl_seconds=60)["error"]


def test_save_to_existing_name_fails_with_hosted_services_text(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        future = service.send(run, "save_weights", path="a", user_metadata={"epoch": "1"})
        service.result(future)
        place = service._sequence[run]
        retry = service.send(run, "save_weights", place, path="a", user_metadata={"epoch": "1"})
        assert retry == future, "a retry is no conflict"
    with service.after() as service:
        answer = service.do(run, "save_weights", path="a")
        assert answer["category"] == "user"
        assert answer["error"] == (
            f"Checkpoint 'a' already exists for model {run} in weights. Please choose a different "
            "name to avoid overwriting."
        )
        assert service.do(run, "save_weights_for_sampler", path="a")["path"].endswith("/a")


def test_overwrite_replaces_whole_checkpoint_when_it_is_durable(home: Path, pico: Model) -> None:
    with Local(home, pico, poll_seconds=0.02) as service:
        run = service.new_run()
        service.train(run, 0)
        path = service.do(run, "save_weights", path="a", user_metadata={"epoch": "1"})["path"]
        old = service.train(run, 1)
        with service.writes.shut():
            saving = service.send(run, "save_weights", path="a", overwrite=True)
            service.writes.wait_reached()
            listed = service.http.get("checkpoints").json()["checkpoints"]
            assert [each["user_metadata"] for each in listed] == [{"epoch": "1"}]
            assert service.poll(saving).status_code == 408
        assert service.result(saving)["path"] == path
        listed = service.http.get("checkpoints").json()["checkpoints"]
        assert [each.get("user_metadata") for each in listed] == [None]
        new = service.train(run, 2)
        service.do(run, "load_weights", path=path, optimizer=True)
        assert service.train(run, 2) == new != old


def test_load_first_only_refuses_later_loads(home: Path, pico: Model) -> None:
    with Local(home, pico, load_first_only=True) as service:
        run, other = service.new_run(seed=1), service.new_run(seed=2)
        service.train(run, 0)
        path = service.do(run, "save_weights", path="a")["path"]
        expected = service.train(run, 1)
        body = {"model_id": run, "seq_id": 6, "path": path}
        refusal = (400, "LoadWeights is not permitted with seq_id 6")
        assert service.refused("load_weights", **body) == refusal
        assert service.refused("load_weights", **body) == refusal, "so is its retry"
        service._sequence[run] = 6
        service.train(run, 2)  # the refused one took its place: nothing waits for it
        assert service.do(other, "load_weights", path=path, optimizer=True)["path"] == path
        assert service.train(other, 1) == expected
        created = service.post(
            "load_weights", session_id=service.session(), model_seq_id=9, path=path, optimizer=True
        )
        assert service.train(service.result(created["request_id"])["model_id"], 1) == expected
    with service.after() as service:  # without the setting
        service.do(run, "load_weights", path=path, optimizer=True)
        assert service.train(run, 1) == expected


def test_run_of_unserved_model_waits_and_reports_why(home: Path, pico: Model) -> None:
    with Local(home, pico, shutdown_seconds=0.01) as service:
        run, reference = service.new_run(), service.new_run()
        expected = service.train(reference, 0)
        service.steps.close()  # until it ends
        waiting = service.step(run, 0)
    with service.after(name="another", poll_seconds=0.02) as service:
        answer = service.poll(waiting[0])
        assert answer.status_code == 408
        assert answer.json()["queue_state"] == "paused_capacity"
        assert f"start the service with --model {MODEL}" in answer.json()["queue_state_reason"]
        place = {"model_id": run, "seq_id": 3}
        for refusal in (
            service.refused("get_info", model_id=run),
            service.refused("forward", **place, forward_input=batch()),
        ):
            assert (refusal[0], f"--model {MODEL}" in refusal[1]) == (503, True)
    with service.after(name=MODEL) as service:
        assert [service.result(each) for each in waiting] == expected
