"""Frozen products: y = W x + b of weights that don't change, for passes without gradients.

A row's bits must not depend on the rows beside it. On x86, oneDNN's products of large weights keep
that promise for more row counts than MKL's, and are faster. They can read a weight as it lies, or
a packed copy in oneDNN's own layout, which is faster again and gives the same bits. Small weights
stay with torch's own product: a call of oneDNN costs more than their arithmetic.

A small product is computed by one thread, where its bits are found to be the same: to wake another
thread takes longer. On the same condition, a product's own kernel adds it to other numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from everstep.engine.kernels import huge_pages
from everstep.engine.kernels.products import has_onednn
from everstep.engine.kernels.threads import in_one_thread

MIN_BYTES = 1 << 18
"""Size from which a weight's products are computed by oneDNN."""
ROW_MULTIPLE = 16
"""Multiple of rows at which every product here keeps its rows' bits."""
FEW_ROWS = (2, 4)
"""Smaller multiples, for products that are found to keep them there too."""
_MANY_ROWS, _SOME_ROWS = 256, 64
"""Rows that are multiplied together to probe a product, of a weight up to `_MANY_ROWS_BYTES` and of
a larger one. Kernels choose how to cut a product up by its rows, its size and the threads."""
_MANY_ROWS_BYTES = 1 << 26
MAX_SERIAL_WORK = 1 << 20
"""Rows times weights up to which one thread computes a product: 20 microseconds of its time."""
_PARTS = ((0, 1), (2, 1), (1, 1), (3, 2), (1, 3), (1, 4), (5, 5), (2, 7), (4, 8), (0, 12))
"""Begin and number of the rows that are multiplied alone, in multiples of the probed multiple."""


class FrozenProduct:
    """The product of a frozen weight.

    Args:
        weight: [out, in], contiguous.
        bias: [out], or None.

    Attributes:
        uses_onednn: whether its products are computed by oneDNN.
        serial: whether one thread computes small products. `row_multiple` measures it.
        fused: whether `add` is one operation. `fuse` measures it.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self.uses_onednn = _is_for_onednn(weight)
        self.serial = False
        self.fused = False
        self._operand = weight
        self._transposed = weight.t()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply rows, [..., in] → [..., out], in the weight's dtype."""
        if self.serial and self._is_small(x):
            return in_one_thread(self._multiply, x)
        return self._multiply(x)

    def add(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return y + W x + b of rows, [M, in], [M, out] → [M, out]. May overwrite y."""
        if not self.fused or y.dtype != self.weight.dtype:
            return y.add_(self(x).to(y.dtype))
        if self.serial and self._is_small(x):
            return in_one_thread(self._multiply_add, y, x)
        return self._multiply_add(y, x)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        if self.uses_onednn:
            y: torch.Tensor = _linear(x, self._operand, self.bias, "none", [], "")
            return y
        return functional.linear(x, self.weight, self.bias)

    def _multiply_add(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if self.uses_onednn:
            return _linear_add(x, y, self._operand)
        return y.addmm_(x, self._transposed)

    def pack(self, *, check: bool = True) -> None:
        """Copy the weight into oneDNN's layout, if products with the copy have the same bits.

        Args:
            check: compare them. It has been done for a product of the same shape otherwise.
        """
        if not self.uses_onednn or self.packed:
            return
        packed = _packed(self.weight)
        if check:
            product, probes = self._probed()
            other = packed if product is self else _packed(product.weight)
            for x in probes:
                if not torch.equal(_linear(x, other, product.bias, "none", [], ""), product(x)):
                    return
        if hasattr(torch.ops.mkldnn, "data_ptr"):
            huge_pages.collapse(torch.ops.mkldnn.data_ptr(packed), self.weight.nbytes)
        self._operand = packed

    @property
    def packed(self) -> bool:
        """Whether the products read a packed copy."""
        return self._operand is not self.weight

    def row_multiple(self) -> int:
        """Return the smallest multiple of rows at which each row was found to keep its bits.

        Where oneDNN keeps them at none, torch's own product is used from now on.
        """
        product, probes = self._probed()
        x = probes[-1]
        together = product(x)
        for multiple in (*FEW_ROWS, ROW_MULTIPLE):
            parts = [slice(multiple * a, multiple * (a + n)) for a, n in _PARTS]
            parts = [part for part in parts if part.stop <= len(x)]
            if all(torch.equal(product(x[part].clone()), together[part]) for part in parts):
                few = (x[: multiple * count] for _, count in _PARTS)
                self.serial = product._keeps_bits_in_one_thread(few)
                return multiple
        self.use_torch()
        return ROW_MULTIPLE

    def fuse(self) -> None:
        """Add with the product's own kernel from now on, if that gives the same bits."""
        if self.bias is not None:
            return
        product, probes = self._probed()
        for x in probes:
            y = product._multiply(x)
            other = y.flip(0)
            sums = [product._multiply_add(other.clone(), x)]
            if self.serial and self._is_small(x):
                sums.append(in_one_thread(product._multiply_add, other.clone(), x))
            if not all(torch.equal(found, other + y) for found in sums):
                return
        self.fused = True

    def like(self, other: FrozenProduct) -> None:
        """Compute as another product of the same shape, which was measured."""
        if not other.uses_onednn:
            self.use_torch()
        self.serial, self.fused = other.serial, other.fused

    def use_torch(self) -> None:
        """Compute with torch's own product from now on."""
        self.uses_onednn = False
        self._operand = self.weight

    def _keeps_bits_in_one_thread(self, probes: Iterable[torch.Tensor]) -> bool:
        """Whether one thread computes small products with the bits of all threads."""
        small = [x for x in probes if self._is_small(x)]
        return bool(small) and all(
            torch.equal(in_one_thread(self._multiply, x), self._multiply(x)) for x in small
        )

    def _is_small(self, x: torch.Tensor) -> bool:
        """Whether one thread is not slower: the work is little, and so are the bytes to read."""
        work = x.numel() * self.weight.shape[0]
        return work <= MAX_SERIAL_WORK and self.weight.nbytes < MIN_BYTES and x.is_cpu

    def probes(self) -> list[torch.Tensor]:
        """Return rows of irregular numbers: few, some and many."""
        return [probe_numbers(count, self.weight.shape[1], self.weight) for count in self._counts()]

    def _counts(self) -> list[int]:
        most = _MANY_ROWS if self.weight.nbytes <= _MANY_ROWS_BYTES else _SOME_ROWS
        return sorted({*FEW_ROWS, ROW_MULTIPLE, _SOME_ROWS, most})

    def _probed(self) -> tuple[FrozenProduct, list[torch.Tensor]]:
        """Return a product that shows the order of this one's additions, and rows to probe it with.

        Results of half precision hide it: nearly all of them are rounded to the same number. So
        there a product of the same shape is probed whose terms cancel each other, in columns that
        occur twice and numbers of either sign. Its results are nothing but the sums' rounding.
        """
        width = self.weight.shape[1] // 2
        half = self.weight.dtype in (torch.bfloat16, torch.float16)
        if not half or self.weight.nbytes > _MANY_ROWS_BYTES:
            return self, self.probes()
        columns = self.weight[:, :width]
        rest = torch.zeros_like(self.weight[:, 2 * width :])
        bias = None if self.bias is None else torch.zeros_like(self.bias)
        product = FrozenProduct(torch.cat((columns, columns, rest), 1), bias)
        product.uses_onednn = self.uses_onednn
        probes = []
        for count in self._counts():
            x = probe_numbers(count, width, self.weight)
            probes.append(torch.cat((x, -x, rest.new_zeros(count, rest.shape[1])), 1))
        return product, probes


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
    multiple = FEW_ROWS[0]
    for first, *others in _by_shape(products):
        multiple = max(multiple, first.row_multiple())
        for each in others:
            each.like(first)
    return multiple


def fuse_products(products: Iterable[FrozenProduct]) -> None:
    """Let products `add` in one operation, where that keeps the bits. One a shape is measured."""
    for first, *others in _by_shape(products):
        first.fuse()
        for each in others:
            each.like(first)


def pack_products(products: Iterable[FrozenProduct]) -> None:
    """Pack all products whose bits are those of their copies. One of each shape is compared."""
    for first, *others in _by_shape(products):
        first.pack()
        for each in others:
            if first.packed:
                each.pack(check=False)


def _by_shape(products: Iterable[FrozenProduct]) -> Iterable[list[FrozenProduct]]:
    shapes: dict[tuple[torch.Size, torch.dtype, bool], list[FrozenProduct]] = {}
    for product in products:
        key = (product.weight.shape, product.weight.dtype, product.bias is None)
        shapes.setdefault(key, []).append(product)
    return shapes.values()


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


def _packed(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight.default(weight, ROW_MULTIPLE)
    return packed


def _linear_add(x: torch.Tensor, y: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    total: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, y, operand, None, "add")
    return total


def _linear(*arguments: Any) -> Any:
    return torch.ops.mkldnn._linear_pointwise.default(*arguments)
