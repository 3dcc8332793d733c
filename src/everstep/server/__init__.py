"""HTTP only: routes that validate and call the runtime."""

from everstep.server.app import create_app
from everstep.server.serve import PortTaken, run

__all__ = ["PortTaken", "create_app", "run"]
