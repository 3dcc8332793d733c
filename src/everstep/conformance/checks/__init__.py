"""The checks, one module for each kind of promise. Importing a module registers its checks."""

from __future__ import annotations

from importlib import import_module

MODULES = (
    "resume",
    "loads",
    "kinds",
    "saves",
    "lifetimes",
    "order",
    "failures",
    "names",
    "samplers",
    "tenants",
)
"""In the order in which their checks run."""


def load() -> None:
    """Register every check."""
    for module in MODULES:
        import_module(f"{__name__}.{module}")
