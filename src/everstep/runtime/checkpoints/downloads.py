"""Downloads: signed URLs of a checkpoint's files, and their verified content.

A URL is created for a caller who may read the checkpoint. Then it works without headers for anyone
who has it, until it expires. It is bound to certain bytes: if the checkpoint is deleted or replaced
by another one of the same name, the URL is not found.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from everstep.ledger import Checkpoint
from everstep.logs import get_logger
from everstep.runtime.authorization import event
from everstep.runtime.checkpoints.catalog import id_of, requested_checkpoint
from everstep.runtime.checkpoints.signed_urls import SignedUrls
from everstep.runtime.context import RuntimeContext
from everstep.runtime.errors import OperationFailed, Rejected
from everstep.vault import CheckpointDamaged, Manifest, VaultError
from everstep.vault.download_content import Content, archive_content, file_content
from everstep.vault.integrity import quarantining
from everstep.vault.verified_reader import VerifiedReader
from everstep.wire.paths import CheckpointKind

_log = get_logger("everstep.downloads")
LINK_SECONDS = 3600.0


@dataclass(frozen=True)
class Address:
    """A signed URL.

    Attributes:
        file: the file, None for the whole checkpoint as a tar.
        query: the query parameters.
    """

    file: str | None
    query: dict[str, str]

    @property
    def expires(self) -> datetime:
        """When it expires."""
        return datetime.fromtimestamp(int(self.query["expires"]), UTC)


@dataclass(frozen=True)
class Download:
    """The verified content of a URL.

    Attributes:
        content: the bytes.
        sha256: their SHA-256.
    """

    content: Content
    sha256: bytes


class Downloads:
    """Creates signed URLs, and reads their content.

    Args:
        context: the service's ledger, which records reads in the audit log, its vault, catalog and
            authorization.
        links: signs the URLs.
    """

    def __init__(self, context: RuntimeContext, links: SignedUrls) -> None:
        self._ledger = context.ledger
        self._vault = context.vault
        self._catalog = context.catalog
        self._authorization = context.authorization
        self._links = links
        self._reader = VerifiedReader(self._vault)
        self._verifications: dict[str, asyncio.Task[bytes]] = {}

    async def file_addresses(
        self, run_id: str, checkpoint_id: str, token: str | None
    ) -> list[Address]:
        """Create a URL for each file of an external checkpoint.

        Args:
            run_id: the checkpoint's run.
            checkpoint_id: ``<segment>/<name>``.
            token: the weights access token of the request, if any.

        Raises:
            Rejected: the path is malformed (400), or it is no external checkpoint that the caller
                may read (404).
        """
        checkpoint = requested_checkpoint(run_id, checkpoint_id)
        path = checkpoint.path
        if checkpoint.kind != CheckpointKind.EXTERNAL:
            raise Rejected(
                404, f"{path} is not an external checkpoint. Make one with save_weights_external."
            )
        manifest = await self._manifest(await self._readable(path, token))
        await self._ledger.audit.record(event("read", path, purpose="download"))
        return [self._address(path, file_content(manifest, name)) for name in manifest.files]

    async def archive_address(self, run_id: str, checkpoint_id: str, token: str | None) -> Address:
        """Create a URL of a checkpoint as a tar. Raises `Rejected` (400, 404)."""
        path = requested_checkpoint(run_id, checkpoint_id).path
        manifest = await self._manifest(await self._readable(path, token))
        await self._ledger.audit.record(event("read", path, purpose="download"))
        return self._address(path, archive_content(manifest))

    async def open(
        self, run_id: str, checkpoint_id: str, file: str | None, query: dict[str, str]
    ) -> Download:
        """Verify the content of a URL.

        Args:
            run_id: the checkpoint's run.
            checkpoint_id: ``<segment>/<name>``.
            file: the file, None for the whole checkpoint as a tar.
            query: ``tag``, ``expires`` and ``signature``.

        Raises:
            Rejected: the signature is not valid or has expired (403), or the content no longer
                exists or is damaged (404).
        """
        path, tag = requested_checkpoint(run_id, checkpoint_id).path, query["tag"]
        self._links.check(_subject(path, file, tag), query["expires"], query["signature"])
        manifest = await self._manifest(await self._readable(path, None))
        try:
            content = archive_content(manifest) if file is None else file_content(manifest, file)
        except VaultError as error:
            raise Rejected(404, str(error)) from error
        if content.tag != tag:
            raise Rejected(404, f"Checkpoint {path} was replaced; ask for a new address.")
        return Download(content, await self._verified(content))

    def read(self, download: Download, start: int, stop: int) -> Iterator[bytes]:
        """Read the bytes from ``start`` up to ``stop``. Raises before a byte that is damaged."""
        try:
            with quarantining(self._vault):
                yield from self._reader.read(download.content, start, stop)
        except VaultError as error:
            _log.error("a download was interrupted", reason=str(error))
            raise

    def _address(self, path: str, content: Content) -> Address:
        file = content.parts[0] if len(content.parts) == 1 else None
        name = file if isinstance(file, str) else None
        signed = self._links.sign(_subject(path, name, content.tag), LINK_SECONDS)
        return Address(name, {"tag": content.tag, **signed})

    async def _readable(self, path: str, token: str | None) -> Checkpoint:
        try:
            await self._authorization.check(path, token)
            return await self._catalog.find(path)
        except OperationFailed as failure:
            raise Rejected(404, failure.message) from failure

    async def _manifest(self, row: Checkpoint) -> Manifest:
        try:
            return await asyncio.to_thread(self._vault.manifest, *id_of(row))
        except VaultError as error:
            raise Rejected(404, str(error)) from error

    async def _verified(self, content: Content) -> bytes:
        """Verify a content once for all callers. Continues if they disconnect."""
        task = self._verifications.get(content.tag)
        if task is None:
            task = asyncio.create_task(asyncio.to_thread(self._verify, content))
            self._verifications[content.tag] = task
            task.add_done_callback(lambda _: self._verifications.pop(content.tag))
        try:
            return await asyncio.shield(task)
        except CheckpointDamaged as error:
            await self._catalog.follow_quarantine()
            raise Rejected(404, str(error)) from error
        except (VaultError, OSError) as error:
            raise Rejected(503, f"{error}") from error

    def _verify(self, content: Content) -> bytes:
        with quarantining(self._vault):
            return self._reader.sha256(content)


def _subject(path: str, file: str | None, tag: str) -> str:
    """Return the subject that a URL's signature covers."""
    return f"download {path} {file or ''} {tag}"
