"""Numerics: choices of a run's arithmetic that move its last bits. No torch.

A run keeps those that it was created with, wherever it is restored: they are recorded in its
numeric environment and in its checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

TOKENS_PER_MICRO_BATCH = 2048
"""Most tokens of a micro-batch on a CPU."""
MIN_TOKENS, MAX_TOKENS = 256, 32768
"""Bounds of a micro-batch on a device whose memory is known."""
_USABLE = 0.5
"""Share of the memory beside the weights that a micro-batch's activations may take. The rest is for
the states of runs, keys and values, and what the allocator can't use."""
_WIDE_BYTES = 4
_STATES = 0.25
"""Share of that memory that the states of all runs together may take."""


@dataclass(frozen=True)
class Numerics:
    """Choices of a run's arithmetic.

    Attributes:
        micro_batch_tokens: most tokens of a micro-batch. Gradients are added micro-batch after
            micro-batch, and a product's kernel depends on its rows.
        lora_products: dtype of an adapter's products in training: ``float32``, or ``base``, the
            base weights' own with sums in float32.
    """

    micro_batch_tokens: int = field(default_factory=lambda: TOKENS_PER_MICRO_BATCH)
    lora_products: str = "float32"

    @classmethod
    def recorded(cls, environment: Mapping[str, Any] | None) -> Numerics | None:
        """Return those of a numeric environment. None: it records none."""
        if not environment or "micro_batch_tokens" not in environment:
            return None
        products = environment.get("lora_products", "float32")
        return cls(int(environment["micro_batch_tokens"]), str(products))

    def environment(self) -> dict[str, Any]:
        """Return their part of the numeric environment. Float32 products go without saying."""
        fields: dict[str, Any] = {"micro_batch_tokens": self.micro_batch_tokens}
        if self.lora_products != "float32":
            fields["lora_products"] = self.lora_products
        return fields


def tokens_per_micro_batch(
    projections: Iterable[tuple[int, int]], itemsize: int, weight_bytes: int, device_bytes: int
) -> int:
    """Return how many tokens a device's memory allows in a micro-batch, a power of two.

    It is computed from all of the device's memory, not from what is free at the moment, so that
    runs of equal services have equal bits.

    Args:
        projections: in and out features of the projections that adapters may adapt. Between them
            lie a layer's other activations, which are about as many.
        itemsize: bytes of a number of the base model.
        weight_bytes: size of the base weights.
        device_bytes: memory of the device.
    """
    per_token = sum(each[0] * _WIDE_BYTES + each[1] * itemsize for each in projections)
    available = _USABLE * max(0, device_bytes - weight_bytes)
    fitting = int(available / max(1, per_token))
    tokens = MIN_TOKENS
    while 2 * tokens <= min(fitting, MAX_TOKENS):
        tokens *= 2
    return tokens


def bytes_for_states(weight_bytes: int, device_bytes: int) -> int:
    """Return how much of a device's memory the states of runs may take.

    Args:
        weight_bytes: size of the weights of all base models on it.
        device_bytes: memory of the device.
    """
    return int(_STATES * max(0, device_bytes - weight_bytes))
