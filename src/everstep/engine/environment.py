"""Numeric environment: everything outside of a run that decides its results' last bits.

It is recorded with a run's results. Where it is the same, a replay must give the same bits. Where
it differs, results are compared to a tolerance. So whatever moves a bit belongs here, and nothing
else: versions, the processor, how libraries choose kernels, threads, flags, and the engine's own
arithmetic. The kernel digest sees choices that have no name.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from everstep.engine import cuda_environment, numerics, training_pass
from everstep.engine.kernel_digest import digest
from everstep.engine.kernels import threads
from everstep.engine.models import frozen_product, model
from everstep.engine.sampling import prefix_cache

ARITHMETIC = 6
"""Revision of the engine's arithmetic. Raised by every change that moves a bit of a result."""
VARIABLES = re.compile(
    r"(ONEDNN|DNNL|MKL|KMP|GOMP|OMP|CUBLAS|CUBLASLT|CUDNN|NPY|OPENBLAS)_\w+"
    r"|ATEN_CPU_CAPABILITY|DISABLE_ADDMM_CUDA_LT|GLIBC_TUNABLES|LD_PRELOAD|NVIDIA_TF32_OVERRIDE"
    r"|TORCH_(ALLOW_TF32_CUBLAS_OVERRIDE|BLAS_PREFER_CUBLASLT|CUDNN_V8_API_\w+)"
)
"""Environment variables that choose among kernels, by their whole names."""
_HARMLESS = frozenset({"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_DISPLAY_ENV"})
_HARMLESS_ENDS = ("_VERBOSE", "_NUM_THREADS", "_LOGINFO_DBG", "_LOGDEST_DBG", "_LOGLEVEL_DBG")
"""Variables of these that decide what is logged, and threads, which are recorded as they are."""
_CPU_FIELDS = {
    "vendor_id": "vendor",
    "cpu family": "family",
    "model": "model",
    "model name": "name",
    "CPU implementer": "implementer",
    "CPU part": "part",
}
_CPU_FLAGS = re.compile(r"(avx|amx|fma|sse|ssse|f16c|asimd|sve|sme|bf16|i8mm|fphp|neon)\w*")


def environment() -> dict[str, Any]:
    """Return the numeric environment of this process, a number or a text by name.

    Variables have a dollar sign before their names. A value that is not known is None.
    """
    return {
        **_versions(),
        **_processor(),
        **_torch_state(),
        **_engine(),
        **{f"${name}": value for name, value in sorted(_variables())},
        **cuda_environment.describe(),
        "kernels": digest(),
    }


def _versions() -> dict[str, Any]:
    build = torch.__config__.show()
    mkl = re.search(r"Math Kernel Library Version (\S+)", build)
    onednn = re.search(r"MKL-DNN (v\S+)", build)
    return {
        "torch": torch.__version__,
        "transformers": _installed("transformers"),
        "numpy": _installed("numpy"),
        # sum() of floats compensates its rounding from 3.12 on
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "libc": " ".join(platform.libc_ver()).strip(),
        "mkl": mkl[1] if mkl else None,
        "onednn": onednn[1] if onednn else None,
    }


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> dict[str, Any]:
    return {
        "cpu": _cpu_name(),
        "cpu_flags": " ".join(_cpu_flags()),
        "cpu_caches": " ".join(_cpu_caches()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _cpu_info() -> dict[str, str]:
    """The first processor's fields in Linux' list, or nothing elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _cpu_name() -> str:
    info = _cpu_info()
    named = [f"{short} {info[name]}" for name, short in _CPU_FIELDS.items() if info.get(name)]
    return ", ".join(named) or f"{platform.machine()} {platform.processor()}".strip()


def _cpu_flags() -> list[str]:
    info = _cpu_info()
    flags = (info.get("flags") or info.get("Features") or "").split()
    return sorted(flag for flag in flags if _CPU_FLAGS.fullmatch(flag))


def _cpu_caches() -> Iterator[str]:
    """Sizes of the first processor's caches, by which libraries cut products into blocks."""
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = (
                (cache / name).read_text().strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        yield f"L{level}-{kind}:{size}"


def _torch_state() -> dict[str, Any]:
    mkldnn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return {
        "threads": torch.get_num_threads(),
        "mkldnn": mkldnn and torch._C._get_mkldnn_enabled(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def _engine() -> dict[str, Any]:
    """The engine's revision, and the sizes by which it cuts passes into products."""
    return {
        "arithmetic": ARITHMETIC,
        "micro_batch_tokens": numerics.TOKENS_PER_MICRO_BATCH,
        "micro_batch_padding": training_pass.MAX_PADDING,
        "one_thread_work": threads.MIN_WORK,
        "head_cells": model.HEAD_CELLS,
        "prefill_block": prefix_cache.BLOCK,
        "row_multiple": frozen_product.ROW_MULTIPLE,
    }


def _variables() -> Iterator[tuple[str, str]]:
    for name, value in os.environ.items():
        harmless = name in _HARMLESS or name.endswith(_HARMLESS_ENDS)
        if VARIABLES.fullmatch(name) and not harmless:
            yield name, value
