"""Outage log: warns when a service stops responding and when it responds again."""

from __future__ import annotations

import logging

_log = logging.getLogger("everstep.client")
_WARN_AFTER_SECONDS = 5.0


class OutageLog:
    """Logs a warning once a service has not responded for a while, and once it responds again.

    Args:
        base_url: of the service.
    """

    def __init__(self, base_url: str) -> None:
        self._base_url = base_url
        self._since: float | None = None
        self._warned = False

    def record_failure(self, now: float, error: Exception, silent_for: float = 0.0) -> None:
        """Record a request without a response.

        Args:
            now: time at which the request was given up, on `monotonic`'s clock.
            error: the failure.
            silent_for: seconds that the request waited in vain, or 0 if the connection broke.
        """
        if self._since is None:
            self._since = now - silent_for
        silence = now - self._since
        if silence > _WARN_AFTER_SECONDS and not self._warned:
            self._warned = True
            why = str(error) or type(error).__name__
            _log.warning("no response from %s for %.0f s: %s", self._base_url, silence, why)

    def record_response(self, now: float) -> None:
        """Record a response and the time at which it arrived."""
        if self._warned and self._since is not None:
            silence = now - self._since
            _log.warning("%s responds again after %.0f s", self._base_url, silence)
        self._since, self._warned = None, False
