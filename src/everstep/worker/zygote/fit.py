"""Fit: whether workers forked from a zygote are as those that a service would spawn.

A forked worker inherits from its zygote everything that imports have read (threads of
OpenMP and MKL, preloaded libraries, the module path) and the kernel's attributes of a process
(control group, namespaces, limits). A zygote that differs in any of it is not used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

READ_LATE = (
    "EVERSTEP_",
    "TINKER_",
    "AWS_",
    "PYTEST_",
    "COV_",
    "OTEL_",
    "CUDA_VISIBLE_DEVICES",
    "NO_PROXY",
    "no_proxy",
)
"""Prefixes of variables that nothing reads before a worker runs: they may differ."""
_SHELL = frozenset({"_", "PWD", "OLDPWD", "SHLVL", "TERM", "COLUMNS", "LINES", "TMPDIR"})
_STATUS = ("Uid", "Gid", "Groups", "CapEff", "NoNewPrivs", "Seccomp", "Cpus_allowed")


def worker_environment() -> dict[str, str]:
    """The environment that a worker of this process is started with."""
    return {
        # Threads that spin at a barrier on a shared core made a pass 20 times slower. To spin for
        # some microseconds makes the steps of a small model a third faster through the service.
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "500",
        # glibc would return a pass's memory to the system and fault it in again for the next one,
        # which cost a fifth of a step. Larger blocks, as of a large adapter, are still returned.
        "MALLOC_MMAP_THRESHOLD_": str(128 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
        # A worker computes with torch; NumPy's own threads would keep a zygote from forking.
        "OPENBLAS_NUM_THREADS": "1",
        **os.environ,
    }


def differences(pid: int) -> list[str]:
    """Name the differences between a zygote and a worker that this process would spawn.

    Args:
        pid: the zygote's process id.

    Returns:
        Names of variables and of kernel attributes, or an empty list if it may be forked.
    """
    try:
        ours, theirs = dict(_attributes("self")), dict(_attributes(str(pid)))
        content = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError as error:
        return [str(error)]
    pairs = (os.fsdecode(each).partition("=") for each in content.split(b"\0") if each)
    theirs.update(_read_early({name: value for name, _, value in pairs}))
    ours.update(_read_early(worker_environment()))
    names = sorted({*ours, *theirs})
    return [name for name in names if ours.get(name) != theirs.get(name)]


def _read_early(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        f"${name}": value
        for name, value in environment.items()
        if name not in _SHELL and not name.startswith(READ_LATE)
    }


def _attributes(process: str) -> Iterator[tuple[str, str]]:
    """The kernel's attributes of a process that its children inherit."""
    root = Path("/proc") / process
    for name in ("cgroup", "limits", "oom_score_adj"):
        yield name, (root / name).read_text()
    for name in ("exe", "root"):
        yield name, str((root / name).readlink())
    for namespace in sorted((root / "ns").iterdir()):
        if not namespace.name.endswith("_for_children"):
            yield f"ns/{namespace.name}", str(namespace.readlink())
    for line in (root / "status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in _STATUS:
            yield name, value.strip()
