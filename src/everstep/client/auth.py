"""Access checks: whether the configured credentials give access to the configured service."""

from __future__ import annotations

from everstep.client._transport.credentials import credential_command, service_url, static_key
from everstep.client._transport.errors import TinkerError

__all__ = ["get_tinker_token", "raise_if_tinker_not_accessible", "tinker_has_credentials"]


def get_tinker_token() -> str | None:
    """Return the configured API key, or None. Does not run ``TINKER_CREDENTIAL_CMD``."""
    try:
        return static_key()
    except TinkerError:
        return None


def tinker_has_credentials() -> bool:
    """Return whether a key or a credential command is configured. Does not run the command."""
    return bool(credential_command() or get_tinker_token())


def raise_if_tinker_not_accessible() -> None:
    """Request the configured service's models, once, and wait for the response.

    Raises:
        TinkerError: there is no credential (`TinkerError`), it is refused (`AuthenticationError`),
            the account can't pay (`BillingError`), or there was no response (`APIConnectionError`).
    """
    from everstep.client._transport.futures import submit
    from everstep.client.service_client import ServiceClient

    with ServiceClient(base_url=service_url(None)) as service:
        submit(service.holder.http.check()).result()
