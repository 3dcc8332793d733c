"""Frozen products: y = W x + b of weights that don't change, for passes without gradients.

A row's bits must not depend on the rows beside it. On x86, oneDNN's products of large weights keep
that promise for more row counts than MKL's, and are faster. They can read a weight as it lies, or
a packed copy in oneDNN's own layout, which is faster again and gives the same bits. Small weights
stay with torch's own product: a call of oneDNN costs more than their arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from everstep.engine.kernels.products import has_onednn

MIN_BYTES = 1 << 18
"""Size from which a weight's products are computed by oneDNN."""
ROW_MULTIPLE = 16
"""Multiple of rows at which every product here keeps its rows' bits."""
FEW_ROWS = 4
"""A smaller multiple, for products that are found to keep them there too."""
_MANY_ROWS, _SOME_ROWS = 256, 64
"""Rows that are multiplied together to probe a product, of a weight up to `_MANY_ROWS_BYTES` and of
a larger one. Kernels choose how to cut a product up by its rows, its size and the threads."""
_MANY_ROWS_BYTES = 1 << 26
_PARTS = ((0, 1), (2, 1), (1, 1), (1, 4), (5, 5), (4, 8), (0, 12))
"""Begin and number of the rows that are multiplied alone, in multiples of the probed multiple."""


class FrozenProduct:
    """The product of a frozen weight.

    Args:
        weight: [out, in], contiguous.
        bias: [out], or None.

    Attributes:
        uses_onednn: whether its products are computed by oneDNN.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self.uses_onednn = _is_for_onednn(weight)
        self._operand = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply rows, [..., in] → [..., out], in the weight's dtype."""
        if self.uses_onednn:
            y: torch.Tensor = _linear(x, self._operand, self.bias, "none", [], "")
            return y
        return functional.linear(x, self.weight, self.bias)

    def pack(self) -> None:
        """Copy the weight into oneDNN's layout, if products with the copy have the same bits."""
        if not self.uses_onednn or self._operand is not self.weight:
            return
        packed = torch.ops.mkldnn._reorder_linear_weight.default(self.weight, ROW_MULTIPLE)
        for x in self.probes():
            if not torch.equal(_linear(x, packed, self.bias, "none", [], ""), self(x)):
                return
        self._operand = packed

    @property
    def packed(self) -> bool:
        """Whether the products read a packed copy."""
        return self._operand is not self.weight

    def row_multiple(self) -> int:
        """Return the smallest multiple of rows at which each row was found to keep its bits.

        Where oneDNN keeps them at none, torch's own product is used from now on.
        """
        x = self.probes()[-1]
        together = self(x)
        for multiple in (FEW_ROWS, ROW_MULTIPLE):
            parts = [slice(multiple * a, multiple * (a + n)) for a, n in _PARTS]
            parts = [part for part in parts if part.stop <= len(x)]
            if all(torch.equal(self(x[part].clone()), together[part]) for part in parts):
                return multiple
        self.use_torch()
        return ROW_MULTIPLE

    def use_torch(self) -> None:
        """Compute with torch's own product from now on."""
        self.uses_onednn = False
        self._operand = self.weight

    def probes(self) -> list[torch.Tensor]:
        """Return rows of irregular numbers: few, some and many."""
        width = self.weight.shape[1]
        most = _MANY_ROWS if self.weight.nbytes <= _MANY_ROWS_BYTES else _SOME_ROWS
        counts = sorted({FEW_ROWS, ROW_MULTIPLE, _SOME_ROWS, most})
        return [probe_numbers(count, width, self.weight) for count in counts]


def product_of(projection: nn.Module) -> FrozenProduct | None:
    """Return the product of an ``nn.Linear`` with contiguous weights. Others have none."""
    if type(projection) is not nn.Linear or not projection.weight.is_contiguous():
        return None
    return FrozenProduct(projection.weight, projection.bias)


def check_rows(products: Iterable[FrozenProduct]) -> int:
    """Return the multiple of rows at which all products keep each row's bits.

    One product of each shape is measured. Where oneDNN's keep them at none, all of that shape are
    torch's from now on.
    """
    shapes: dict[tuple[torch.Size, torch.dtype, bool], list[FrozenProduct]] = {}
    for product in products:
        key = (product.weight.shape, product.weight.dtype, product.bias is None)
        shapes.setdefault(key, []).append(product)
    multiple = FEW_ROWS
    for first, *others in shapes.values():
        multiple = max(multiple, first.row_multiple())
        if not first.uses_onednn:
            for each in others:
                each.use_torch()
    return multiple


def probe_numbers(rows: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """Return irregular numbers, [rows, width], the same each time, with a tensor's dtype."""
    generator = torch.Generator().manual_seed(rows)
    numbers = torch.randn(rows, width, generator=generator)
    return numbers.to(like.device, like.dtype)


def _is_for_onednn(weight: torch.Tensor) -> bool:
    if weight.nbytes < MIN_BYTES or not has_onednn(weight):
        return False
    if weight.dtype == torch.bfloat16:
        supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return supported
    return weight.dtype == torch.float32


def _linear(*arguments: Any) -> Any:
    return torch.ops.mkldnn._linear_pointwise.default(*arguments)
