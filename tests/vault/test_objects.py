"""A vault in a bucket: lost replies, late requests, a store that goes away, killed writers."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from everstep.failpoints import VARIABLE
from everstep.vault import CheckpointDamaged, StoreFailed, Vault
from everstep.vault.inspection import put_away
from everstep.vault.keys import blob_key, manifest_key
from everstep.vault.verify import verify
from tests.buckets.bucket import Bucket
from tests.vault.checkpoints import RUN, load, save
from tests.vault.test_crash import CASES, NEW, OLD, Outcome, found, overwrite

FOR_EVER = 1 << 30
TRANSIENT = ["lost reply", "reset", "503", "503 done"]


def opened(root: Path, bucket: Bucket, *, retry_seconds: float = 20, writer: bool = True) -> Vault:
    """What a new process has."""
    (root / "tmp").mkdir(exist_ok=True)
    return Vault(root, storage=bucket.storage(retry_seconds=retry_seconds), writer=writer)


def fresh(tmp_path: Path, bucket: Bucket, *, retry_seconds: float = 20) -> Vault:
    """A vault with what every case begins with, and nothing else."""
    bucket.renew()
    vault = opened(tmp_path, bucket, retry_seconds=retry_seconds)
    save(vault, "old", OLD)
    save(vault, "other", {"adapter": b"of another"})
    vault.put([b"of no checkpoint"])
    return vault


def check(tmp_path: Path, bucket: Bucket, name: str, allowed: list[Outcome]) -> None:
    """A new process finds no torn checkpoint, collects none that it found, and goes on."""
    vault = opened(tmp_path, bucket)
    outcome = found(vault, name)
    assert outcome in allowed
    vault.collect(0)
    for manifest in vault.manifests():
        load(vault, manifest)
    assert found(vault, name) == outcome
    assert found(vault, "other") == {"adapter": b"of another"}
    save(vault, name, NEW, overwrite=True)
    assert found(vault, name) == NEW


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "name", "allowed"), CASES[:-1], ids=lambda c: getattr(c, "__name__", "")
)
def test_whole_or_absent_wherever_the_store_goes_away(
    tmp_path: Path,
    bucket: Bucket,
    work: Callable[[Vault], None],
    name: str,
    allowed: list[Outcome],
) -> None:
    for after in itertools.count(1):
        vault = fresh(tmp_path, bucket, retry_seconds=0.05)
        fault = ("lost reply", "reset")[after % 2]
        bucket.fault(fault, first=after, count=FOR_EVER)
        may_be = allowed
        try:
            work(vault)
            may_be = allowed[-1:]  # it was acknowledged
        except StoreFailed:
            pass
        reached = bucket.seen() >= after
        bucket.fault()
        check(tmp_path, bucket, name, may_be)
        if not reached:
            break
    assert after > 3


@pytest.mark.slow
@pytest.mark.parametrize("shift", range(len(TRANSIENT) if os.environ.get("EVERSTEP_SOAK") else 1))
def test_what_befalls_one_request_changes_nothing(
    tmp_path: Path, bucket: Bucket, shift: int
) -> None:
    for number in itertools.count(1):
        vault = fresh(tmp_path, bucket)
        bucket.fault(TRANSIENT[(number + shift) % len(TRANSIENT)], first=number)
        overwrite(vault)
        save(vault, "once", NEW)  # no second writer: whoever is told that it exists lost a reply
        reached = bucket.seen() >= number
        bucket.fault()
        assert (found(vault, "old"), found(vault, "once")) == (NEW, NEW)
        assert len(bucket.objects("manifests/training")) == 3, "each is there once"
        if not reached:
            break


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_a_request_that_arrives_late_undoes_nothing(
    tmp_path: Path, bucket: Bucket, method: str
) -> None:
    """Put and collected, put again and acknowledged; then what was given up takes effect."""
    for number in itertools.count(1):
        vault = fresh(tmp_path, bucket, retry_seconds=0.05)
        bucket.fault("late", first=number, method=method, count=FOR_EVER)
        try:
            save(vault, "old", NEW, overwrite=True)
            vault.delete("training", RUN, "old")
            vault.collect(0)
        except StoreFailed:
            pass
        reached = bucket.seen() >= number
        bucket.fault()
        save(vault, "old", OLD, step=3, overwrite=True)
        save(vault, "new", NEW, step=3)
        vault.collect(0)
        bucket.arrive()
        for each in (vault, opened(tmp_path, bucket)):
            assert (found(each, "old"), found(each, "new")) == (OLD, NEW)
        if not reached:
            break


def test_damage_is_named_never_served_and_put_away(tmp_path: Path, bucket: Bucket) -> None:
    harms: dict[str, Callable[[bytes, bytes], bytes | None]] = {
        "flipped": lambda own, _: own[:-1] + bytes([own[-1] ^ 1]),
        "cut": lambda own, _: own[:-1],
        "emptied": lambda _own, _: b"",
        "swapped": lambda _, others: others,
        "gone": lambda _own, _: None,
    }
    for name, harm in harms.items():
        vault = fresh(tmp_path, bucket)
        adapter = blob_key(vault.manifest("training", RUN, "old").files["adapter"].blake3)
        others = blob_key(vault.manifest("training", RUN, "other").files["adapter"].blake3)
        for key, other in (
            (adapter, others),
            (manifest_key("training", RUN, "old"), manifest_key("training", RUN, "other")),
        ):
            if name == "gone" and key != adapter:
                continue  # that is a deletion
            path = bucket.only(key)
            harmed = harm(bucket.objects(key)[path], bucket.objects(other)[bucket.only(other)])
            bucket.remove(path) if harmed is None else bucket.put(path, harmed)
            with pytest.raises(CheckpointDamaged, match="old"):
                load(vault, vault.manifest("training", RUN, "old"))
            assert [each.key for each in verify(vault).damaged] == [key]
            note = put_away(vault, key)
            assert note is not None
            assert verify(vault).ok
            if harmed is not None:
                assert bytes(vault.storage.read(f"quarantine/content/{key}")) == harmed
            save(vault, "old", OLD, overwrite=True)
            assert found(vault, "old") == OLD, "saved again, it is healed"


def test_a_store_that_does_not_answer_is_no_damage(tmp_path: Path, bucket: Bucket) -> None:
    vault = fresh(tmp_path, bucket, retry_seconds=0.05)
    key = blob_key(vault.manifest("training", RUN, "old").files["adapter"].blake3)
    before = bucket.objects()
    bucket.fault("503", count=FOR_EVER)
    for work in (
        lambda: put_away(vault, key),
        lambda: verify(vault),
        lambda: vault.collect(0),
        lambda: vault.manifest("training", RUN, "old"),
    ):
        with pytest.raises(StoreFailed, match=bucket.url):
            work()
    bucket.fault()
    assert bucket.objects() == before


def test_no_secret_is_told(tmp_path: Path, bucket: Bucket) -> None:
    vault = fresh(tmp_path, bucket, retry_seconds=0.05)
    bucket.fault("503", count=FOR_EVER)
    with pytest.raises(StoreFailed) as failure:
        vault.put([b"x"])
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(failure.value)
    assert os.environ["AWS_ACCESS_KEY_ID"] not in str(failure.value)


WRITER = """
import sys
from pathlib import Path
from everstep.vault import Vault
from everstep.vault.bucket import open_bucket
from everstep.vault.objects import ObjectStorage
from tests.vault.test_crash import everything
url, root = sys.argv[1:]
everything(Vault(Path(root), storage=ObjectStorage(open_bucket(url), url)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("point", ["written", "synced", "named", "durable"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_writer_that_is_killed_leaves_whole_or_absent(
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


def test_what_a_killed_writer_left_is_cleaned(tmp_path: Path, bucket: Bucket) -> None:
    fresh(tmp_path, bucket)
    manifest = manifest_key("training", RUN, "old")
    newer = bucket.objects(manifest)[bucket.only(manifest)]
    bucket.put(f"{manifest}/{3:020d}", newer)
    bucket.put("tmp/half", b"half")
    vault = opened(tmp_path, bucket, writer=False)
    assert found(vault, "old") == OLD
    assert len(bucket.objects(manifest)) == 2
    opened(tmp_path, bucket)
    assert list(bucket.objects(manifest)) == [f"{manifest}/{3:020d}"]
    assert bucket.objects("tmp") == {}
    assert found(vault, "old") == OLD
