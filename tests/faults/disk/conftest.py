"""Fixture: a nursery that starts processes in milliseconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from everstep.testing.nursery import Nursery


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery
