"""Encryption of external checkpoints with age (https://age-encryption.org), for who will read them.

A file is encrypted as it is written, a piece at a time. What comes out is never the same twice:
every file gets a key of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from everstep.runtime.errors import OperationFailed

SUFFIX = ".age"
MOST = 10
_PIECE = 1 << 20


def check_recipients(recipients: Sequence[str] | None) -> None:
    """Raise `OperationFailed` unless something can be encrypted for each; None: for nobody."""
    if recipients is None:
        return
    if not 1 <= len(recipients) <= MOST:
        raise OperationFailed(
            f"age_encryption_recipients has {len(recipients)} entries; give 1 to {MOST}, or leave "
            "it out for files that are not encrypted."
        )
    for index, text in enumerate(recipients):
        _recipient(text, f"age_encryption_recipients[{index}]")


def encrypted(chunks: Iterable[Any], recipients: Sequence[str]) -> Iterator[bytes]:
    """A file's content, encrypted while it is read.

    Args:
        chunks: the content.
        recipients: for whom; as `check_recipients` takes them.
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
    """Chunks as a file that is read once."""

    def __init__(self, chunks: Iterable[Any]) -> None:
        self._chunks = iter(chunks)
        self._rest = memoryview(b"")

    def read(self, size: int = -1) -> bytes:
        """At most so many bytes; none at the end."""
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
    """The recipient that a text names; the text is not repeated: it may be a secret key."""
    age = _library()
    kind = age.x25519 if text.startswith("age1") else age.ssh
    try:
        return kind.Recipient.from_str(text)
    except age.RecipientError as error:
        raise OperationFailed(
            f"{what} is not an age recipient: give a public key, 'age1…' as age-keygen prints it "
            "or 'ssh-ed25519 …' or 'ssh-rsa …' as it stands in a .pub file."
        ) from error
