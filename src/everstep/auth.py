"""Access checks: whether the configured credentials give access to the configured service."""

from everstep.client.auth import (
    get_tinker_token,
    raise_if_tinker_not_accessible,
    tinker_has_credentials,
)

__all__ = ["get_tinker_token", "raise_if_tinker_not_accessible", "tinker_has_credentials"]
