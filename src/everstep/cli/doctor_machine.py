"""The doctor's look at the machine: Python, what is installed, torch."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from everstep.cli.finding import Finding, ok, problem, warning
from everstep.cli.output import counted

_OLDEST = (3, 11)
_SERVER = {
    "alembic": "alembic",
    "blake3": "blake3",
    "fastapi": "fastapi",
    "matplotlib": "matplotlib",
    "safetensors": "safetensors",
    "sqlalchemy": "sqlalchemy",
    "structlog": "structlog",
    "torch": "torch",
    "transformers": "transformers",
    "uvicorn": "uvicorn",
}
"""Of the extra ``server``: what is imported, by the package that brings it."""


def findings() -> Iterator[Finding]:
    """Look at the machine."""
    yield _python()
    yield _everstep()
    yield _extras()
    yield _torch()


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < _OLDEST:
        return problem("Python", found, "Install Python 3.11 or newer.")
    if sys.platform == "win32":
        return problem("Python", found, "The service needs Linux or macOS; on Windows, use WSL.")
    return ok("Python", found)


def _everstep() -> Finding:
    try:
        found = version("everstep")
        requires("everstep")
    except PackageNotFoundError:
        return problem(
            "everstep", "runs from sources that are not installed", "pip install everstep"
        )
    return ok("everstep", found)


def _extras() -> Finding:
    missing = [package for package, module in _SERVER.items() if find_spec(module) is None]
    if missing:
        return warning(
            "extras",
            f"without {', '.join(missing)}",
            "The client works; a service, training data and plots need "
            "pip install 'everstep[server]'.",
        )
    telemetry = "with" if find_spec("opentelemetry") else "without"
    return ok("extras", f"all that a service needs; {telemetry} OpenTelemetry")


def _torch() -> Finding:
    if find_spec("torch") is None:
        return warning("torch", "not installed", "pip install 'everstep[server]' for a service.")
    try:
        import torch
    except (ImportError, OSError) as error:
        return problem("torch", f"can't be imported: {error}", "Install another build of torch.")
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    found = f"{torch.__version__}, {counted(threads, 'thread')} on {counted(cores, 'core')}"
    if torch.cuda.is_available():
        return ok("torch", f"{found}, CUDA {torch.version.cuda}: {torch.cuda.get_device_name()}")
    if threads > cores:
        return warning(
            "torch",
            f"{found}, no CUDA device",
            "More threads than cores are slow: set OMP_NUM_THREADS, or serve --set threads=N.",
        )
    return ok("torch", f"{found}, no CUDA device")
