"""Vault in a bucket: lost replies, late requests, an unavailable store, killed writers."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from everstep.failpoints import VARIABLE
from everstep.vault import CheckpointDamaged, StoreFailed, Vault, gc
from everstep.vault.integrity import quarantine_damaged
from everstep.vault.storage.keys import blob_key, manifest_key
from everstep.vault.verify import verify
from tests.buckets.bucket import Bucket
from tests.vault.checkpoints import RUN, load, save
from tests.vault.test_crash import CASES, NEW, OLD, Outcome, found, overwrite

ALWAYS = 1 << 30
TRANSIENT = ["lost reply", "reset", "503", "503 done"]


def open_again(
    root: Path, bucket: Bucket, *, retry_seconds: float = 20, writer: bool = True
) -> Vault:
    """Open the vault as a new process does."""
    (root / "tmp").mkdir(exist_ok=True)
    return Vault(root, storage=bucket.storage(retry_seconds=retry_seconds), writer=writer)


def fresh(tmp_path: Path, bucket: Bucket, *, retry_seconds: float = 20) -> Vault:
    """Return a vault with the initial content of every case, in an empty bucket."""
    bucket.clear()
    vault = open_again(tmp_path, bucket, retry_seconds=retry_seconds)
    save(vault, "old", OLD)
    save(vault, "other", {"adapter": b"of another"})
    vault.put([b"of no checkpoint"])
    return vault


def check(tmp_path: Path, bucket: Bucket, name: str, allowed: list[Outcome]) -> None:
    """Check that a new process finds no torn checkpoint, collects none, and can save."""
    vault = open_again(tmp_path, bucket)
    outcome = found(vault, name)
    assert outcome in allowed
    gc.collect(vault, 0)
    manifests = list(vault.manifests())
    assert manifests
    for manifest in manifests:
        load(vault, manifest)
    assert found(vault, name) == outcome
    assert found(vault, "other") == {"adapter": b"of another"}
    save(vault, name, NEW, overwrite=True)
    assert found(vault, name) == NEW


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "name", "allowed"), CASES[:-1], ids=lambda c: getattr(c, "__name__", "")
)
def test_checkpoint_is_whole_or_absent_after_the_store_fails_at_any_request(
    tmp_path: Path,
    bucket: Bucket,
    work: Callable[[Vault], None],
    name: str,
    allowed: list[Outcome],
) -> None:
    for after in itertools.count(1):
        vault = fresh(tmp_path, bucket, retry_seconds=0.05)
        fault = ("lost reply", "reset")[after % 2]
        bucket.fault(fault, first=after, count=ALWAYS)
        may_be = allowed
        try:
            work(vault)
            may_be = allowed[-1:]  # the work was acknowledged
        except StoreFailed:
            pass
        reached = bucket.request_count() >= after
        bucket.fault()
        check(tmp_path, bucket, name, may_be)
        if not reached:
            break
    assert after > 3


@pytest.mark.slow
@pytest.mark.parametrize("shift", range(len(TRANSIENT) if os.environ.get("EVERSTEP_SOAK") else 1))
def test_transient_fault_of_any_request_changes_nothing(
    tmp_path: Path, bucket: Bucket, shift: int
) -> None:
    for number in itertools.count(1):
        vault = fresh(tmp_path, bucket)
        bucket.fault(TRANSIENT[(number + shift) % len(TRANSIENT)], first=number)
        overwrite(vault)
        save(vault, "once", NEW)  # no second writer: "exists" means a lost reply
        reached = bucket.request_count() >= number
        bucket.fault()
        assert (found(vault, "old"), found(vault, "once")) == (NEW, NEW)
        assert len(bucket.objects("manifests/training")) == 3, "a retry stored an object twice"
        if not reached:
            break
    assert number > 3


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_late_request_undoes_no_acknowledged_change(
    tmp_path: Path, bucket: Bucket, method: str
) -> None:
    """A request that was given up takes effect after the same content was saved again."""
    for number in itertools.count(1):
        vault = fresh(tmp_path, bucket, retry_seconds=0.05)
        bucket.fault("late", first=number, method=method, count=ALWAYS)
        try:
            save(vault, "old", NEW, overwrite=True)
            vault.delete("training", RUN, "old")
            gc.collect(vault, 0)
        except StoreFailed:
            pass
        reached = bucket.request_count() >= number
        bucket.fault()
        save(vault, "old", OLD, step=3, overwrite=True)
        save(vault, "new", NEW, step=3)
        gc.collect(vault, 0)
        bucket.deliver_late()
        for each in (vault, open_again(tmp_path, bucket)):
            assert (found(each, "old"), found(each, "new")) == (OLD, NEW)
        if not reached:
            break
    assert number > 2


def test_damage_is_named_never_served_and_quarantined(tmp_path: Path, bucket: Bucket) -> None:
    damages: dict[str, Callable[[bytes, bytes], bytes | None]] = {
        "flipped": lambda own, _: own[:-1] + bytes([own[-1] ^ 1]),
        "cut": lambda own, _: own[:-1],
        "emptied": lambda _own, _: b"",
        "swapped": lambda _, others: others,
        "gone": lambda _own, _: None,
    }
    for name, damage in damages.items():
        vault = fresh(tmp_path, bucket)
        adapter = blob_key(vault.manifest("training", RUN, "old").files["adapter"].blake3)
        others = blob_key(vault.manifest("training", RUN, "other").files["adapter"].blake3)
        for key, other in (
            (adapter, others),
            (manifest_key("training", RUN, "old"), manifest_key("training", RUN, "other")),
        ):
            if name == "gone" and key != adapter:
                continue  # the same as a deletion
            path = bucket.only(key)
            damaged = damage(bucket.objects(key)[path], bucket.objects(other)[bucket.only(other)])
            bucket.remove(path) if damaged is None else bucket.put(path, damaged)
            with pytest.raises(CheckpointDamaged, match="old"):
                load(vault, vault.manifest("training", RUN, "old"))
            assert [each.key for each in verify(vault).damaged] == [key]
            note = quarantine_damaged(vault, key)
            assert note is not None
            assert verify(vault).ok
            if damaged is not None:
                assert bytes(vault.storage.read(f"quarantine/content/{key}")) == damaged
            save(vault, "old", OLD, overwrite=True)
            assert found(vault, "old") == OLD, "not repaired by a new save"


def test_unavailable_store_is_not_reported_as_damage(tmp_path: Path, bucket: Bucket) -> None:
    vault = fresh(tmp_path, bucket, retry_seconds=0.05)
    key = blob_key(vault.manifest("training", RUN, "old").files["adapter"].blake3)
    before = bucket.objects()
    bucket.fault("503", count=ALWAYS)
    for work in (
        lambda: quarantine_damaged(vault, key),
        lambda: verify(vault),
        lambda: gc.collect(vault, 0),
        lambda: vault.manifest("training", RUN, "old"),
    ):
        with pytest.raises(StoreFailed, match=bucket.url):
            work()
    bucket.fault()
    assert bucket.objects() == before


def test_errors_contain_no_credentials(tmp_path: Path, bucket: Bucket) -> None:
    vault = fresh(tmp_path, bucket, retry_seconds=0.05)
    bucket.fault("503", count=ALWAYS)
    with pytest.raises(StoreFailed) as failure:
        vault.put([b"x"])
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(failure.value)
    assert os.environ["AWS_ACCESS_KEY_ID"] not in str(failure.value)


WRITER = """
import sys
from pathlib import Path
from everstep.vault import Vault
from everstep.vault.storage.bucket import open_bucket
from everstep.vault.storage.objects import ObjectStorage
from tests.vault.test_crash import everything
url, root = sys.argv[1:]
everything(Vault(Path(root), storage=ObjectStorage(open_bucket(url), url)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("point", ["written", "synced", "named", "durable"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_killed_writer_leaves_whole_checkpoints_or_none(
    tmp_path: Path, bucket: Bucket, point: str, count: int
) -> None:
    fresh(tmp_path, bucket)
    killed = subprocess.run(
        [sys.executable, "-c", WRITER, bucket.url, str(tmp_path)],
        env={**os.environ, VARIABLE: f"vault.write.{point}=kill@{count}"},
        check=False,
        timeout=280,
    )
    assert killed.returncode == -9
    check(tmp_path, bucket, "old", [OLD, NEW])


def test_leftovers_of_a_killed_writer_are_removed(tmp_path: Path, bucket: Bucket) -> None:
    fresh(tmp_path, bucket)
    manifest = manifest_key("training", RUN, "old")
    newer = bucket.objects(manifest)[bucket.only(manifest)]
    bucket.put(f"{manifest}/{3:020d}", newer)
    bucket.put("tmp/half", b"half")
    vault = open_again(tmp_path, bucket, writer=False)
    assert found(vault, "old") == OLD
    assert len(bucket.objects(manifest)) == 2
    open_again(tmp_path, bucket)
    assert list(bucket.objects(manifest)) == [f"{manifest}/{3:020d}"]
    assert bucket.objects("tmp") == {}
    assert found(vault, "old") == OLD
