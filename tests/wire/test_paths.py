"""Paths and names: strict, both ways."""

from __future__ import annotations

import pytest

from everstep.vault import CheckpointId
from everstep.vault.storage.keys import SEGMENTS
from everstep.wire.errors import InvalidName, InvalidPath
from everstep.wire.paths import CheckpointKind, TinkerPath, parse_path, validate_name

RUN = "d07c70ac-ee41-5bd0-bc58-817060f69db4:train:0"


@pytest.mark.parametrize("kind", list(CheckpointKind))
def test_path_round_trips(kind: CheckpointKind) -> None:
    text = f"tinker://{RUN}/{kind.segment}/step-1.5+x=y_z"
    path = parse_path(text)
    assert (path.run_id, path.kind, path.name) == (RUN, kind, "step-1.5+x=y_z")
    assert str(path) == text


@pytest.mark.parametrize("kind", list(CheckpointKind))
def test_checkpoint_id_has_the_path_of_the_wire(kind: CheckpointKind) -> None:
    assert CheckpointId(str(kind), RUN, "step-1").path == str(TinkerPath(RUN, kind, "step-1"))
    assert CheckpointId(str(kind), RUN, "step-1").has_path


def test_vault_has_the_path_segments_of_the_wire() -> None:
    assert {str(kind): kind.segment for kind in CheckpointKind} == SEGMENTS


@pytest.mark.parametrize("kind", ["snapshot", "of-a-later-release"])
def test_snapshot_has_no_path(kind: str) -> None:
    snapshot = CheckpointId(kind, RUN, "00000000000000000001")
    assert not snapshot.has_path
    with pytest.raises(ValueError, match="has no path"):
        _ = snapshot.path


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tinker://",
        f"tinker://{RUN}",
        f"tinker://{RUN}/weights",
        f"tinker://{RUN}/weights/",
        f"tinker://{RUN}/weights/a/b",
        f"tinker://{RUN}/checkpoints/a",
        f"tinker:///{RUN}/weights/a",
        "tinker:///weights/a",
        "tinker://../weights/a",
        f"tinker://{RUN}/weights/..",
        f"tinker://{RUN}/weights/.a",
        f"tinker://{RUN}/weights/%2e%2e",
        f"tinker://{RUN}/weights/a?b",
        f"tinker://{RUN}/weights/a\n",
        f"tinker://{RUN}/weights/ä",
        f"http://{RUN}/weights/a",
        f"TINKER://{RUN}/weights/a",
    ],
)
def test_other_forms_of_paths_are_rejected(text: str) -> None:
    with pytest.raises(InvalidPath):
        parse_path(text)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "a:b", "x" * 129, "\x00", "a\\b"])
def test_invalid_name_is_rejected_with_the_rule(name: str) -> None:
    with pytest.raises(InvalidName, match="one path segment of letters"):
        validate_name(name)
