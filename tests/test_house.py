"""The house: no import circles, folders and modules of a size that a reader can hold."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
SOURCE = TESTS.parent / "src" / "everstep"
MAX_MODULES = 20
MAX_LINES = 400

# Folders of tests that go through several rooms.
ACROSS_ROOMS = {"buckets", "data", "faults", "interop", "promises", "zoo"}


def modules() -> dict[str, Path]:
    """All modules by name, without generated ones."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    assert "everstep.client" in found
    return {name: path for name, path in found.items() if not name.endswith("_pb2")}


def imports(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """The module-level imports: module, and the name taken from it; not those for types only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((each.name, None) for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((node.module or "", each.name) for each in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from imports(node)


def graph() -> dict[str, set[str]]:
    """Which module imports which, when it is imported."""
    known = modules()
    found: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for module, taken in imports(ast.parse(path.read_text())):
            target = f"{module}.{taken}" if f"{module}.{taken}" in known else module
            if target in known and target != name:
                found[name].add(target)
    assert sum(map(len, found.values())) > 500
    return found


def test_imports_form_no_circle() -> None:
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"c"}, "c": {"b"}}).prepare()
    TopologicalSorter(graph()).prepare()


def test_no_folder_holds_too_many_modules() -> None:
    counts = Counter(
        path.parent.relative_to(SOURCE).as_posix()
        for path in modules().values()
        if path.name != "__init__.py"
    )
    assert counts["vault"] > 0
    assert [name for name, count in counts.items() if count > MAX_MODULES] == []


def test_no_module_is_too_long() -> None:
    lines = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert lines["everstep.vault.vault"] > 100
    assert [name for name, count in lines.items() if count > MAX_LINES] == []


def test_every_room_has_tests_under_its_name() -> None:
    rooms = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    folders = {path.parent.name for path in TESTS.glob("*/__init__.py")}
    assert {"client", "runtime", "vault"} <= rooms & folders
    assert folders - rooms <= ACROSS_ROOMS
    assert rooms - folders == {"testing"}, "its tests are those of faults/disk"
