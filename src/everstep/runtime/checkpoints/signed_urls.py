"""Signed URLs: work without headers for a limited time, and can't be forged."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from pathlib import Path

from everstep.durable_files import replace_file
from everstep.runtime.errors import Rejected

KEY = "links.key"
_BYTES = 32


class SignedUrls:
    """Signs URLs with a key that only this home has.

    Args:
        home: holds the key. It is created if needed, readable only by the service's user.
    """

    def __init__(self, home: Path) -> None:
        path = home / KEY
        if not path.exists() or path.stat().st_size != _BYTES:
            replace_file(path, secrets.token_bytes(_BYTES), mode=0o600)
        self._key = path.read_bytes()

    def sign(self, subject: str, seconds: float) -> dict[str, str]:
        """Return the query parameters that sign a URL.

        Args:
            subject: the resource. A signature is valid for no other.
            seconds: how long it is valid.
        """
        expires = str(int(time.time() + seconds))
        return {"expires": expires, "signature": self._signature(subject, expires)}

    def check(self, subject: str, expires: str, signature: str) -> None:
        """Raise `Rejected` (403) unless a signature is valid and has not expired."""
        if not hmac.compare_digest(self._signature(subject, expires).encode(), signature.encode()):
            raise Rejected(403, "This link was not made by this service.")
        if int(expires) < time.time():
            raise Rejected(403, "This link has expired; ask for a new one.")

    def _signature(self, subject: str, expires: str) -> str:
        return hmac.new(self._key, f"{expires}\n{subject}".encode(), hashlib.sha256).hexdigest()
