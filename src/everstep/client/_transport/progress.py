"""Progress of what takes long: one line, where the user sees it."""

from __future__ import annotations

import logging
import sys
import threading

_log = logging.getLogger("everstep.client")
_SILENT_SECONDS = 1.0


class Progress:
    """Shows a line if the block takes longer than a second.

    It goes to a terminal's standard error, or to a notebook's output. Elsewhere it is logged.

    Args:
        text: what is going on.
    """

    def __init__(self, text: str) -> None:
        self._timer = threading.Timer(_SILENT_SECONDS, show, (f"everstep: {text} …",))
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def show(text: str) -> None:
    """Show a line."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
    elif hasattr(sys, "ps1") and sys.stdout is not None:
        print(text, flush=True)  # a notebook shows standard error in red
    else:
        _log.info("%s", text)
