"""Fixtures: helper processes with releases of the official SDK."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import Service
from tests.interop.sdks import Releases


@pytest.fixture(scope="session")
def releases(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Releases]:
    """The helpers of all releases; they take their tokenizers from the shared service."""
    made = Releases(service.url, tmp_path_factory.mktemp("hub"))
    yield made
    made.close()
