"""Projection group: projections of one input, computed together with an adapter's products.

Queries, keys and values are one product of their stacked weights, and so are an MLP's gate and its
first matrix. An adapter's A are stacked in the same way, and its B lie in one matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from everstep.engine.models.frozen_product import MIN_BYTES, FrozenProduct
from everstep.engine.models.lora import LoraProjection
from everstep.engine.run_state import Adapter

MAX_ZERO_BYTES = 1 << 20
"""Zeros that one product of all B of a group may read: they take less time than more calls."""


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
        for columns, outputs, up in self._ups:
            if columns is None or outputs is None:
                return up.add(y, inner)
            y[:, outputs].add_(up(inner[:, columns].contiguous()).to(y.dtype))
        return y

    def products(self) -> Sequence[FrozenProduct]:
        """Return all products."""
        return [self._down, *self.ups()]

    def ups(self) -> Sequence[FrozenProduct]:
        """Return the products with B, whose results are added."""
        return [up for _, _, up in self._ups]


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
