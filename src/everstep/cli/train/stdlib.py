"""The standard library's docstrings as training data that every machine has."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from everstep.cli.train.examples import Completion

STANDARD_LIBRARY = "docstrings of Python's standard library"
MIN_DOCSTRING = 40
_MODULES = (
    "argparse",
    "bisect",
    "calendar",
    "cmd",
    "codecs",
    "configparser",
    "contextlib",
    "csv",
    "dataclasses",
    "datetime",
    "difflib",
    "fractions",
    "functools",
    "gettext",
    "heapq",
    "inspect",
    "ipaddress",
    "mailbox",
    "os",
    "pathlib",
    "pprint",
    "random",
    "shutil",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "turtle",
    "typing",
    "uuid",
    "zipfile",
)


def docstrings() -> Iterator[Completion]:
    """Yield the standard library's function signatures, each with its docstring to learn."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = ((root / f"{module}.py", root / module / "__init__.py") for module in _MODULES)
    for path in (path for both in paths for path in both if path.exists()):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            text = ast.get_docstring(node)
            if text and len(text) >= MIN_DOCSTRING:
                prompt = f"def {node.name}({ast.unparse(node.args)}):\n"
                yield Completion(f"{path}:{node.lineno}", prompt, f'    """{text}"""\n')
