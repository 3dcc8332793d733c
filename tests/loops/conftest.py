"""Fixtures of a scripted service."""

from tests.client.fixtures import client, clock, fake, run

__all__ = ["client", "clock", "fake", "run"]
