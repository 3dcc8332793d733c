"""CUDA's part of the numeric environment: device, driver, libraries and flags."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import torch


def describe() -> dict[str, Any]:
    """Return CUDA's part of the environment. On a machine without it, only that it is a CPU."""
    if not torch.cuda.is_available():
        return {"device": "cpu"}
    properties = torch.cuda.get_device_properties()
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return {
        "device": torch.cuda.get_device_name(),
        # parts of one device have fewer multiprocessors, by which libraries choose kernels
        "device_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cuda_driver": _driver(),
        "cublas": _cublas(),
        "cudnn": cudnn.version(),  # type: ignore[no-untyped-call]
        "cudnn_flags": f"benchmark={cudnn.benchmark} deterministic={cudnn.deterministic}",
        "tf32": f"matmul={matmul.allow_tf32} cudnn={cudnn.allow_tf32}",
        "reductions": (
            f"bf16={matmul.allow_bf16_reduced_precision_reduction} "
            f"fp16={matmul.allow_fp16_reduced_precision_reduction} "
            f"fp16_accumulation={matmul.allow_fp16_accumulation}"
        ),
        "blas_library": str(torch.backends.cuda.preferred_blas_library()),
        "attention": " ".join(
            name for name in ("flash", "mem_efficient", "math", "cudnn") if _attends(name)
        ),
    }


def _attends(name: str) -> bool:
    return bool(getattr(torch.backends.cuda, f"{name}_sdp_enabled")())


def _driver() -> str | None:
    """Return the version of the kernel's driver."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else None


def _cublas() -> str | None:
    """Return the version of the cuBLAS that this process has loaded."""
    torch.cuda.current_blas_handle()  # type: ignore[no-untyped-call]  # loads it
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    found = re.search(r"\s(/\S*/libcublas\.so\S*)$", maps, re.MULTILINE)
    if found is None:
        return None
    library, parts = ctypes.CDLL(found[1]), []
    for index in range(3):  # major, minor, patch
        part = ctypes.c_int()
        if library.cublasGetProperty(index, ctypes.byref(part)) != 0:
            return None
        parts.append(str(part.value))
    return ".".join(parts)
