"""Authorization: decides who may read a checkpoint.

A service has one owner. Every caller that can reach it acts for that owner, with any API key. Only
weights access tokens are checked. The hosted service accepts another account's API key as such a
token. Here that key is the owner's too. A token of this service begins with ``tml-weights-``, which
every release of the official SDK lets pass. It opens one checkpoint, may expire, and can be
revoked. The ledger keeps its digest only.
"""

from __future__ import annotations

import hashlib
import secrets
import uuid
from datetime import UTC, datetime

from everstep.ledger import Event, Ledger, WeightsToken
from everstep.runtime.errors import OperationFailed
from everstep.wire.paths import parse_path

OWNER = "local"
"""The principal that owns everything and acts in every request."""
TOKEN_PREFIX = "tml-weights-"


class Authorization:
    """Decides who may read a checkpoint.

    Args:
        ledger: holds the tokens, and which checkpoints are public.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def check(self, path: str, token: str | None) -> None:
        """Raise `OperationFailed` unless a caller may read a checkpoint.

        Args:
            path: the checkpoint's path. It is not checked whether the checkpoint exists.
            token: the weights access token that the caller sent, if any.

        Raises:
            WireError: the path is malformed.
        """
        path = str(parse_path(path))
        if token is None or not token.startswith(TOKEN_PREFIX):
            return  # the owner
        known = await self._ledger.checkpoint_metadata.find_token(_digest(token))
        if known is not None and known.path == path:
            return
        checkpoint = await self._ledger.checkpoint(path)
        if checkpoint is None or not checkpoint.public:
            raise OperationFailed(
                f"The weights access token does not open {path}: it is unknown or revoked, has "
                "expired, or belongs to another checkpoint. Ask the checkpoint's owner for a new "
                "one."
            )

    async def grant(self, path: str, expires_at: datetime | None) -> tuple[str, WeightsToken]:
        """Create a token that opens a checkpoint.

        Args:
            path: the checkpoint's path.
            expires_at: when it expires, or None for never.

        Returns:
            The token, which is not stored, and its row.
        """
        secret = TOKEN_PREFIX + secrets.token_urlsafe(32)
        now = datetime.now(UTC)
        token = WeightsToken(uuid.uuid4().hex, _digest(secret), path, now, expires_at)
        details = {"token_id": token.token_id}
        await self._ledger.checkpoint_metadata.add_token(
            token, event("token_create", path, **details)
        )
        return secret, token

    async def revoke(self, token_id: str) -> None:
        """Revoke a token. An unknown one is no error."""
        revoked = Event("checkpoint_token_revoke", OWNER, details={"token_id": token_id})
        await self._ledger.checkpoint_metadata.revoke_token(token_id, revoked)


def event(action: str, path: str, **details: object) -> Event:
    """Build the audit event of an action on a checkpoint."""
    return Event(f"checkpoint_{action}", OWNER, path, parse_path(path).run_id, details)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
