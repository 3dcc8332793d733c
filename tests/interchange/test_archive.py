"""Archives of adapters: what is left out of them is reported."""

from __future__ import annotations

from pathlib import Path

from everstep.interchange.archive import (
    ARCHIVE_FILES,
    left_out_note,
    other_files,
    pack,
    unpack,
)


def test_files_that_are_left_out_are_named(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    others = ["README.md", "optimizer.pt"]
    for name in (*ARCHIVE_FILES, "checkpoint_complete", *others):
        (source / name).write_text(name)
    archive = tmp_path / "adapter.tar"
    archive.write_bytes(b"".join(pack({path.name: path for path in source.iterdir()})))

    assert unpack(archive, target) == others
    assert other_files(source) == others
    assert {path.name for path in target.iterdir()} == {*ARCHIVE_FILES}
    assert left_out_note(others) == [
        "Not imported, as a checkpoint has no such files: README.md, optimizer.pt."
    ]
    assert left_out_note([]) == []
    assert left_out_note([f"{n}.txt" for n in range(12)])[0].endswith("9.txt and 2 more.")
