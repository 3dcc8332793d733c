"""Checks of the machine: Python, installed packages, torch."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from everstep.cli.common.extras import INSTALL_SERVER, missing_packages
from everstep.cli.common.output import counted
from everstep.cli.doctor.finding import Finding, ok, problem, warning

_MIN_VERSION = (3, 11)


def check_machine() -> Iterator[Finding]:
    """Check the machine."""
    yield _python()
    yield _everstep()
    yield _extras()
    yield _torch()


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < _MIN_VERSION:
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
    missing = missing_packages()
    if missing:
        return warning(
            "extras",
            f"without {', '.join(missing)}",
            f"The client works; a service, training data and plots need {INSTALL_SERVER}.",
        )
    telemetry = "with" if find_spec("opentelemetry") else "without"
    return ok("extras", f"all packages of the service; {telemetry} OpenTelemetry")


def _torch() -> Finding:
    if find_spec("torch") is None:
        return warning("torch", "not installed", f"A service needs {INSTALL_SERVER}.")
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
