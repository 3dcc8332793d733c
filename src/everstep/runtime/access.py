"""Who may read which checkpoint: decided here, and nowhere else.

A service has one owner: whoever can reach it acts for that owner, whatever API key they send. What
is decided today is what a weights access token opens. The hosted service takes another account's
API key as one; here that key is the owner's as well. Tokens of our own, which begin with
``tml-weights-`` so that every release of the official SDK lets them pass, open one checkpoint, may
expire, and can be revoked. The ledger keeps their digests only.
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
"""Who owns everything, and does everything."""
TOKEN_PREFIX = "tml-weights-"


class Access:
    """Decides who may read.

    Args:
        ledger: has the tokens, and what is public.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def check(self, path: str, token: str | None) -> None:
        """Raise `OperationFailed` unless a caller may read a checkpoint.

        Args:
            path: of the checkpoint; one that leads nowhere is for others to refuse.
            token: the weights access token that the caller sent, if any.

        Raises:
            WireError: the path is malformed.
        """
        path = str(parse_path(path))
        if token is None or not token.startswith(TOKEN_PREFIX):
            return  # the owner's
        known = await self._ledger.publication.token(_digest(token))
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
        """Make a token that opens a checkpoint; returns the token, which is not kept, and its row.

        Args:
            path: of the checkpoint.
            expires_at: until when; None: until it is revoked.
        """
        secret = TOKEN_PREFIX + secrets.token_urlsafe(32)
        now = datetime.now(UTC)
        token = WeightsToken(uuid.uuid4().hex, _digest(secret), path, now, expires_at)
        details = {"token_id": token.token_id}
        await self._ledger.publication.add_token(token, event("token_create", path, **details))
        return secret, token

    async def revoke(self, token_id: str) -> None:
        """Have a token open nothing any more; one that is not there is no error."""
        revoked = Event("checkpoint_token_revoke", OWNER, details={"token_id": token_id})
        await self._ledger.publication.revoke_token(token_id, revoked)


def event(action: str, path: str, **details: object) -> Event:
    """What is done to a checkpoint, for the audit log."""
    return Event(f"checkpoint_{action}", OWNER, path, parse_path(path).run_id, details)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
