"""Background maintenance: a job that fails runs again, and keeps no other job from running."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from everstep.ledger import LedgerError
from everstep.runtime.errors import OperationFailed, WorkerLost
from everstep.runtime.maintenance.background import run_every
from everstep.vault import CheckpointDamaged, StoreFailed, VaultBusy
from tests.runtime.local import Local

FAILURES = [
    OSError(28, "full"),
    StoreFailed("no answer"),
    VaultBusy("a backup"),
    CheckpointDamaged("rot"),
    LedgerError("closed"),
    OperationFailed("no"),
    WorkerLost("gone"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda each: type(each).__name__)
def test_failed_job_runs_again_beside_the_others(failure: Exception) -> None:
    async def work() -> None:
        runs, others = asyncio.Semaphore(0), asyncio.Semaphore(0)
        count = 0

        async def failing() -> None:
            nonlocal count
            count += 1
            if count == 1:
                raise failure
            runs.release()

        async def other() -> None:
            others.release()

        jobs = [asyncio.create_task(run_every(0, job)) for job in (failing, other)]
        async with asyncio.timeout(30):
            await runs.acquire()
            await others.acquire()
        assert count >= 2
        assert not any(job.done() for job in jobs)
        for job in jobs:
            job.cancel()
        ended = await asyncio.gather(*jobs, return_exceptions=True)
        assert [type(each) for each in ended] == [asyncio.CancelledError] * 2

    asyncio.run(work())


def test_bug_in_a_job_is_not_hidden() -> None:
    async def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(run_every(0, broken))


def test_service_collects_after_a_collection_that_failed(
    home: Any, pico: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from everstep.vault import Vault, gc

    real, calls = gc.collect, 0

    def fails_once(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise StoreFailed("no answer")
        return real(*arguments, **options)

    monkeypatch.setattr(gc, "collect", fails_once)
    soon: dict[str, Any] = {"collect_interval_seconds": 0.05, "collect_grace_seconds": 0.0}
    with Local(home, pico, **soon) as service:
        run = service.new_run()
        service.train(run, 0)
        saved = service.do(run, "save_weights", path="a")
        assert "path" in saved
        manifest = Vault(home / "vault", writer=False).manifest("training", run, "a")
        digest = manifest.files["optimizer.safetensors"].blake3
        blob = home / "vault" / "blobs" / digest[:2] / digest
        assert blob.exists()
        service.http.delete(f"training_runs/{run}/checkpoints/weights/a").raise_for_status()
        service.train(run, 1)
        while blob.exists():
            pass
    assert calls > 1
