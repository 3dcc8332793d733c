"""Encryption: encrypts external checkpoints with age (https://age-encryption.org).

A file is encrypted while it is written, piece by piece. The result is never the same twice: every
file gets a key of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from everstep.worker.protocol.errors import OperationFailed

SUFFIX = ".age"
MAX_RECIPIENTS = 10
_PIECE = 1 << 20


def check_recipients(recipients: Sequence[str] | None) -> None:
    """Raise `OperationFailed` unless files can be encrypted for every recipient."""
    if recipients is None:
        return
    if not 1 <= len(recipients) <= MAX_RECIPIENTS:
        raise OperationFailed(
            f"age_encryption_recipients has {len(recipients)} entries; give 1 to "
            f"{MAX_RECIPIENTS}, or leave it out for files that are not encrypted."
        )
    for index, text in enumerate(recipients):
        _recipient(text, f"age_encryption_recipients[{index}]")


def encrypted(chunks: Iterable[Any], recipients: Sequence[str]) -> Iterator[bytes]:
    """Encrypt a file's content while it is read.

    Args:
        chunks: the content.
        recipients: age recipients, as `check_recipients` takes them.
    """
    age = _library()
    readers = [_recipient(text, "a recipient") for text in recipients]
    outlet, inlet = os.pipe()
    failure: list[BaseException] = []

    def encrypt() -> None:
        with open(inlet, "wb", buffering=0) as sink:  # noqa: PTH123  a descriptor
            try:
                age.encrypt_io(_Reader(chunks), sink, readers)
            except BaseException as error:  # noqa: BLE001  raised where the content is read
                failure.append(error)

    thread = threading.Thread(target=encrypt, name="encryption", daemon=True)
    thread.start()
    try:
        with open(outlet, "rb", buffering=0) as source:  # noqa: PTH123  a descriptor
            while piece := source.read(_PIECE):
                yield piece
    finally:  # where the reader gave up, the closed pipe ends the thread
        thread.join()
    if failure:
        raise failure[0]


class _Reader:
    """A file over chunks that is read once."""

    def __init__(self, chunks: Iterable[Any]) -> None:
        self._chunks = iter(chunks)
        self._rest = memoryview(b"")

    def read(self, size: int = -1) -> bytes:
        """Return at most so many bytes, and none at the end."""
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return b""
            view = memoryview(chunk)
            self._rest = view.cast("B") if view.nbytes else memoryview(b"")
        size = len(self._rest) if size < 0 else size
        piece, self._rest = self._rest[:size], self._rest[size:]
        return bytes(piece)


def _library() -> Any:
    try:
        import pyrage
    except ImportError as error:
        raise OperationFailed(
            "This service can't encrypt: install its extra, everstep[server], with pyrage. Or "
            "leave age_encryption_recipients out."
        ) from error
    return pyrage


def _recipient(text: str, what: str) -> Any:
    """The recipient that a text names. An error never repeats the text: it may be a secret key."""
    age = _library()
    kind = age.x25519 if text.startswith("age1") else age.ssh
    try:
        return kind.Recipient.from_str(text)
    except age.RecipientError as error:
        raise OperationFailed(
            f"{what} is not an age recipient: give a public key, 'age1…' as age-keygen prints it "
            "or 'ssh-ed25519 …' or 'ssh-rsa …' as it stands in a .pub file."
        ) from error
