"""Scrubber: re-reads the vault's files slowly and continuously, and quarantines damaged ones.

Disks lose bits silently. Damage that is found early can still be repaired: by another save, or from
a backup.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

from blake3 import blake3

from everstep.logs import get_logger
from everstep.vault import QuarantineRecord, Vault, VaultError
from everstep.vault.integrity import damage, mismatch, missing, quarantine_damaged, unreadable
from everstep.vault.storage.keys import BLOBS, MANIFESTS, METADATA, checkpoint_of

_log = get_logger("everstep.scrubber")
_READ_BYTES = 4 << 20


@dataclass
class Pass:
    """The result of one pass over the vault.

    Attributes:
        files: number of files and manifests read.
        size: bytes of them.
        quarantined: the records of the files that were moved away.
        unsettled: keys of damaged files that were healed during the pass, or could not be moved
            away beside a save. The next pass checks them again.
    """

    files: int = 0
    size: int = 0
    quarantined: list[QuarantineRecord] = field(default_factory=list)
    unsettled: list[str] = field(default_factory=list)


class Scrubber:
    """Reads everything in the vault once in an interval, off the event loop.

    Args:
        vault: the vault.
        bytes_per_second: the maximum read rate.
        interval_seconds: from the start of one pass to the start of the next. A pass that takes
            longer is followed by the next at once.
        on_quarantined: called with the record of each file that was moved away.
        clock: returns seconds. Replaced in tests.
        sleep: waits for some seconds. Replaced in tests.
    """

    def __init__(
        self,
        vault: Vault,
        *,
        bytes_per_second: float,
        interval_seconds: float,
        on_quarantined: Callable[[QuarantineRecord], Awaitable[None]],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        if bytes_per_second <= 0:
            raise ValueError(f"bytes_per_second has to be more than 0; got {bytes_per_second}")
        self._vault = vault
        self._rate = bytes_per_second
        self._interval = interval_seconds
        self._on_quarantined = on_quarantined
        self._clock = clock
        self._sleep = sleep

    async def run(self) -> None:
        """Scrub until cancelled. A failed pass is logged, and the next one follows in time."""
        while True:
            begun = self._clock()
            try:
                done = await self.scrub()
                _log.info("scrubbed", files=done.files, size=done.size)
            except (OSError, VaultError) as error:
                _log.error("the vault could not be scrubbed", reason=str(error))
            await self._sleep(max(0.0, self._interval - (self._clock() - begun)))

    async def scrub(self) -> Pass:
        """Read everything once."""
        done = Pass()
        for prefix in (MANIFESTS, METADATA, BLOBS):
            for key in await asyncio.to_thread(self._keys, prefix):
                reason = await self._read(key, done)
                if reason is not None:
                    await self._quarantine(key, done)
                done.files += 1
        for key in await asyncio.to_thread(missing, self._vault):
            await self._quarantine(key, done)
        return done

    def _keys(self, prefix: str) -> list[str]:
        return list(self._vault.storage.keys(prefix))

    async def _read(self, key: str, done: Pass) -> str | None:
        """Read a file at the set rate. Return its damage, or None."""
        if checkpoint_of(key) is not None:
            size = await asyncio.to_thread(self._vault.storage.size, key) or 0
            await self._pace(size, done)
            return await asyncio.to_thread(damage, self._vault, key)
        hasher = blake3()
        chunks = self._vault.storage.chunks(key, cold=True)
        try:
            while size := await asyncio.to_thread(_hash_some, chunks, hasher):
                await self._pace(size, done)
        except FileNotFoundError:
            return None  # collected since it was listed
        except OSError as error:
            return unreadable(error)
        return mismatch(key, hasher.hexdigest())

    async def _pace(self, size: int, done: Pass) -> None:
        done.size += size
        await self._sleep(size / self._rate)

    async def _quarantine(self, key: str, done: Pass) -> None:
        """Move a damaged file to quarantine."""
        try:
            note = await asyncio.to_thread(quarantine_damaged, self._vault, key)
        except (OSError, VaultError) as error:
            _log.error("a damaged file could not be moved away", file=key, reason=str(error))
            note = None
        if note is None:
            done.unsettled.append(key)
            return
        done.quarantined.append(note)
        _log.error("a damaged file is quarantined", file=key, reason=note.reason, runs=note.runs)
        await self._on_quarantined(note)


def _hash_some(chunks: Iterator[memoryview], hasher: blake3) -> int:
    """Hash the next few megabytes. Return how many bytes were hashed."""
    size = 0
    for chunk in chunks:
        hasher.update(chunk)
        size += len(chunk)
        if size >= _READ_BYTES:
            break
    return size
