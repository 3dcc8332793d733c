"""The runtime: brings ledger, vault and engine together.

server ──▶ Runtime ──▶ accept ──▶ ledger            accepted durably, then answered
              │
              └─▶ run_actor ──▶ execution ──▶ worker_process ═══ socket ═══▶ worker
                 (order, gaps,   (a handler     (supervision)                 │ turns
                  recovery)       a kind)                                     │ commands
                                                                              ▼ engine, vault
"""

from everstep.runtime.errors import OperationFailed, Rejected, RuntimeFault, UnknownFuture
from everstep.runtime.runtime import Runtime
from everstep.runtime.settings import Settings

__all__ = [
    "OperationFailed",
    "Rejected",
    "Runtime",
    "RuntimeFault",
    "Settings",
    "UnknownFuture",
]
