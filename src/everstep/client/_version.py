"""The client's version."""

from importlib.metadata import version

VERSION = version("everstep")
