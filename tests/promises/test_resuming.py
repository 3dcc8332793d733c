"""P3 and P4 for whole loops: through restarts of the service, and around damaged checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

import everstep
from everstep import Checkpointer, CheckpointPolicy, LoopEvent, LoopState
from everstep.vault import Vault
from everstep.vault.storage.keys import blob_key
from everstep.wire.paths import parse_path
from tests.faults.keeper import Keeper
from tests.promises.test_exactness import hashes
from tests.scenario import MODEL, connect, train

pytestmark = pytest.mark.slow
STEPS = 6


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    with Keeper(tmp_path / "home") as running:
        running.wait_ready()
        yield running


def loop(
    service: everstep.ServiceClient,
    name: str,
    policy: CheckpointPolicy,
    disturb: Callable[[int], None] = lambda step: None,
) -> tuple[everstep.Resumed, list[LoopEvent], list[str]]:
    """Run a loop from its current state to its end.

    Returns:
        The resumed run, the loop's events, and the paths of its checkpoints.
    """
    events: list[LoopEvent] = []
    resumed = everstep.resume_or_create(
        service, name, MODEL, rank=4, seed=3, on_event=events.append
    ).result()
    with Checkpointer(resumed, policy, events.append) as saves:
        for step in range(resumed.state.step + 1, STEPS + 1):
            train(everstep, resumed.client, 1, shift=step)
            saves.save(LoopState(step))  # in progress when the loop is disturbed
            disturb(step)
    return resumed, events, [event.path or "" for event in events if event.kind == "saved"]


def damage(home: Path, path: str, file: str) -> None:
    """Change one byte in the middle of one of a checkpoint's files."""
    parsed = parse_path(path)
    manifest = Vault(home / "vault", writer=False).manifest("training", parsed.run_id, parsed.name)
    blob = home / "vault" / blob_key(manifest.files[file].blake3)
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.chmod(0o600)
    blob.write_bytes(content)


def test_p3_saves_in_progress_survive_the_service(keeper: Keeper) -> None:
    service = connect(everstep, keeper.url)
    policy = CheckpointPolicy(keep_last=2)
    *_, reference = loop(service, "reference", policy)

    def kill(step: int) -> None:
        if step in (2, 5):
            keeper.kill()

    _, events, saved = loop(service, "killed", policy, kill)
    kinds = [event.kind for event in events]
    assert kinds.count("saved") == STEPS and "save_failed" not in kinds
    assert kinds.count("deleted") == STEPS - 2
    assert hashes(keeper.home, saved[-1]) == hashes(keeper.home, reference[-1])


def test_p4_damaged_checkpoint_is_named_and_an_older_one_resumes_exactly(
    keeper: Keeper,
) -> None:
    service = connect(everstep, keeper.url)
    _, _, saved = loop(service, "damaged", CheckpointPolicy())
    end = hashes(keeper.home, saved[-1])
    for path, file in (
        (saved[-1], "optimizer.safetensors"),
        (saved[-2], "adapter_model.safetensors"),
    ):
        damage(keeper.home, path, file)
    resumed, events, again = loop(service, "damaged", CheckpointPolicy(keep_last=1))
    assert [skipped.path for skipped in resumed.report.skipped] == saved[:-3:-1]
    assert all(skipped.reason for skipped in resumed.report.skipped)
    assert resumed.report.path == saved[-3] and resumed.state.step == STEPS - 2
    assert hashes(keeper.home, again[-1]) == end, "the end is bit-identical"
    deleted = {event.path for event in events if event.kind == "deleted"}
    assert deleted == {*saved[:-2], *again[:-1]}, "the damaged ones are kept"


def test_finished_session_is_not_blamed_on_checkpoints(keeper: Keeper) -> None:
    service = connect(everstep, keeper.url)
    loop(service, "finished", CheckpointPolicy(keep_last=1))
    url = f"{keeper.url}/api/v1/sessions/{service.holder.opened}/finish"
    body = {"reason": {"type": "interrupted"}}
    assert httpx.post(url, json=body, headers={"X-API-Key": "tml-test"}).status_code == 200
    with pytest.raises(everstep.RunLost, match="is gone"):
        everstep.resume_or_create(service, "finished", MODEL, rank=4, seed=3).result()
    fresh = connect(everstep, keeper.url)
    resumed = everstep.resume_or_create(fresh, "finished", MODEL, rank=4, seed=3).result()
    assert resumed.state.step == STEPS
