"""The protocol, shared by client and server: types, paths, errors, codecs. No I/O, no torch."""

from everstep.wire.base import parse

__all__ = ["parse"]
