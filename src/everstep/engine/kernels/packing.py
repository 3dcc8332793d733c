"""Packing: several texts in one row of a pass, each of which attends to itself alone.

Everything but attention computes each token for itself, so packed texts need no padding there. For
attention, neighbouring texts of similar lengths are padded to a grid and computed together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from everstep.engine.transfer import upload


@dataclass(frozen=True)
class TextGroup:
    """Neighbouring texts that attend in one operation, as a grid [count, width].

    Attributes:
        count: number of texts.
        width: length of the longest.
        size: tokens of all of them.
        tokens: index of each token in the flat grid, [size]. None: all are of one length.
        places: index of the token at each place of the grid, [count · width].
        padding: indices of the places that hold none.
    """

    count: int
    width: int
    size: int
    tokens: torch.Tensor | None
    places: torch.Tensor
    padding: torch.Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> TextGroup:
        """Lay out texts of these lengths."""
        count, width = len(lengths), max(lengths)
        counts = np.array(lengths)[:, np.newaxis]
        ends = counts.cumsum(0)
        column = np.arange(width)[np.newaxis]
        held = (column < counts).reshape(-1)
        # Padding repeats a text's last token. No token sees it.
        places = np.minimum(ends - counts + column, ends - 1).reshape(-1)
        tokens, padding = np.flatnonzero(held), np.flatnonzero(~held)
        return cls(
            count,
            width,
            len(tokens),
            None if count * width == len(tokens) else upload(tokens, device),
            upload(places, device),
            upload(padding, device),
        )

    def grid(self, x: torch.Tensor) -> torch.Tensor:
        """Arrange [heads, size, width] as [count, heads, longest, width]."""
        if self.tokens is not None:
            x = _Rearrange.apply(x, 1, self.places, self.tokens, None)  # type: ignore[no-untyped-call]
        return x.reshape(len(x), self.count, self.width, -1).transpose(0, 1)

    def flat(self, y: torch.Tensor) -> torch.Tensor:
        """Arrange [count, heads, longest, width] as [size, heads, width]."""
        y = y.transpose(1, 2).flatten(0, 1)
        if self.tokens is not None:
            y = _Rearrange.apply(y, 0, self.tokens, self.places, self.padding)  # type: ignore[no-untyped-call]
        return y


class Packing:
    """Texts that are packed into one row, one after another.

    Args:
        lengths: the texts' lengths. Texts of similar lengths should be neighbours.
        max_padding: largest ratio of the lengths in a group.
        device: device of the pass.

    Attributes:
        groups: groups of neighbouring texts.
        positions: position of each token in its text, [1, N].
    """

    def __init__(self, lengths: Sequence[int], max_padding: float, device: torch.device) -> None:
        groups: list[list[int]] = []
        for length in lengths:
            members = [*groups[-1], length] if groups else []
            if members and max(members) <= max_padding * min(members):
                groups[-1] = members
            else:
                groups.append([length])
        self.groups = [TextGroup.of(group, device) for group in groups]
        positions = np.concatenate([np.arange(length) for length in lengths])
        self.positions = upload(positions, device).unsqueeze(0)


class _Rearrange(torch.autograd.Function):
    """Select along a dimension, with the inverse selection as the gradient.

    Inputs: a tensor, the dimension, the selected indices, those of the inverse, and the indices of
    the inverse's result that were not selected. They have no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dim: int,
        there: torch.Tensor,
        back: torch.Tensor,
        unselected: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.dim, ctx.back, ctx.unselected = dim, back, unselected
        return x.index_select(dim, there)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gradient = gradients[0].index_select(ctx.dim, ctx.back)
        if ctx.unselected is not None:
            gradient.index_fill_(ctx.dim, ctx.unselected, 0)
        return gradient, None, None, None, None
