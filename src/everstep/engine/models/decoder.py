"""Decoder: computes the logits of one token a row, over the caches of the rows' requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from everstep.engine.models.attention import CachedRows, decoding
from everstep.engine.models.frozen_product import ROW_MULTIPLE
from everstep.engine.models.lora import BoundAdapter
from everstep.engine.run_state import Adapter
from everstep.engine.transfer import upload

if TYPE_CHECKING:
    from everstep.engine.models.model import Model

AdapterRows = Sequence[tuple[Adapter | None, slice]]
"""Adapters and the rows of a pass that they apply to. None: the base model."""


class Decoder(Protocol):
    """Computes decoding passes. A row's bits do not depend on the other rows.

    Attributes:
        name: name in the numeric environment.
    """

    name: str

    def row_multiple(self, adapter: Adapter | None) -> int:
        """Return the multiple to which an adapter's rows must be padded in a pass."""

    def logits(
        self,
        tokens: np.ndarray[Any, Any],
        positions: np.ndarray[Any, Any],
        cached: Sequence[CachedRows],
        adapters: AdapterRows,
    ) -> torch.Tensor:
        """Append a token to each row's cache and compute the logits of the next one.

        Args:
            tokens: int64 [M], the rows' last tokens.
            positions: int64 [M], their positions.
            cached: the requests' rows and caches. Other rows are padding.
            adapters: adapters by rows, each padded to its multiple. They cover all rows.

        Returns:
            Float32 [M, V].
        """


class ModuleDecoder:
    """Decodes with the modules of transformers. It serves every family.

    Args:
        model: the base model.
    """

    name = "transformers"

    def __init__(self, model: Model) -> None:
        self._model = model

    def row_multiple(self, adapter: Adapter | None) -> int:
        """Return the multiple to which an adapter's rows must be padded in a pass."""
        return ROW_MULTIPLE

    def logits(
        self,
        tokens: np.ndarray[Any, Any],
        positions: np.ndarray[Any, Any],
        cached: Sequence[CachedRows],
        adapters: AdapterRows,
    ) -> torch.Tensor:
        """Compute the logits of the next tokens. See `Decoder`."""
        model = self._model
        bounds: list[BoundAdapter] = [a.bind(rows) for a, rows in adapters if a is not None]
        with model.binding.bind(*bounds), decoding(cached):
            hidden = model.hidden(
                upload(tokens, model.device).unsqueeze(1),
                position_ids=upload(positions, model.device).unsqueeze(1),
            )
            return model.logits(hidden[:, 0])
