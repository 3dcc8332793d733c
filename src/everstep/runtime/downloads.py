"""Downloads: addresses of a checkpoint's files, and what lies there.

An address is made for who may read the checkpoint, and then works for everyone who has it, without
headers, until it expires. It is for certain bytes: where the checkpoint is deleted, or replaced
by another one under its name, it leads nowhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from everstep.ledger import Checkpoint, Ledger
from everstep.runtime.access import Access, event
from everstep.runtime.checkpoints import Checkpoints, requested_path
from everstep.runtime.errors import OperationFailed, Rejected
from everstep.runtime.links import Links
from everstep.vault import CheckpointDamaged, Manifest, Vault, VaultError
from everstep.vault.content import Content, archive_content, file_content
from everstep.vault.inspection import quarantining
from everstep.vault.verified import VerifiedReader
from everstep.wire.paths import CheckpointKind, TinkerPath

_log = structlog.get_logger("everstep.downloads")
LINK_SECONDS = 3600.0


@dataclass(frozen=True)
class Address:
    """Where something can be fetched.

    Attributes:
        file: of the checkpoint; None: all of it, as a tar.
        query: the parameters that open it.
    """

    file: str | None
    query: dict[str, str]

    @property
    def expires(self) -> datetime:
        """Until when."""
        return datetime.fromtimestamp(int(self.query["expires"]), UTC)


@dataclass(frozen=True)
class Download:
    """What an address leads to, verified.

    Attributes:
        content: the bytes.
        sha256: of all of them.
    """

    content: Content
    sha256: bytes


class Downloads:
    """Makes addresses, and reads what lies there.

    Args:
        ledger: notes who read what.
        vault: has the files.
        checkpoints: finds what is asked for.
        access: says who may read it.
        links: signs the addresses.
    """

    def __init__(
        self, ledger: Ledger, vault: Vault, checkpoints: Checkpoints, access: Access, links: Links
    ) -> None:
        self._ledger = ledger
        self._vault = vault
        self._checkpoints = checkpoints
        self._access = access
        self._links = links
        self._reader = VerifiedReader(vault)
        self._surveys: dict[str, asyncio.Task[bytes]] = {}

    async def file_addresses(
        self, run_id: str, checkpoint_id: str, token: str | None
    ) -> list[Address]:
        """An address for each file of an external checkpoint.

        Args:
            run_id: the checkpoint's run.
            checkpoint_id: ``<segment>/<name>``.
            token: the weights access token that was sent with it, if any.

        Raises:
            Rejected: the path is malformed (400); nothing external lies there that the caller may
                read (404).
        """
        path = requested_path(run_id, checkpoint_id)
        if path.kind is not CheckpointKind.EXTERNAL:
            raise Rejected(
                404, f"{path} is not an external checkpoint. Make one with save_weights_external."
            )
        manifest = await self._manifest(await self._readable(path, token))
        await self._ledger.audit.note(event("read", str(path), purpose="download"))
        return [self._address(path, file_content(manifest, name)) for name in manifest.files]

    async def archive_address(self, run_id: str, checkpoint_id: str, token: str | None) -> Address:
        """An address of a checkpoint as a tar; raises `Rejected` (400, 404)."""
        path = requested_path(run_id, checkpoint_id)
        manifest = await self._manifest(await self._readable(path, token))
        await self._ledger.audit.note(event("read", str(path), purpose="download"))
        return self._address(path, archive_content(manifest))

    async def open(
        self, run_id: str, checkpoint_id: str, file: str | None, query: dict[str, str]
    ) -> Download:
        """What an address leads to, read through and verified.

        Args:
            run_id: the checkpoint's run.
            checkpoint_id: ``<segment>/<name>``.
            file: of the checkpoint; None: all of it, as a tar.
            query: ``tag``, ``expires`` and ``signature``.

        Raises:
            Rejected: the address is not ours, or has expired (403); what it is for is gone, or
                damaged (404).
        """
        path, tag = requested_path(run_id, checkpoint_id), query["tag"]
        self._links.check(_subject(path, file, tag), query["expires"], query["signature"])
        manifest = await self._manifest(await self._readable(path, None))
        try:
            content = archive_content(manifest) if file is None else file_content(manifest, file)
        except VaultError as error:
            raise Rejected(404, str(error)) from error
        if content.tag != tag:
            raise Rejected(404, f"Checkpoint {path} was replaced; ask for a new address.")
        return Download(content, await self._survey(content))

    def read(self, download: Download, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from ``start`` up to ``stop``; ends early where they can't be trusted."""
        try:
            with quarantining(self._vault):
                yield from self._reader.read(download.content, start, stop)
        except VaultError as error:
            _log.error("a download was broken off", reason=str(error))
            raise

    def _address(self, path: TinkerPath, content: Content) -> Address:
        file = content.parts[0] if len(content.parts) == 1 else None
        name = file if isinstance(file, str) else None
        signed = self._links.sign(_subject(path, name, content.tag), LINK_SECONDS)
        return Address(name, {"tag": content.tag, **signed})

    async def _readable(self, path: TinkerPath, token: str | None) -> Checkpoint:
        try:
            await self._access.check(str(path), token)
            return await self._checkpoints.find(str(path))
        except OperationFailed as failure:
            raise Rejected(404, failure.message) from failure

    async def _manifest(self, row: Checkpoint) -> Manifest:
        try:
            return await asyncio.to_thread(self._vault.manifest, row.kind, row.run_id, row.name)
        except VaultError as error:
            raise Rejected(404, str(error)) from error

    async def _survey(self, content: Content) -> bytes:
        """Read a content through once, however many ask for it; goes on when they go away."""
        task = self._surveys.get(content.tag)
        if task is None:
            task = asyncio.create_task(asyncio.to_thread(self._verify, content))
            self._surveys[content.tag] = task
            task.add_done_callback(lambda _: self._surveys.pop(content.tag))
        try:
            return await asyncio.shield(task)
        except CheckpointDamaged as error:
            await self._checkpoints.follow_quarantine()
            raise Rejected(404, str(error)) from error
        except (VaultError, OSError) as error:
            raise Rejected(503, f"{error}") from error

    def _verify(self, content: Content) -> bytes:
        with quarantining(self._vault):
            return self._reader.sha256(content)


def _subject(path: TinkerPath, file: str | None, tag: str) -> str:
    """What an address is signed for."""
    return f"download {path} {file or ''} {tag}"
