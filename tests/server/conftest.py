"""Fixtures of an in-process service."""

from tests.runtime.local import home, pico

__all__ = ["home", "pico"]
