"""The types of the protocol under the names of the official SDK."""

from everstep.wire.base import parse

ModelID = str

__all__ = [name for name in dir() if name[0].isupper()] + ["parse"]
