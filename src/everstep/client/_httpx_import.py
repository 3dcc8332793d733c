"""Imports httpx without its command line.

httpx imports its command line where click, rich and pygments are installed, as they are beside a
service, and these take a third of its import. Without them it does without, so here it finds none.
"""

import sys

_COMMAND_LINE = "httpx._main"

if "httpx" not in sys.modules:
    sys.modules[_COMMAND_LINE] = None  # type: ignore[assignment]  # its import fails
    try:
        import httpx  # noqa: F401
    finally:
        del sys.modules[_COMMAND_LINE]
