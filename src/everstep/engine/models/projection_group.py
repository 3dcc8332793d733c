"""Projection group: projections of one input, computed together with an adapter's products.

Queries, keys and values are one product of their stacked weights, and so are an MLP's gate and its
first matrix. An adapter's A are stacked in the same way, and its B lie in one matrix, with zeros
between them, or are products of one operation, where that gives the same bits and is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from everstep.engine.kernels.threads import in_one_thread
from everstep.engine.models.frozen_product import MIN_BYTES, FrozenProduct, probe_numbers
from everstep.engine.models.lora import LoraProjection
from everstep.engine.run_state import Adapter

MAX_ZERO_BYTES = 1 << 20
"""Zeros that one product of all B of a group may read: they take less time than more calls."""
_MIN_ZERO_BYTES = 1 << 16
"""Zeros from which B of equal widths are products of one operation instead of one matrix."""
_MAX_STACKED_BYTES = 1 << 20
"""Largest B of a group for that: one thread reads them in less time than another takes to wake."""
_PARTS = (1, 2, 3, 4, 5, 7, 8, 12)
_MANY_ROWS = 256
"""Rows by which both are compared, the first in multiples of those that a pass is padded to."""
_MAX_SERIAL_WORK = 1 << 23
"""Rows times numbers in B up to which one thread computes them."""


class ProjectionGroup:
    """Projections of the same input, whose outputs lie one after another.

    Args:
        projections: the projections.

    Raises:
        TypeError: one of them is no wrapped ``nn.Linear``, or only some of them have biases.
    """

    def __init__(self, *projections: LoraProjection) -> None:
        products = [_product(each) for each in projections]
        if len({product.bias is None for product in products}) > 1:
            raise TypeError("only some of these projections have biases")
        self.names = tuple(each.name for each in projections)
        self.widths = tuple(each.out_features for each in projections)
        self._products = products
        if self.nbytes < MIN_BYTES:
            self._stack()

    @property
    def nbytes(self) -> int:
        """Size of the weights."""
        return sum(product.weight.nbytes for product in self._products)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self._products[0].weight.dtype

    @property
    def copied(self) -> bool:
        """Whether the product reads a packed copy of the weights."""
        return all(product.packed for product in self._products)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply rows, [M, in] → [M, sum of widths]."""
        if len(self._products) == 1:
            return self._products[0](x)
        return torch.cat([product(x) for product in self._products], -1)

    def copy_weights(self) -> None:
        """Stack the weights and pack them: a copy of them that moves no bit and is faster."""
        self._stack()
        for product in self._products:
            product.pack()

    def _stack(self) -> None:
        """Replace the products by one of the stacked weights, if that has the same bits."""
        if len(self._products) == 1:
            return
        biases = [product.bias for product in self._products if product.bias is not None]
        stacked = FrozenProduct(
            torch.cat([product.weight for product in self._products]),
            torch.cat(biases) if biases else None,
        )
        if all(torch.equal(stacked(x), self(x)) for x in stacked.probes()):
            stacked.row_multiple()
            self._products = [stacked]


class GroupAdapter:
    """An adapter's low-rank products for a group.

    Args:
        adapter: the adapter. It adapts at least one projection of the group.
        group: the group.
    """

    def __init__(self, adapter: Adapter, group: ProjectionGroup) -> None:
        scale = adapter.layout.config.scale
        pairs, ranges, begin = [], [], 0
        for name, width in zip(group.names, group.widths, strict=True):
            if name in adapter.weights:
                a, b = adapter.weights[name]
                pairs.append((a, b * scale))
                ranges.append(slice(begin, begin + width))
            begin += width
        self._down = FrozenProduct(torch.cat([a for a, _ in pairs]))
        rank = pairs[0][0].shape[0]
        self._ups: list[tuple[slice | None, slice | None, FrozenProduct]]
        self._b = [b for _, b in pairs] if len(pairs) == len(group.names) else []
        self._stacked: _StackedB | None = None
        zeros = begin * rank * len(pairs) * 4 - sum(b.nbytes for _, b in pairs)
        if zeros <= MAX_ZERO_BYTES:
            self._ups = [(None, None, _block_diagonal(pairs, ranges, begin, rank))]
        else:
            self._ups = [
                (slice(rank * index, rank * (index + 1)), rows, FrozenProduct(b))
                for index, ((_, b), rows) in enumerate(zip(pairs, ranges, strict=True))
            ]

    def add(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return y [M, sum of widths] plus the low-rank products of rows x [M, in].

        It may overwrite y.
        """
        inner = self._down(x.float())
        if self._stacked is not None:
            return self._stacked.add(y, inner)
        return self._add_ups(y, inner)

    def _add_ups(self, y: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
        for columns, outputs, up in self._ups:
            if columns is None or outputs is None:
                return up.add(y, inner)
            y[:, outputs].add_(up(inner[:, columns].contiguous()).to(y.dtype))
        return y

    def stack(self, multiple: int, dtype: torch.dtype) -> None:
        """Compute all B in one operation from now on, if that gives the same bits and is faster.

        Args:
            multiple: multiple of rows in passes.
            dtype: dtype of the base's products.
        """
        stacked = self._faster()
        if stacked is None:
            return
        counts = (*(multiple * parts for parts in _PARTS), _MANY_ROWS)
        if all(self._agrees(stacked, count, dtype) for count in counts):
            self._stacked, self._ups, self._b = stacked, [], []

    def _agrees(self, stacked: _StackedB, rows: int, dtype: torch.dtype) -> bool:
        """Whether products of one operation have the same bits, with one thread and with all."""
        inner = probe_numbers(rows, self._down.weight.shape[0], self._b[0])
        if dtype == inner.dtype:
            y = probe_numbers(rows, sum(len(b) for b in self._b), self._b[0])
            add = stacked.add_by_all_threads
            found = [call(add, y.clone(), inner) for call in (in_one_thread, _call)]
        else:  # rounding would hide their last bits
            y = inner.new_zeros(rows, sum(len(b) for b in self._b))
            found = [call(stacked.multiply, inner).reshape_as(y) for call in (in_one_thread, _call)]
        expected = self._add_ups(y, inner)
        return all(torch.equal(each, expected) for each in found)

    def stack_like(self, other: GroupAdapter) -> None:
        """Compute B as another adapter's of the same shape, which was measured."""
        if other._stacked is not None:
            self._stacked, self._ups, self._b = self._faster(), [], []

    def _faster(self) -> _StackedB | None:
        """Return B as products of one operation. None: it is not faster, or not possible."""
        widths = {len(b) for b in self._b}
        nbytes = sum(b.nbytes for b in self._b)
        if len(widths) != 1 or not self._b[0].is_cpu or nbytes > _MAX_STACKED_BYTES:
            return None
        if nbytes * (len(self._b) - 1) <= _MIN_ZERO_BYTES:
            return None
        return _StackedB(self._b)

    def products(self) -> Sequence[FrozenProduct]:
        """Return all products."""
        return [self._down, *self.ups()]

    def ups(self) -> Sequence[FrozenProduct]:
        """Return the products with B, whose results are added."""
        return [up for _, _, up in self._ups]


class _StackedB:
    """B of equal widths [out, rank], as products of one operation, mostly by one thread."""

    def __init__(self, ups: Sequence[torch.Tensor]) -> None:
        self._weights = torch.stack([b.t() for b in ups])

    def add(self, y: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
        """Add the products of inner [M, n · rank] to y [M, n · out], and return it."""
        if len(inner) * self._weights.numel() <= _MAX_SERIAL_WORK:
            return in_one_thread(self.add_by_all_threads, y, inner)
        return self.add_by_all_threads(y, inner)

    def add_by_all_threads(self, y: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
        """Add the products with the present number of threads."""
        outputs = y.view(len(y), *self._weights.shape[::2])
        if y.dtype == inner.dtype:
            outputs.transpose(0, 1).baddbmm_(self._parts(inner), self._weights)
        else:
            outputs.add_(self.multiply(inner).to(y.dtype))
        return y

    def multiply(self, inner: torch.Tensor) -> torch.Tensor:
        """Multiply inner [M, n · rank] by all B → [M, n, out], not contiguous."""
        return torch.bmm(self._parts(inner), self._weights).transpose(0, 1)

    def _parts(self, inner: torch.Tensor) -> torch.Tensor:
        count, rank, _ = self._weights.shape
        return inner.view(len(inner), count, rank).transpose(0, 1)


def _call(function: Callable[..., torch.Tensor], *arguments: torch.Tensor) -> torch.Tensor:
    return function(*arguments)


def stack_adapters(
    adapters: Sequence[tuple[ProjectionGroup, GroupAdapter]], multiple: int, dtype: torch.dtype
) -> None:
    """Let adapters compute all B of a group in one operation. One of each shape is measured."""
    measured: dict[tuple[object, ...], GroupAdapter] = {}
    for group, adapter in adapters:
        key = (group.widths, *(product.weight.shape for product in adapter.products()))
        if key in measured:
            adapter.stack_like(measured[key])
        else:
            adapter.stack(multiple, dtype)
            measured[key] = adapter


def _block_diagonal(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ranges: Sequence[slice],
    width: int,
    rank: int,
) -> FrozenProduct:
    """Return one product of all B: zeros add nothing to the others' sums."""
    block = pairs[0][1].new_zeros(width, rank * len(pairs))
    for index, ((_, b), rows) in enumerate(zip(pairs, ranges, strict=True)):
        block[rows, rank * index : rank * (index + 1)] = b
    return FrozenProduct(block)


def _product(projection: LoraProjection) -> FrozenProduct:
    product = projection.product if isinstance(projection, LoraProjection) else None
    if product is None:
        raise TypeError(f"{type(projection).__name__} is no wrapped linear projection")
    return product
