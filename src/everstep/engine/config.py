"""Configuration: an adapter's shape and an optimizer step's parameters. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

MAX_RANK = 1024
"""Largest rank of an adapter: few layers of a served model are wider than this."""

MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1
"""Seeds of samples, as in OpenAI's API: each has random streams of its own. An adapter's seed is 0
or more."""


@dataclass(frozen=True)
class AdapterConfig:
    """Configuration of a LoRA adapter.

    Attributes:
        rank: rows of A and columns of B, 1 to 1024.
        alpha: the low-rank product is scaled by alpha / rank.
        seed: seed of A's initialisation, 0 to 2^63 - 1. B is initialised to zero.
        train_attn: adapt the attention's projections.
        train_mlp: adapt the MLP's projections.
        train_unembed: adapt the output head.
        modules: names of the adapted projections among those that the flags select, in the model's
            order. None selects all of them, as for every adapter that was not imported.
    """

    rank: int
    alpha: float = 32.0
    seed: int = 0
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    modules: Sequence[str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, without ``modules`` where it is None."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @property
    def scale(self) -> float:
        """Factor of the low-rank product: alpha / rank."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class AdamParams:
    """Parameters of one AdamW step with decoupled weight decay. Clip norm 0: no clipping."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0
