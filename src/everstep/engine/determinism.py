"""Determinism: the settings under which a device gives the same bits each time.

On CUDA they are errors: an operation without a deterministic form raises, where a warning would
leave attention's gradients to the order in which atomics arrive. On a CPU all operations that the
engine uses are deterministic.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from everstep.engine.errors import ModelUnsupported

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""Variable that fixes cuBLAS' workspaces. torch reads it before its first product, and once."""
FIXED_WORKSPACES = (":4096:8", ":16:8")
"""Its values under which cuBLAS is deterministic."""
GIVEN_UP = (
    "Exact resume (P1) and exact recovery (P3) are not promised: a pass may give other last bits "
    "each time, and replayed results are compared to a tolerance."
)
"""What ``determinism=off`` costs."""


def configure(device: str, *, deterministic: bool = True) -> None:
    """Set torch and its libraries up, before the first computation of the process.

    Args:
        device: torch device that models are computed on.
        deterministic: whether equal inputs have to give equal bits.

    Raises:
        ModelUnsupported: the environment contradicts it.
    """
    # By default, torch writes NaN to all memory before results are written to it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # `torch.use_deterministic_algorithms` does the same, and imports torch's compiler for it.
    if not deterministic:
        torch.set_deterministic_debug_mode("default")
        return
    if not device.startswith("cuda"):
        torch.set_deterministic_debug_mode("warn")
        return
    _fix_workspace()
    _fix_flags()
    torch.set_deterministic_debug_mode("error")


def experts_implementation(device: str, *, deterministic: bool = True) -> str | None:
    """Return how a mixture of experts is computed. None: as transformers chooses.

    Its grouped products count tokens with ``histc``, which CUDA has no deterministic form of.
    """
    return "eager" if deterministic and device.startswith("cuda") else None


def _fix_workspace() -> None:
    config = os.environ.setdefault(WORKSPACE, FIXED_WORKSPACES[0])
    if config not in FIXED_WORKSPACES:
        raise ModelUnsupported(
            f"{WORKSPACE}={config} lets cuBLAS give other bits each time: unset it, set it to "
            f"{' or '.join(FIXED_WORKSPACES)}, or start with --set determinism=off. {GIVEN_UP}"
        )


def _fix_flags() -> None:
    """Turn off what trades bits for speed, and attention without a deterministic backward."""
    matmul: Any = torch.backends.cuda.matmul
    matmul.allow_tf32 = False
    matmul.allow_bf16_reduced_precision_reduction = False
    matmul.allow_fp16_reduced_precision_reduction = False
    cudnn: Any = torch.backends.cudnn
    cudnn.allow_tf32 = False
    cudnn.benchmark = False
    cudnn.deterministic = True
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Flash and memory-efficient attention have a deterministic backward, which strict mode takes.
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    torch.backends.cuda.enable_math_sdp(True)
