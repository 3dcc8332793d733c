"""Wire protocol: messages, paths, errors and codecs of client and server, without I/O or torch."""

from everstep.wire.base import parse

__all__ = ["parse"]
