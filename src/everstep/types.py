"""The types of the protocol under the names of the official SDK."""

from everstep.wire.types import *  # noqa: F403  this is the module's whole purpose
