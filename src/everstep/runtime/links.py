"""Links: addresses that work without headers, for a while, and that nobody can make up."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from pathlib import Path

from everstep.runtime.errors import Rejected

KEY = "links.key"
_BYTES = 32


class Links:
    """Signs what a link is for, with a key that only this home has.

    Args:
        home: has the key; it is made when it isn't there, and readable by the service's user alone.
    """

    def __init__(self, home: Path) -> None:
        path = home / KEY
        if not path.exists() or path.stat().st_size != _BYTES:
            _write(path, secrets.token_bytes(_BYTES))
        self._key = path.read_bytes()

    def sign(self, what: str, seconds: float) -> dict[str, str]:
        """The query parameters of a link.

        Args:
            what: it is for; the parameters of one open no other.
            seconds: how long it works.
        """
        expires = str(int(time.time() + seconds))
        return {"expires": expires, "signature": self._signature(what, expires)}

    def check(self, what: str, expires: str, signature: str) -> None:
        """Raise `Rejected` (403) unless the parameters of a link are ours, and still work."""
        if not hmac.compare_digest(self._signature(what, expires).encode(), signature.encode()):
            raise Rejected(403, "This link was not made by this service.")
        if int(expires) < time.time():
            raise Rejected(403, "This link has expired; ask for a new one.")

    def _signature(self, what: str, expires: str) -> str:
        return hmac.new(self._key, f"{expires}\n{what}".encode(), hashlib.sha256).hexdigest()


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(handle, content)
        os.fsync(handle)
    finally:
        os.close(handle)
    temporary.replace(path)
