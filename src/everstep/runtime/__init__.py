"""The runtime: brings ledger, vault and engine together.

server ──▶ Runtime ──▶ accept ──▶ ledger            accepted durably, then answered
              │
              └─▶ run_actor ──▶ execution ──▶ worker_process ═══ socket ═══▶ worker
                 (order, gaps,   (a handler     (supervision)                 │ turns
                  recovery)       a kind)                                     │ commands
                                                                              ▼ engine, vault

Names are loaded when they are first used: the worker needs neither the ledger nor the runtime, and
every start after a crash waits for its imports.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everstep.runtime.errors import OperationFailed, Rejected, RuntimeFault, UnknownFuture
    from everstep.runtime.runtime import Runtime
    from everstep.runtime.settings import Settings

_MODULES = {
    "OperationFailed": "errors",
    "Rejected": "errors",
    "Runtime": "runtime",
    "RuntimeFault": "errors",
    "Settings": "settings",
    "UnknownFuture": "errors",
}

__all__ = [
    "OperationFailed",
    "Rejected",
    "Runtime",
    "RuntimeFault",
    "Settings",
    "UnknownFuture",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'everstep.runtime' has no attribute {name!r}")
    return getattr(import_module(f"everstep.runtime.{_MODULES[name]}"), name)
