"""Matrix products on the CPU, by the faster of torch's libraries.

torch computes float32 products with MKL, which uses half of the vector width on processors that are
not Intel's. oneDNN uses all of it: large products of float32 are two times faster there. A call of
oneDNN costs more than a small product. So sizes alone decide, and with them the bits.
"""

from __future__ import annotations

import platform

import torch
from torch.nn import functional

MIN_MULTIPLICATIONS = 1 << 21
"""Size of a float32 product from which oneDNN computes it."""
_X86 = platform.machine() in ("x86_64", "AMD64")


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute x Wᵀ + b without recording gradients: [N, in], [out, in] → [N, out].

    Both may be transposed views. The result is contiguous.
    """
    if _is_for_onednn(x, weight):
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
            x, weight, bias, "none", [], ""
        )
        return y
    return functional.linear(x, weight, bias)


def add_linear(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute y + x Wᵀ without recording gradients. May overwrite y."""
    if _is_for_onednn(x, weight):
        total: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, y, weight, None, "add")
        return total
    return y.addmm_(x, weight.t())


def has_onednn(weight: torch.Tensor) -> bool:
    """Return whether oneDNN is enabled and has kernels for the processor that holds a weight."""
    return bool(
        weight.device.type == "cpu"
        and _X86
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch._C._get_mkldnn_enabled()
    )


def _is_for_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a product is large, of float32, and on a processor that oneDNN has kernels for."""
    return (
        x.dtype == torch.float32 == weight.dtype
        and x.shape[0] * weight.numel() >= MIN_MULTIPLICATIONS
        and has_onednn(weight)
    )
