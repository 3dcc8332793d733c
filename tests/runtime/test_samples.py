"""Samples: cancellation, batch polls, limits, and their state after a restart."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from everstep.engine import Model
from everstep.ledger import queries
from tests.runtime.local import Local
from tests.scenario import MODEL

TOLD_TO_WAIT = {"X-Tinker-Sampling-Backpressure": "1"}
PROMPT = {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7, 8]}]}


def sampler(local: Local, number: int = 0) -> str:
    body: dict[str, Any] = {
        "session_id": local.session(),
        "sampling_session_seq_id": number,
        "base_model": MODEL,
    }
    return str(local.post("create_sampling_session", **body)["sampling_session_id"])


def body(name: str, seq_id: int = 0, length: int = 4, **more: Any) -> dict[str, Any]:
    params = {"max_tokens": length, "seed": seq_id, "stop": []}
    return {
        "prompt": PROMPT,
        "sampling_params": params,
        "sampling_session_id": name,
        "seq_id": seq_id,
        **more,
    }


def submit(local: Local, name: str, seq_id: int = 0, length: int = 4) -> str:
    return str(local.post("asample", **body(name, seq_id, length))["request_id"])


def poll(local: Local, name: str, cursor: int = 0, client: int = 0, **more: Any) -> Any:
    target = {"sampling_session_id": name, "cloned_sampler_id": client}
    return local.post("retrieve_futures", target=target, prev_cursor=cursor, **more)


def cancel(local: Local, request_id: str) -> int:
    return int(local.http.post("cancel_future", json={"request_id": request_id}).status_code)


@pytest.fixture
def local(home: Path, pico: Model) -> Any:
    with Local(home, pico) as running:
        yield running


def test_impossible_sample_count_fails_at_once(local: Local) -> None:
    name = sampler(local)
    status, text = local.refused("asample", **body(name, 0, num_samples=10**20))
    assert status == 400 and "num_samples is an integer beyond 64 bits" in text
    for number, count in enumerate((0, 1025, 2**63 - 1)):
        future = local.post("asample", **body(name, number, num_samples=count))
        assert "num_samples must be 1 to 1024" in local.result(future["request_id"])["error"]
    assert "error" not in local.result(submit(local, name, 9))


# Cancelling


def test_cancelled_sample_fails_and_frees_its_slot(local: Local) -> None:
    name = sampler(local)
    alone = local.result(submit(local, name, 7))
    with local.steps.shut():
        long = submit(local, name, 0, length=2000)
        other = submit(local, name, 1)
        assert [cancel(local, long) for _ in range(2)] == [204, 204]
        failure = local.result(long)
        assert failure == {"error": "This sample was cancelled by its client.", "category": "user"}
    local.result(other)
    assert not local.commands._samplers._batches[MODEL].busy, "the long one is gone"
    assert local.result(submit(local, name, 7)) == alone
    assert cancel(local, other) == 204, "one that has ended stays as it is"
    assert "error" not in local.result(other)


def test_cancelled_sample_stays_cancelled_after_restart(home: Path, pico: Model) -> None:
    with Local(home, pico) as first:
        name = sampler(first)
        with first.steps.shut():
            gone, kept = submit(first, name, 0), submit(first, name, 1)
            assert cancel(first, gone) == 204
    with first.after() as second:
        assert "cancelled" in second.result(gone)["error"]
        assert "error" not in second.result(kept)
        assert submit(second, name, 0) == gone, "a late retry does not bring it back"


def test_other_operations_cannot_be_cancelled(local: Local) -> None:
    run = local.new_run()
    saved = local.send(run, "save_weights", path="s")
    assert local.refused("cancel_future", request_id=saved)[0] == 400
    assert local.refused("cancel_future", request_id="nobody")[0] == 404
    assert "error" not in local.result(saved)


# Polling for many


def test_batch_poll_returns_samples_in_order_of_completion(local: Local) -> None:
    name = sampler(local)
    wrong = submit(local, name, 9, length=9999)
    ids = [submit(local, name, number, 4 - number) for number in range(3)]
    for each in ids:
        local.result(each)
    page = poll(local, name)
    states = {each["request_id"]: each["state"] for each in page["completions"]}
    assert states == {wrong: "failed", **dict.fromkeys(ids, "finished")}
    assert page["completions"][0]["request_id"] == wrong
    size = page["completions"][1]["response_payload_uncompressed_size"]
    first = page["completions"][1]["request_id"]
    answer = local.poll(first, accept="application/x-protobuf", allow_metadata_only=False)
    assert len(answer.content) == size
    assert page["cursor"] == 4
    assert poll(local, name, 2)["completions"] == page["completions"][2:]
    assert poll(local, name, 4, timeout=0) == {"completions": [], "cursor": 4}


def test_batch_poll_waits_for_the_next_completion(local: Local) -> None:
    name = sampler(local)
    answers: list[Any] = []
    waiting = threading.Thread(target=lambda: answers.append(poll(local, name)))
    with local.steps.shut():
        request_id = submit(local, name)
        waiting.start()
        assert poll(local, name, timeout=0)["completions"] == []
    waiting.join(60)
    assert [each["request_id"] for each in answers[0]["completions"]] == [request_id]


def test_batch_poll_returns_only_the_clients_samples(local: Local) -> None:
    name = sampler(local)
    first = local.post("join_sampling_session", sampling_session_id=name)["client_counter"]
    second = local.post("join_sampling_session", sampling_session_id=name)["client_counter"]
    assert (first, second) == (1, 2)
    ids = {number: submit(local, name, number * 1_000_000_000) for number in range(3)}
    for number, request_id in ids.items():
        local.result(request_id)
        page = poll(local, name, client=number)
        assert [each["request_id"] for each in page["completions"]] == [request_id]
    assert local.refused("join_sampling_session", sampling_session_id="nobody")[0] == 404
    assert local.refused("retrieve_futures", target={"sampling_session_id": "nobody"})[0] == 404


def test_only_acknowledged_results_are_dropped(local: Local) -> None:
    name, other = sampler(local), sampler(local, 1)
    kept, gone, foreign = submit(local, name, 0), submit(local, name, 1), submit(local, other, 0)
    for each in (kept, gone, foreign):
        local.result(each)
    for _ in range(2):
        poll(local, name, timeout=0, retrieved_request_ids=[gone, foreign, "nobody"])
    answer = local.poll(gone)
    assert answer.status_code == 410
    assert "dropped" in answer.json()["detail"]
    assert local.http.get(f"everstep/samples/{gone}/events").status_code == 410
    assert "error" not in local.result(kept)
    assert "error" not in local.result(foreign)
    page = {e["request_id"]: e for e in poll(local, name)["completions"]}
    assert page.keys() == {kept, gone}


def test_cursors_counters_and_drops_survive_restart(home: Path, pico: Model) -> None:
    with Local(home, pico) as first:
        name = sampler(first)
        ids = [submit(first, name, number) for number in range(2)]
        for each in ids:
            first.result(each)
        before = poll(first, name)
        first.post("join_sampling_session", sampling_session_id=name)
        poll(first, name, timeout=0, retrieved_request_ids=[ids[0]])
        with first.steps.shut():
            late = submit(first, name, 2)
    with first.after() as second:
        second.result(late)
        after = poll(second, name, before["cursor"])
        assert [each["request_id"] for each in after["completions"]] == [late]
        again = [each["request_id"] for each in poll(second, name)["completions"]]
        assert again == [each["request_id"] for each in before["completions"]] + [late]
        assert second.poll(ids[0]).status_code == 410
        joined = second.post("join_sampling_session", sampling_session_id=name)
        assert joined["client_counter"] == 2


# Back-pressure


def test_samples_beyond_the_limit_are_refused_with_retry_after(home: Path, pico: Model) -> None:
    with Local(home, pico, max_inflight_samples=2) as local:
        name = sampler(local)
        with local.steps.shut():
            first, second = submit(local, name, 0), submit(local, name, 1)
            busy = local.http.post("asample", json=body(name, 2), headers=TOLD_TO_WAIT)
            assert busy.status_code == 429
            assert (busy.headers["retry-after"], busy.headers["retry-after-ms"]) == ("1", "1000")
            assert submit(local, name, 0) == first, "a retry has its place"
            failed = submit(local, name, 3, length=9999)
            assert "context window" in local.result(failed)["error"]
            cancel(local, second)
            third = submit(local, name, 2)
        assert "error" not in local.result(first)
        assert "error" not in local.result(third)


def test_request_without_backpressure_header_waits_for_a_slot(home: Path, pico: Model) -> None:
    with Local(home, pico, max_inflight_samples=1) as local:
        name = sampler(local)
        answers: list[Any] = []
        later = body(name, 1)
        late = threading.Thread(
            target=lambda: answers.append(local.http.post("asample", json=later))
        )
        with local.steps.shut():
            first = submit(local, name, 0)
            late.start()
            late.join(0.3)
            assert answers == [], "it is not refused"
            assert submit(local, name, 0) == first, "a retry does not wait"
        late.join(60)
        assert answers[0].status_code == 200
        assert "error" not in local.result(answers[0].json()["request_id"])
        assert "error" not in local.result(first)


def test_wait_for_a_slot_times_out(home: Path, pico: Model) -> None:
    with Local(home, pico, max_inflight_samples=1, poll_seconds=0.05) as local:
        name = sampler(local)
        with local.steps.shut():
            submit(local, name, 0)
            refused = local.http.post("asample", json=body(name, 1))
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")


# Samplers


def test_samplers_with_equal_numbers_keep_their_own_weights(home: Path, pico: Model) -> None:
    """Tinkex counts samplers in its service client and in each run, from 0 everywhere."""
    unnamed = {"sampling_session_seq_id": 0}

    def ours(sampling_session_id: str, **_: Any) -> str:
        return sampling_session_id

    with Local(home, pico) as first:
        runs = [first.new_run(seed) for seed in (1, 2)]
        for run in runs:
            first.train(run, 0)
        paths = [first.do(run, "save_weights_for_sampler", path="s")["path"] for run in runs]
        place: dict[str, Any] = {"session_id": first.session(), **unnamed}
        subjects: list[Any] = [{"base_model": MODEL}, *({"model_path": path} for path in paths)]
        made = [ours(**first.post("create_sampling_session", **place, **s)) for s in subjects]
        saved = [first.do(run, "save_weights_for_sampler", **unnamed) for run in runs]
        names = [*made, *(ours(**each) for each in saved)]
        assert len(set(names)) == 5
        draws = [drawn(first, name, 0) for name in names]
        assert draws[1:3] == draws[3:]
        assert draws[0] != draws[1] != draws[2]
    with first.after() as second:
        again = [ours(**second.post("create_sampling_session", **place, **s)) for s in subjects]
        assert again == made, "a retry finds its own"
        assert [drawn(second, name, 1) for name in names] == draws


# Inflight samplers


def inflight(local: Local, run: str, number: int) -> str:
    body = {"sampling_session_seq_id": number, "kind": "inflight"}
    return str(local.do(run, "save_weights_for_sampler", **body)["sampling_session_id"])


def drawn(local: Local, name: str, seq_id: int) -> Any:
    """The tokens that a sampler draws with a fixed seed."""
    answer = body(name, seq_id, 12)
    answer["sampling_params"]["seed"] = 1
    return local.result(local.post("asample", **answer)["request_id"])["sequences"]


def test_inflight_samplers_follow_inflight_saves(home: Path, pico: Model) -> None:
    with Local(home, pico) as first:
        run = first.new_run()
        first.train(run, 0)
        follower = inflight(first, run, 0)
        snapshot = first.do(
            run, "save_weights_for_sampler", sampling_session_seq_id=1, kind="snapshot"
        )["sampling_session_id"]
        old = drawn(first, follower, 0)
        assert drawn(first, snapshot, 0) == old
        first.train(run, 1)
        assert drawn(first, follower, 1) == old, "only a save moves it"
        with first.steps.shut():
            waiting = first.post("asample", **body(follower, 2, 12))["request_id"]
            saving = first.send(
                run, "save_weights_for_sampler", sampling_session_seq_id=2, kind="inflight"
            )
        newer = str(first.result(saving)["sampling_session_id"])
        new = drawn(first, newer, 0)
        assert new != old
        assert drawn(first, follower, 3) == new
        assert drawn(first, snapshot, 1) == old
        first.result(waiting)
    with first.after() as second:
        assert drawn(second, follower, 4) == new
        assert drawn(second, newer, 1) == new
        second.train(run, 2)
        newest = drawn(second, inflight(second, run, 3), 0)
        assert newest not in (old, new)
        assert drawn(second, follower, 5) == drawn(second, newer, 2) == newest


def test_inflight_save_with_a_name_fails(local: Local) -> None:
    run = local.new_run()
    failed = local.do(run, "save_weights_for_sampler", path="n", kind="inflight")
    assert "takes no name" in failed["error"]


def ephemeral(local: Local) -> list[str]:
    """The names of the unnamed saves that are in the vault."""
    manifests = local.home / "vault" / "manifests" / "sampler"
    return sorted(each.stem for each in manifests.glob("*/ephemeral-*.json"))


def collect(local: Local) -> None:
    local.post("everstep/vault/collect", grace_seconds=0)


def test_unnamed_save_stays_while_a_sampler_uses_it(home: Path, pico: Model) -> None:
    with Local(home, pico) as local:
        run = local.new_run()
        follower = inflight(local, run, 0)
        with local.steps.shut():
            late = local.post("asample", **body(follower, 0))["request_id"]
            saving = local.send(
                run, "save_weights_for_sampler", sampling_session_seq_id=1, kind="inflight"
            )
        local.result(saving)
        local.result(late)
        collect(local)
        assert ephemeral(local) == ["ephemeral-2"], "nothing samples from the first any more"
        path = local.http.get(f"samplers/{follower}").json()["model_path"]
        local._session, borrowed = None, local.session()
        guest = local.post("create_session")["session_id"]
        borrower = local.post(
            "create_sampling_session", session_id=guest, sampling_session_seq_id=0, model_path=path
        )["sampling_session_id"]
        local.post(f"sessions/{borrowed}/finish", reason={"type": "success"})
        assert borrowed
        expected = drawn(local, borrower, 0)
        for session in (local.session(), run.split(":")[0]):
            local.post(f"sessions/{session}/finish", reason={"type": "success"})
        collect(local)
        assert drawn(local, borrower, 1) == expected
        local.post(f"sessions/{guest}/finish", reason={"type": "success"})
        collect(local)
        assert ephemeral(local) == []


WEEK = 7 * 24 * 3600


def test_unnamed_saves_of_absent_client_are_collected(home: Path, pico: Model) -> None:
    begin = datetime.now(UTC)

    def later(seconds: float) -> Any:
        return mock.patch.object(queries, "now", lambda: begin + timedelta(seconds=seconds))

    with Local(home, pico) as local:
        run = local.new_run()
        saved = local.do(run, "save_weights_for_sampler", sampling_session_seq_id=0)
        name = str(saved["sampling_session_id"])
        with later(WEEK - 60):
            collect(local)
        with later(WEEK + 60):
            local.post("session_heartbeat", session_id=local.session())
            collect(local)
        with later(2 * WEEK + 120):
            local.result(local.post("asample", **body(name, 0))["request_id"])
            collect(local)
        assert ephemeral(local) == ["ephemeral-1"], "it was heard of, then it was used"
        with later(3 * WEEK + 180):
            collect(local)
        assert ephemeral(local) == []
        late = local.post("asample", **body(name, 1))["request_id"]
        assert "does not exist" in local.result(late)["error"]
