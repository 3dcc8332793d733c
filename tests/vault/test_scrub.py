"""Scrubber: reads all files at a bounded rate, quarantines damaged ones, survives failures."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from everstep.runtime.maintenance.scrub import Scrubber
from everstep.vault import QuarantineRecord, Vault
from everstep.vault.storage.keys import blob_key, manifest_key
from tests.vault.checkpoints import RUN, save
from tests.vault.homes import rot

MIB = 1 << 20
FILES = {"a": b"content of a" * 9, "b": b"b" * 9 * MIB}


class Time:
    """A clock that a sleep advances."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


def scrubber(
    vault: Vault, time: Time, records: list[QuarantineRecord], interval: float = 1e6
) -> Scrubber:
    async def on_quarantined(record: QuarantineRecord) -> None:
        records.append(record)

    return Scrubber(
        vault,
        bytes_per_second=MIB,
        interval_seconds=interval,
        on_quarantined=on_quarantined,
        clock=lambda: time.now,
        sleep=time.sleep,
    )


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    vault = Vault(tmp_path / "vault")
    save(vault, "x", FILES)
    save(vault, "y", {"c": b"healthy"})
    return vault


def test_scrubber_reads_everything_at_its_rate(vault: Vault) -> None:
    time, records = Time(), list[QuarantineRecord]()
    done = asyncio.run(scrubber(vault, time, records).scrub())
    manifests = sum(vault.storage.size(key) or 0 for key in vault.storage.keys("manifests/"))
    assert done.files == 5
    assert done.size == sum(map(len, FILES.values())) + len(b"healthy") + manifests
    assert time.now == pytest.approx(done.size / MIB)
    assert max(time.slept) <= 5  # seconds: it sleeps in small steps
    assert records == []


@pytest.mark.parametrize("damage", ["blob", "large blob", "manifest", "missing blob"])
def test_damaged_file_is_quarantined_and_reported(
    vault: Vault, tmp_path: Path, damage: str
) -> None:
    manifest = vault.manifest("training", RUN, "x")
    key = {
        "manifest": manifest_key("training", RUN, "x"),
        "large blob": blob_key(manifest.files["b"].blake3),
    }.get(damage, blob_key(manifest.files["a"].blake3))
    path = tmp_path / "vault" / key
    path.unlink() if damage == "missing blob" else rot(path)
    time, records = Time(), list[QuarantineRecord]()
    done = asyncio.run(scrubber(vault, time, records).scrub())
    assert [record.key for record in records] == [key]
    assert done.quarantined == records
    assert [m.name for m in vault.manifests()] == ["y"]
    assert asyncio.run(scrubber(vault, time, records).scrub()).quarantined == []


def test_damaged_file_is_kept_for_the_next_pass_during_a_write(
    vault: Vault, tmp_path: Path
) -> None:
    key = blob_key(vault.manifest("training", RUN, "x").files["a"].blake3)
    rot(tmp_path / "vault" / key)
    time, records = Time(), list[QuarantineRecord]()
    with Vault(tmp_path / "vault", writer=False).writing():
        done = asyncio.run(scrubber(vault, time, records).scrub())
    assert (done.unsettled, records) == ([key], [])
    assert asyncio.run(scrubber(vault, time, records).scrub()).quarantined == records != []


def test_scrubber_continues_after_failures(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    time, records = Time(), list[QuarantineRecord]()
    one = scrubber(vault, time, records, interval=1000)
    begun: list[float] = []

    async def work() -> None:
        enough = asyncio.Event()
        scrub = one.scrub

        async def counted() -> object:
            begun.append(time.now)
            if len(begun) == 4:
                enough.set()
            if len(begun) == 2:
                raise OSError(5, "Input/output error")
            return await scrub()

        monkeypatch.setattr(one, "scrub", counted)
        task = asyncio.create_task(one.run())
        await asyncio.wait_for(enough.wait(), 60)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(work())
    assert begun == [0, 1000, 2000, 3000]


def test_rate_of_zero_is_rejected(vault: Vault) -> None:
    async def never(_: QuarantineRecord) -> None: ...

    with pytest.raises(ValueError, match="bytes_per_second"):
        Scrubber(vault, bytes_per_second=0, interval_seconds=1, on_quarantined=never)
