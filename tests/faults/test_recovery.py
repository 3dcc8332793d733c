"""Recovery: replayed results are checked, and runs survive every way in which a worker can end."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import everstep
from everstep.vault import Vault
from tests.devices import DEVICES
from tests.faults.keeper import Keeper
from tests.faults.memory_group import MemoryGroup, memory_group
from tests.scenario import MODEL, connect, data, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(params=DEVICES)
def keeper(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Keeper]:
    with Keeper(tmp_path / "home", f"device={request.param}") as running:
        yield running


def fresh(keeper: Keeper, seed: int = 3) -> everstep.TrainingClient:
    service: everstep.ServiceClient = connect(everstep, keeper.url)
    return service.create_lora_training_client(MODEL, rank=4, seed=seed).result()


def change_ledger(keeper: Keeper, statement: str, *values: object) -> None:
    """Change a row of a service that is down, as no code of ours does; removes its checksum."""
    unsealed = statement.replace(" SET ", " SET seal = NULL, ", 1)
    with sqlite3.connect(keeper.home / "ledger.sqlite") as database:
        changed = database.execute(unsealed, values).rowcount
    assert changed == 1


@pytest.fixture
def group() -> Iterator[MemoryGroup]:
    with ExitStack() as stack:
        try:
            made = stack.enter_context(memory_group())
        except OSError as error:
            pytest.skip(f"can't create a control group with a limit: {error}")
        yield made


class Stopped:
    """Keeps a service down during the block."""

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper

    def __enter__(self) -> None:
        self.keeper.pause()

    def __exit__(self, *error: object) -> None:
        self.keeper.resume()


def test_different_replayed_result_marks_the_run_and_fails_pending_operations(
    keeper: Keeper,
) -> None:
    run, neighbour = fresh(keeper), fresh(keeper, 4)
    train(everstep, run, 3)
    expected = train(everstep, neighbour, 2)
    with Stopped(keeper):
        path = (
            "UPDATE operations SET result = ?, result_digest = NULL WHERE scope = ? AND seq_id = 4"
        )
        result = {"metrics": {"optimizer_step": 2.0, "grad_norm": 123.0}, "type": "optim_step"}
        change_ledger(keeper, path, json.dumps(result).encode(), run.model_id)
    with pytest.raises(everstep.RequestFailedError, match="corrupted") as caught:
        train(everstep, run, 1)
    assert "operation 4 (optim_step)" in str(caught.value)
    assert "grad_norm was 123.0" in str(caught.value)
    assert caught.value.category == "server"
    with pytest.raises(everstep.RequestFailedError, match="operation 4"):
        run.save_state("late").result()
    rest = everstep.RestClient(base_url=keeper.url)
    assert rest.get_training_run(run.model_id).result().corrupted
    assert not rest.get_training_run(neighbour.model_id).result().corrupted
    keeper.kill()
    with pytest.raises(everstep.RequestFailedError, match="operation 4"):
        run.save_state("later").result()
    again = fresh(keeper, 4)
    assert train(everstep, again, 2) == expected
    assert train(everstep, neighbour, 1)


def test_damaged_ledger_row_is_reported_and_its_run_does_not_continue(keeper: Keeper) -> None:
    run, neighbour = fresh(keeper), fresh(keeper, 4)
    train(everstep, run, 2)
    expected = train(everstep, neighbour, 2)
    with Stopped(keeper):
        rot = "UPDATE operations SET payload = CAST(payload || 'x' AS BLOB) "
        change_ledger(keeper, f"{rot} WHERE scope = ? AND seq_id = 3", run.model_id)
    with pytest.raises(everstep.RequestFailedError, match=r"operation 3 .* is damaged"):
        train(everstep, run, 1)
    assert train(everstep, neighbour, 1)
    assert expected


def test_damaged_snapshot_is_skipped_for_an_older_one(keeper: Keeper) -> None:
    reference, run = fresh(keeper), fresh(keeper)
    expected = train(everstep, reference, 4)
    begun = train(everstep, run, 1)
    run.save_state("one").result()
    begun += train(everstep, run, 1, shift=1)
    run.save_state("two").result()
    begun += train(everstep, run, 1, shift=2)
    with Stopped(keeper):
        vault = Vault(keeper.home / "vault", writer=False)
        newest = vault.manifest("training", run.model_id, "two")
        blob = newest.files["optimizer.safetensors"].blake3
        file = keeper.home / "vault" / "blobs" / blob[:2] / blob
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert begun + train(everstep, run, 1, shift=3) == expected
    assert "unusable state skipped" in keeper.log.read_text()


def test_other_numeric_environment_is_logged_and_compared_to_a_tolerance(keeper: Keeper) -> None:
    run = fresh(keeper)
    before = train(everstep, run, 3)
    with Stopped(keeper):
        environment = "UPDATE runs SET environment = json_set(environment, '$.threads', 99)"
        change_ledger(keeper, f"{environment} WHERE run_id = ?", run.model_id)
    after = train(everstep, run, 1, shift=9)
    assert after != before
    log = keeper.log.read_text()
    assert "the numeric environment has changed" in log
    assert "99 → " in log
    keeper.kill()
    assert train(everstep, run, 1)
    assert keeper.log.read_text().count("the numeric environment has changed") == 1


def test_base_model_with_other_weights_is_refused_and_nothing_is_lost(
    keeper: Keeper,
) -> None:
    run = fresh(keeper)
    train(everstep, run, 2)
    with Stopped(keeper):
        change_ledger(
            keeper,
            "UPDATE runs SET environment = json_set(environment, '$.base_fingerprint', 'other') "
            "WHERE run_id = ?",
            run.model_id,
        )
    waiting = run.save_state("kept")
    text = "has other weights than when it was trained"
    keeper.wait_until(lambda: text in keeper.log.read_text())
    assert not waiting.done()
    with Stopped(keeper):
        change_ledger(keeper, "UPDATE runs SET environment = NULL WHERE run_id = ?", run.model_id)
    assert waiting.result(60).path.endswith("/kept")


@pytest.mark.parametrize(
    ("number", "how"),
    [
        (signal.SIGKILL, "was killed (SIGKILL)"),
        (signal.SIGSEGV, "crashed (SIGSEGV)"),
        (signal.SIGTERM, "crashed (SIGTERM)"),
    ],
)
def test_worker_that_ends_is_replaced_and_no_client_notices(
    keeper: Keeper, number: signal.Signals, how: str
) -> None:
    reference, run = fresh(keeper), fresh(keeper)
    expected = train(everstep, reference, 3)
    begun = train(everstep, run, 1)
    pending = run.forward_backward(data(everstep, shift=1), "cross_entropy")
    keeper.kill_worker(number)
    run.optim_step(everstep.AdamParams(learning_rate=0.01, weight_decay=0.1)).result()
    output = pending.result()
    assert output.metrics["loss:sum"] == expected[1][0]
    assert begun == expected[:1]
    assert train(everstep, run, 1, shift=2) == expected[2:]
    (result,) = [line for line in keeper.log.read_text().splitlines() if "starting another" in line]
    assert how in result


def logged_lack_of_memory(keeper: Keeper) -> bool:
    """Whether the service said that a worker ended for lack of memory."""
    return "ran out of memory and was killed" in keeper.log.read_text()


def test_worker_killed_in_the_course_of_each_replay_converges(tmp_path: Path) -> None:
    def submit(run: everstep.TrainingClient, number: int) -> Any:
        many = data(everstep, count=24, shift=number)  # some hundredths of a second
        passed = run.forward_backward(many, "cross_entropy")
        run.optim_step(everstep.types.AdamParams(learning_rate=0.01))
        return passed

    def logprobs(future: Any) -> list[list[float]]:
        return [each["logprobs"].tolist() for each in future.result().loss_fn_outputs]

    settings = ("replay_seconds=1000", "worker_attempts=100")
    with Keeper(tmp_path / "home", *settings) as keeper:
        run, steps = fresh(keeper), 0
        begin = time.monotonic()
        while time.monotonic() - begin < 3.0 or steps < 8:  # so much is there to replay
            logprobs(submit(run, steps))
            steps += 1
        vault = Vault(keeper.home / "vault", writer=False)

        def newest() -> int:
            return max((int(name) for _, name in vault.names("snapshot", run.model_id)), default=0)

        keeper.kill_worker()
        pending = submit(run, steps)
        killed_at = [0]
        for _ in range(3):
            keeper.wait_until(lambda: newest() > killed_at[-1] or pending.done())
            if not pending.done():
                killed_at.append(newest())
                keeper.kill_worker()
        seen = logprobs(pending)
        reference = fresh(keeper)
        for number in range(steps):
            submit(reference, number)
        assert logprobs(submit(reference, steps)) == seen
    assert len(killed_at) > 2, "two workers were killed in the course of a replay"
    assert max(killed_at) < 2 * steps


def test_worker_killed_for_lack_of_memory_is_logged_as_such(
    group: MemoryGroup, keeper: Keeper
) -> None:
    reference, run = fresh(keeper), fresh(keeper)
    expected = train(everstep, reference, 3)
    begun = train(everstep, run, 1)
    service = connect(everstep, keeper.url)
    large: list[Any] = []
    while not logged_lack_of_memory(keeper):
        keeper.wait_ready()
        starts = keeper.starts
        for pid in (keeper.pid, keeper.worker_pid):
            group.add(pid)
        chosen = Path(f"/proc/{keeper.worker_pid}/oom_score_adj")
        chosen.write_text("1000")  # whom the kernel kills
        group.limit(group.used + (8 << 20))
        many = range(len(large), len(large) + 8)
        large += [service.create_lora_training_client(MODEL, rank=512, seed=n) for n in many]
        # The service as well, where it asks for memory before the worker's is free: then once more.
        keeper.wait_until(lambda: logged_lack_of_memory(keeper) or keeper.starts > starts)  # noqa: B023
        group.limit(None)
    assert begun + train(everstep, run, 2, shift=1) == expected
    assert len({each.result().model_id for each in large}) == len(large)


def test_hung_worker_is_killed_and_its_operation_retried(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()

    def hang(start: int) -> dict[str, str]:
        return {
            "EVERSTEP_FAILPOINTS": "worker.command.begun=hang@4",
            "EVERSTEP_FAILPOINTS_ONCE": str(marks),
        }

    with Keeper(tmp_path / "home", "hang_seconds=3", environment=hang) as keeper:
        run = fresh(keeper)
        seen = train(everstep, run, 3)
        assert (marks / "worker.command.begun").exists()
        assert "hung: it made no step" in keeper.log.read_text()
        assert train(everstep, fresh(keeper), 3) == seen


def test_only_the_operation_that_repeatedly_ends_its_worker_fails(tmp_path: Path) -> None:
    def poison(start: int) -> dict[str, str]:
        return {"EVERSTEP_FAILPOINTS": "worker.optim_step.begun=abort"}

    with Keeper(tmp_path / "home", "worker_attempts=2", environment=poison) as keeper:
        run, neighbour = fresh(keeper), fresh(keeper, 4)
        loss = run.forward_backward(data(everstep), "cross_entropy").result().metrics["loss:sum"]
        with pytest.raises(everstep.RequestFailedError, match="ended 2 times") as caught:
            run.optim_step(everstep.AdamParams(learning_rate=0.01)).result()
        assert caught.value.category == "server"
        again = run.forward_backward(data(everstep), "cross_entropy").result().metrics["loss:sum"]
        assert again == loss, "the run goes on with the weights it had"
        neighbour.forward_backward(data(everstep), "cross_entropy").result()


def test_more_runs_than_fit_into_memory_continue_exactly(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with Keeper(home) as roomy:
        reference = fresh(roomy)
        expected = [train(everstep, reference, 1, shift=step)[0] for step in range(4)]
    with Keeper(tmp_path / "tight", "memory_bytes=1000000") as keeper:
        runs = [fresh(keeper) for _ in range(12)]
        seen: list[list[object]] = [[] for _ in runs]
        for step in range(4):
            for index, run in enumerate(runs):
                seen[index] += train(everstep, run, 1, shift=step)
        assert all(numbers == expected for numbers in seen)
        assert keeper.log.read_text().count("run evicted") > len(runs)


def test_graceful_stop_leaves_nothing_to_replay(keeper: Keeper) -> None:
    reference, run = fresh(keeper), fresh(keeper)
    expected = train(everstep, reference, 3)
    begun = train(everstep, run, 2)
    home, url = keeper.home, keeper.url
    assert keeper.stop() == 0
    with sqlite3.connect(home / "ledger.sqlite") as database:
        # Whatever was recorded before the snapshot is not looked at again.
        change = "UPDATE operations SET result = x'00', result_digest = NULL"
        database.execute(f"{change} WHERE kind = 'optim_step'")
    with Keeper(home) as second:
        run.holder.http.base_url = second.url
        assert begun + train(everstep, run, 1, shift=2) == expected
    assert url != second.url


def test_second_service_on_one_home_is_refused(keeper: Keeper, tmp_path: Path) -> None:
    keeper.wait_ready()
    command = [sys.executable, "-m", "everstep.cli", "serve", "--home", str(keeper.home)]
    second = subprocess.run([*command, "--port", "0"], capture_output=True, text=True, check=False)
    assert second.returncode == 1
    (result,) = second.stderr.strip().splitlines()
    assert result.startswith(f"everstep: a service runs on {keeper.home} already: process ")
    assert keeper.ready()


def test_home_that_can_not_be_written_is_reported(tmp_path: Path) -> None:
    mounted = tmp_path / "read-only"
    mounted.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "none", str(mounted)], check=False
    ).returncode:
        pytest.skip("mounting a read-only file system needs root")
    try:
        command = [sys.executable, "-m", "everstep.cli", "serve", "--home", str(mounted / "home")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        subprocess.run(["umount", str(mounted)], check=True)
    assert result.returncode == 1
    assert result.stderr.startswith("everstep: ")
    assert "Read-only file system" in result.stderr
    assert "Traceback" not in result.stderr
