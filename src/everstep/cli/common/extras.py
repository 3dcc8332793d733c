"""The optional dependencies of the ``server`` extra."""

from __future__ import annotations

from importlib.util import find_spec

INSTALL_SERVER = 'pip install "everstep[server]"'
SERVER_PACKAGES = (
    "alembic",
    "blake3",
    "cachetools",
    "fastapi",
    "jinja2",
    "matplotlib",
    "pydantic-settings",
    "pyrage",
    "rich",
    "safetensors",
    "sqlalchemy",
    "structlog",
    "tokenizers",
    "torch",
    "transformers",
    "typer",
    "uvicorn",
)
"""Packages of the extra, by the names that pip installs."""
OPTIONAL_PACKAGES = ("httptools", "uvloop")
"""Packages of the extra that make the service faster where they install. It runs without them."""
_MODULES = {name.replace("-", "_"): name for name in SERVER_PACKAGES}
"""Packages by the names under which they are imported."""


def is_server_package(module: str | None) -> bool:
    """Return whether a module is a package of the extra, or lies in one."""
    return module is not None and module.partition(".")[0] in _MODULES


def missing_packages() -> list[str]:
    """List the packages of the extra that are not installed."""
    return [name for module, name in _MODULES.items() if find_spec(module) is None]
