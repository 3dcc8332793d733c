"""The numeric environment: it changes with whatever moves a bit, and with nothing else."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from everstep.engine import cuda_environment, environment, numerics, training_pass
from everstep.engine.kernel_digest import digest
from everstep.engine.kernels import threads
from everstep.engine.models import frozen_product, model
from everstep.engine.sampling import prefix_cache

Patch = pytest.MonkeyPatch
NAMED = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "CUBLAS_WORKSPACE_CONFIG": ":16:8",
    "DNNL_MAX_CPU_ISA": "AVX2",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2",
    "LD_PRELOAD": "/usr/lib/libmkl.so",
    "MKL_CBWR": "COMPATIBLE",
    "MKL_DYNAMIC": "FALSE",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "NPY_DISABLE_CPU_FEATURES": "AVX2",
    "NVIDIA_TF32_OVERRIDE": "0",
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
}


@pytest.mark.parametrize("name", NAMED)
def test_variable_that_chooses_kernels_is_part_of_it(name: str, monkeypatch: Patch) -> None:
    monkeypatch.delenv(name, raising=False)
    before = environment.environment()
    monkeypatch.setenv(name, NAMED[name])
    after = environment.environment()
    assert after == {**before, f"${name}": NAMED[name]}


@pytest.mark.parametrize(
    "name", ["HOME", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_VERBOSE", "ONEDNN_VERBOSE"]
)
def test_other_variable_is_not_part_of_it(name: str, monkeypatch: Patch) -> None:
    before = environment.environment()
    monkeypatch.setenv(name, "1")
    assert environment.environment() == before


@pytest.mark.parametrize(
    ("name", "owner", "attribute", "value"),
    [
        ("arithmetic", environment, "ARITHMETIC", 99),
        ("micro_batch_tokens", numerics, "TOKENS_PER_MICRO_BATCH", 99),
        ("micro_batch_padding", training_pass, "MAX_PADDING", 99),
        ("one_thread_work", threads, "MIN_WORK", 99),
        ("head_cells", model, "HEAD_CELLS", 99),
        ("prefill_block", prefix_cache, "BLOCK", 99),
        ("row_multiple", frozen_product, "ROW_MULTIPLE", 99),
        ("torch", torch, "__version__", "9.9"),
        ("transformers", environment, "_installed", lambda name: f"{name} 9.9"),
        ("python", sys, "version_info", SimpleNamespace(major=9, minor=9)),
        ("libc", platform, "libc_ver", lambda: ("glibc", "9.9")),
        ("cpu", environment, "_cpu_info", lambda: {"model name": "Other", "flags": "avx9"}),
        ("cpu_flags", environment, "_cpu_info", lambda: {"model name": "Other", "flags": "avx9"}),
        ("cpu_caches", environment, "_cpu_caches", lambda: iter(["L2-Unified:9K"])),
        ("threads", torch, "get_num_threads", lambda: 99),
        ("deterministic", torch, "get_deterministic_debug_mode", lambda: 2),
        ("float32_matmul_precision", torch, "get_float32_matmul_precision", lambda: "medium"),
    ],
)
def test_each_part_changes_it(
    name: str, owner: Any, attribute: str, value: Any, monkeypatch: Patch
) -> None:
    before = environment.environment()[name]
    monkeypatch.setattr(owner, attribute, value)
    after = environment.environment()[name]
    assert (before, after) != (None, None)
    assert after != before


def test_digest_changes_with_the_kernels() -> None:
    before = digest()
    try:
        torch._C._set_mkldnn_enabled(False)
        assert digest() != before
    finally:
        torch._C._set_mkldnn_enabled(True)
    assert digest() == before


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the variable is for x86-64")
def test_digest_sees_the_instruction_set_that_libraries_were_told() -> None:
    def environment_with(**variables: str) -> str:
        code = "from everstep.engine.kernel_digest import digest; print(digest())"
        clean = {k: v for k, v in os.environ.items() if k not in NAMED}
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**clean, "OMP_NUM_THREADS": "1", **variables},
            capture_output=True,
            text=True,
            check=True,
        )
        return run.stdout

    assert environment_with(ONEDNN_MAX_CPU_ISA="SSE41") != environment_with(HOME="/")


# CUDA, whose answers are made up here

CUDA: dict[str, tuple[str, Callable[[Patch], None]]] = {
    "cuda_driver": (
        "999.1.2",
        lambda patch: patch.setattr(cuda_environment, "_driver", lambda: "999.1.2"),
    ),
    "cublas": (
        "99.1.0",
        lambda patch: patch.setattr(cuda_environment, "_cublas", lambda: "99.1.0"),
    ),
    "cuda": ("99.9", lambda patch: patch.setattr(torch.version, "cuda", "99.9")),
    "device": ("H9", lambda patch: patch.setattr(torch.cuda, "get_device_name", lambda: "H9")),
    "cudnn": (
        "91900",
        lambda patch: patch.setattr(torch.backends.cudnn, "version", lambda: "91900"),
    ),
    "tf32": (
        "matmul=True cudnn=True",
        lambda patch: patch.setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    ),
    "attention": (
        "mem_efficient math cudnn",
        lambda patch: patch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False),
    ),
    "multiprocessors": (
        "16",
        lambda patch: patch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda: SimpleNamespace(major=9, minor=0, multi_processor_count="16"),
        ),
    ),
}


@pytest.fixture
def cuda(monkeypatch: Patch) -> Patch:
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: 0)
    flags = SimpleNamespace(
        allow_tf32=False,
        allow_bf16_reduced_precision_reduction=True,
        allow_fp16_reduced_precision_reduction=True,
        allow_fp16_accumulation=False,
    )
    monkeypatch.setattr(torch.backends.cuda, "matmul", flags)
    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", lambda: "cublas")
    return monkeypatch


@pytest.mark.parametrize("name", CUDA)
def test_each_part_of_cuda_changes_it(name: str, cuda: Patch) -> None:
    value, change = CUDA[name]
    before = cuda_environment.describe()
    change(cuda)
    assert cuda_environment.describe() == {**before, name: value}
    assert before[name] != value


@pytest.mark.usefixtures("cuda")
def test_driver_and_libraries_that_are_not_there_are_unknown() -> None:
    found = cuda_environment.describe()
    if not Path("/proc/driver/nvidia/version").exists():
        assert found["cuda_driver"] is None
        assert found["cublas"] is None
    assert "reductions" in found


def test_driver_is_read_from_the_kernel(monkeypatch: Patch) -> None:
    line = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 2025\n"
    monkeypatch.setattr(Path, "read_text", lambda self: line)
    assert cuda_environment._driver() == "570.86.15"
