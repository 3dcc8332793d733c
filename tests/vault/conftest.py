"""Fixture: a vault on each kind of storage."""

from __future__ import annotations

from pathlib import Path

import pytest

from everstep.vault import Vault
from tests.buckets.bucket import Bucket


@pytest.fixture(params=["directory", "bucket"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path, bucket: Bucket) -> Vault:
    """Return a vault in a directory, then one in a bucket."""
    if request.param == "directory":
        return Vault(tmp_path)
    (tmp_path / "tmp").mkdir()
    return Vault(tmp_path, storage=bucket.storage())
