"""Paths and names: strict, both ways."""

from __future__ import annotations

import pytest

from everstep.wire.errors import InvalidName, InvalidPath
from everstep.wire.paths import CheckpointKind, parse_path, validate_name

RUN = "d07c70ac-ee41-5bd0-bc58-817060f69db4:train:0"


@pytest.mark.parametrize("kind", list(CheckpointKind))
def test_a_path_is_what_it_was_made_of(kind: CheckpointKind) -> None:
    text = f"tinker://{RUN}/{kind.segment}/step-1.5+x=y_z"
    path = parse_path(text)
    assert (path.run_id, path.kind, path.name) == (RUN, kind, "step-1.5+x=y_z")
    assert str(path) == text


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
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InvalidPath):
        parse_path(text)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "a:b", "x" * 129, "\x00", "a\\b"])
def test_a_name_that_breaks_the_rule_is_refused_saying_it(name: str) -> None:
    with pytest.raises(InvalidName, match="one path segment of letters"):
        validate_name(name)
