"""The version of this release. The package metadata is built from it."""

__version__ = "0.1.0"
