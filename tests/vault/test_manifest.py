"""Manifests: what a release writes is what earlier ones read, where they can."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from everstep.vault import Manifest
from everstep.vault.manifest import FORMAT_VERSION

MANIFEST = Manifest(
    kind="snapshot",
    run_id="run",
    name="1",
    created_at=datetime.now(UTC),
    base_model="m",
    base_fingerprint="f",
    lora={},
    optimizer={},
    step=0,
    position=1,
    files={},
)


@pytest.mark.parametrize("zero_moments", [False, True])
@pytest.mark.parametrize("diverged", [False, True])
def test_manifest_is_written_in_the_earliest_layout_that_can_hold_it(
    zero_moments: bool, diverged: bool
) -> None:
    manifest = MANIFEST.model_copy(update={"zero_moments": zero_moments, "diverged": diverged})
    written = json.loads(manifest.encode())
    assert written["format_version"] == (FORMAT_VERSION if zero_moments else 1)
    assert ("zero_moments" in written, "diverged" in written) == (zero_moments, diverged)
    read = Manifest.decode(manifest.encode(), "x")
    assert (read.zero_moments, read.diverged) == (zero_moments, diverged)
    assert read.encode() == manifest.encode()
