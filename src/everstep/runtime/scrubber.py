"""The scrubber: re-reads the vault's files, slowly and for ever, and quarantines what rotted.

Disks lose bits in silence. Who reads a file only when it is needed finds out when it is too late;
a file that is found damaged early can still be saved again or brought back from a backup.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import structlog
from blake3 import blake3

from everstep.vault import Note, Vault, VaultError
from everstep.vault.inspection import damage, mismatch, missing, put_away, unreadable
from everstep.vault.keys import BLOBS, MANIFESTS, MARKS, checkpoint_of

_log = structlog.get_logger("everstep.scrubber")
_AT_ONCE = 4 << 20


@dataclass
class Pass:
    """What one pass over the vault found.

    Attributes:
        files: how many files and manifests were read.
        size: bytes of them.
        quarantined: notes of what was moved away.
        unsettled: keys that were damaged, and were healed meanwhile or could not be moved away
            beside a save; the next pass looks again.
    """

    files: int = 0
    size: int = 0
    quarantined: list[Note] = field(default_factory=list)
    unsettled: list[str] = field(default_factory=list)


class Scrubber:
    """Reads everything in the vault once in an interval, off the event loop.

    Args:
        vault: the vault.
        bytes_per_second: how fast it reads at most.
        interval_seconds: from the start of one pass to that of the next; a pass that takes longer
            is followed by the next at once.
        on_quarantined: told of each file that was moved away, so that the index can follow.
        clock: seconds; a test gives its own.
        sleep: waits for so many seconds; likewise.
    """

    def __init__(
        self,
        vault: Vault,
        *,
        bytes_per_second: float,
        interval_seconds: float,
        on_quarantined: Callable[[Note], Awaitable[None]],
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
        """Scrub until cancelled. A pass that fails is logged, and tried again in its turn."""
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
        for prefix in (MANIFESTS, MARKS, BLOBS):
            for key in await asyncio.to_thread(self._keys, prefix):
                reason = await self._look(key, done)
                if reason is not None:
                    await self._settle(key, done)
                done.files += 1
        for key in await asyncio.to_thread(missing, self._vault):
            await self._settle(key, done)
        return done

    def _keys(self, prefix: str) -> list[str]:
        return list(self._vault.storage.keys(prefix))

    async def _look(self, key: str, done: Pass) -> str | None:
        """Read a file at the chosen rate; returns what is wrong with it."""
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

    async def _settle(self, key: str, done: Pass) -> None:
        """Have a damaged file moved away."""
        try:
            note = await asyncio.to_thread(put_away, self._vault, key)
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
    """Hash the next few megabytes; returns how many bytes that were."""
    size = 0
    for chunk in chunks:
        hasher.update(chunk)
        size += len(chunk)
        if size >= _AT_ONCE:
            break
    return size
