"""What an adapter is, and the parameters of a step. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

MAX_RANK = 1024
"""Ranks above this cost more than they can give: no layer of a served model is narrower by much."""


@dataclass(frozen=True)
class AdapterConfig:
    """A LoRA adapter.

    Attributes:
        rank: columns of A and rows of B, 1 to 1024.
        alpha: the product is scaled by alpha / rank.
        seed: of A's initialisation; B begins at zero.
        train_attn: adapt the attention's projections.
        train_mlp: adapt the MLP's projections.
        train_unembed: adapt the output head.
        modules: names of the projections among those that are adapted, in the model's order; None:
            all of them, as of every adapter that was not imported.
    """

    rank: int
    alpha: float = 32.0
    seed: int = 0
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    modules: Sequence[str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON; ``modules`` only where it says something."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @property
    def scale(self) -> float:
        """What the product of A and B is multiplied by."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class AdamParams:
    """One AdamW step: decoupled weight decay; ``grad_clip_norm`` 0 clips nothing."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0
