"""A deletion killed at any point leaves the run whole or deleted, and harms no other run."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import pytest

import everstep
import everstep.runtime.deletion
from everstep import failpoints
from everstep.testing.nursery import Nursery
from everstep.vault import Vault
from everstep.vault.storage.keys import KINDS
from everstep.vault.verify import verify
from tests.faults.one_process import LOADED, OneProcessKeeper
from tests.scenario import MODEL, connect, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
POINTS = [name for name in failpoints.registered() if name.startswith("runtime.deletion.")]
WHOLE = "runtime.deletion.stopped"
KILLS = [*(f"{name}=kill" for name in POINTS), "vault.delete.removed=kill@2"]


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield stack.enter_context(Nursery(LOADED))


def test_deletions_have_a_failpoint_at_each_step() -> None:
    steps = [name.rsplit(".", 1)[1] for name in POINTS]
    assert sorted(steps) == ["files", "finished", "recorded", "rows", "stopped"]


def remove(url: str, path: str) -> httpx.Response | None:
    """Delete a run or session; returns None if the service died meanwhile."""
    try:
        return httpx.delete(f"{url}/api/v1/everstep/{path}", timeout=60)
    except httpx.TransportError:
        return None


def everything_of(home: Path, run: str) -> list[str]:
    """Return what the ledger and the vault hold of a run, but the log and tombstones."""
    vault = Vault(home / "vault", writer=False)
    found = [f"{kind} {name}" for kind in KINDS for _, name in vault.names(kind, run)]
    with closing(sqlite3.connect(home / "ledger.sqlite")) as database:
        for table, column in (
            ("runs", "run_id"),
            ("operations", "scope"),
            ("samplers", "sampler_id"),
            ("checkpoints", "run_id"),
        ):
            query = f"SELECT {column} FROM {table} WHERE {column} LIKE ?"
            found += [f"{table} {row[0]}" for row in database.execute(query, (f"{run}%",))]
    return found


@pytest.mark.long(reason="the first one waits until the nursery has imported torch")
@pytest.mark.parametrize("kind", ["training_runs", "sessions"])
@pytest.mark.parametrize("kill", KILLS)
def test_killed_deletion_is_whole_or_done(
    tmp_path: Path, nursery: Nursery, kill: str, kind: str
) -> None:
    def arming(start: int) -> Mapping[str, str]:
        return {failpoints.VARIABLE: kill} if start == 1 else {}

    with OneProcessKeeper(nursery, tmp_path / "home", {}, arming) as keeper:
        keeper.wait_ready()
        with connect(everstep, keeper.url) as client:
            run = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
            train(everstep, run, 1)
            path = run.save_state("a").result().path
            run.save_weights_for_sampler("b").result()
            copy = client.create_rest_client().copy_weights(path, "p").result()
            session = run.model_id.partition(":")[0]
            client.close("success").result()
        with connect(everstep, keeper.url) as client:
            fork, reference = (
                client.create_training_client_from_state_with_optimizer(each).result()
                for each in (path, copy)
            )
            keeper.kill()  # the next process is armed
            keeper.wait_ready()
            target = f"{kind}/{run.model_id if kind == 'training_runs' else session}"
            assert remove(keeper.url, target) is None, "it was not killed"
            keeper.wait_until(lambda: keeper.starts == 3)
            keeper.wait_ready()
            answer = httpx.get(f"{keeper.url}/api/v1/training_runs/{run.model_id}")
            if kill.startswith(WHOLE):
                assert answer.status_code == 200
                assert client.create_training_client_from_state(path).result()
                assert everything_of(keeper.home, run.model_id)
            else:
                assert answer.status_code == 404 and "was deleted" in answer.json()["detail"]
                assert everything_of(keeper.home, run.model_id) == []
            done = remove(keeper.url, target)
            assert done is not None and done.json()["checkpoints"] == 2, done
            assert everything_of(keeper.home, run.model_id) == []
            collect: Any = {"grace_seconds": 0}
            url = f"{keeper.url}/api/v1/everstep/vault/collect"
            httpx.post(url, json=collect, timeout=60).raise_for_status()
            assert train(everstep, fork, 2) == train(everstep, reference, 2)
            assert verify(Vault(keeper.home / "vault", writer=False)).ok
