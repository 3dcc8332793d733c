"""Whether a service can be used with the credentials that are configured."""

from __future__ import annotations

from everstep.client._credentials import credential_command, service_url, static_key
from everstep.client._errors import TinkerError

__all__ = ["get_tinker_token", "raise_if_tinker_not_accessible", "tinker_has_credentials"]


def get_tinker_token() -> str | None:
    """The configured API key, or None; ``TINKER_CREDENTIAL_CMD`` is not run."""
    try:
        return static_key()
    except TinkerError:
        return None


def tinker_has_credentials() -> bool:
    """Whether there is a key, or a command that would print one; it is not run."""
    return bool(credential_command() or get_tinker_token())


def raise_if_tinker_not_accessible() -> None:
    """Ask the configured service for its models, once, and wait for the answer.

    Raises:
        TinkerError: there is no credential (`TinkerError`), it is refused (`AuthenticationError`),
            the account can't pay (`BillingError`), or there is no answer (`APIConnectionError`).
    """
    from everstep.client._futures import submit
    from everstep.client.service_client import ServiceClient

    with ServiceClient(base_url=service_url(None)) as service:
        submit(service.holder.http.check()).result()
