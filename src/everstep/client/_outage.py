"""Telling that a service does not answer: who waits for it should know what for."""

from __future__ import annotations

import logging

_log = logging.getLogger("everstep.client")
_PATIENCE_SECONDS = 5.0


class Outage:
    """Whether a service answers; a warning once it hasn't for a while, and once it does again.

    Args:
        base_url: of the service.
    """

    def __init__(self, base_url: str) -> None:
        self._base_url = base_url
        self._since: float | None = None
        self._told = False

    def goes_on(self, now: float, error: Exception, silent_for: float = 0.0) -> None:
        """Take note of a request without an answer.

        Args:
            now: when it was given up, on `monotonic`'s clock.
            error: what happened to it.
            silent_for: seconds that it was waited for in vain; 0 where the connection broke.
        """
        if self._since is None:
            self._since = now - silent_for
        silence = now - self._since
        if silence > _PATIENCE_SECONDS and not self._told:
            self._told = True
            why = str(error) or type(error).__name__
            _log.warning("no answer from %s for %.0f s: %s", self._base_url, silence, why)

    def ends(self, now: float) -> None:
        """Take note of an answer, and when it came."""
        if self._told and self._since is not None:
            silence = now - self._since
            _log.warning("%s answers again, after %.0f s", self._base_url, silence)
        self._since, self._told = None, False
