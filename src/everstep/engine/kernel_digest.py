"""Kernel digest: a hash of the products that this process's kernels give for fixed numbers.

Libraries choose among kernels by the processor, by variables that they read when they are loaded,
and by more that nothing reports. Small products and functions of the kinds that the engine uses
give other last bits with most other kernels, and so another digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from torch.nn import functional

from everstep.engine.kernels import products

_SHAPES = ((1, 256, 192), (16, 256, 192), (16, 96, 1024), (300, 512, 130))
"""Rows, inputs and outputs of the products: of one row, of decoding, and of training."""
_DTYPES = (torch.float32, torch.bfloat16)


def digest() -> str:
    """Return the digest for the present number of threads and flags, on the default device."""
    return _digest(
        torch.get_num_threads(),
        torch._C._get_mkldnn_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_deterministic_debug_mode(),
        torch.cuda.is_available(),
    )


@cache
def _digest(*_state: object) -> str:
    hasher = hashlib.blake2b(digest_size=8)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        for result in (*_products(device), *_functions(device)):
            hasher.update(result.detach().float().cpu().numpy().tobytes())
    hasher.update(_numpy())
    return hasher.hexdigest()


def _numbers(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return irregular numbers within ±1, the same everywhere: integers by a power of two."""
    count = int(np.prod(shape))
    integers = (torch.arange(count, dtype=torch.int64) * 2654435761 + count) % (1 << 24)
    values = (integers.double() - (1 << 23)) * 2.0**-23
    return values.to(torch.float32).view(shape).to(device, dtype)


def _products(device: torch.device) -> Iterator[torch.Tensor]:
    for dtype in _DTYPES:
        for rows, width_in, width_out in _SHAPES:
            x = _numbers(rows, width_in, device=device, dtype=dtype)
            weight = _numbers(width_out, width_in, device=device, dtype=dtype)
            y = functional.linear(x, weight)
            yield y
            yield y @ weight
            yield y.t() @ x
            yield products.linear(y.t(), x.t())
        heads = _numbers(1, 4, 80, 64, device=device, dtype=dtype)
        yield functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        yield functional.scaled_dot_product_attention(heads[:, :, -1:], heads, heads)


def _functions(device: torch.device) -> Iterator[torch.Tensor]:
    x = _numbers(7, 1003, device=device) * 8
    for function in (torch.exp, torch.tanh, torch.sin, torch.cos, torch.rsqrt, torch.sigmoid):
        yield function(x.abs() if function is torch.rsqrt else x)
    yield functional.gelu(x)
    yield torch.logsumexp(x, -1)
    yield torch.softmax(x, -1)
    yield x.pow(2).mean(-1)
    yield x.sum()
    yield torch.linalg.vector_norm(x)
    yield (x * 1e-39) * 0.5  # zero where subnormal numbers are flushed


def _numpy() -> bytes:
    """Return the numbers that sampling computes with NumPy."""
    x = _numbers(1003, device=torch.device("cpu")).double().numpy() * 8
    exponentials = np.exp(x)
    total = np.log(exponentials.sum())
    return np.concatenate([exponentials, np.cumsum(exponentials), [total]]).tobytes()
