"""The types of the protocol under the names of the official SDK.

A name is loaded when it is first used: a client needs a few of them. The stub beside this file
lists them.
"""

from typing import Any

import lazy_loader

_load, __dir__, __all__ = lazy_loader.attach_stub("everstep.wire", __file__)


def __getattr__(name: str) -> Any:
    """Load a name, and keep it for the next use."""
    value = globals()[name] = _load(name)
    return value
