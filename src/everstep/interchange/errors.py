"""Errors of interchange.

InterchangeError
├── UnreadableFile       a file is missing or malformed
├── DivergedAdapter      an adapter's weights, or the merged ones, are NaN or infinite
├── MergeError           an adapter cannot be merged into a base model
└── UnsupportedAdapter   a run cannot represent an adapter: the message names the field
"""

from __future__ import annotations


class InterchangeError(Exception):
    """Base class: the message says where the problem is and how to solve it."""


class UnreadableFile(InterchangeError):
    """A file is missing or malformed."""


class DivergedAdapter(InterchangeError):
    """An adapter's weights, or those of the model it is merged into, are NaN or infinite."""


class MergeError(InterchangeError):
    """An adapter cannot be merged into a base model."""


class UnsupportedAdapter(InterchangeError):
    """A run cannot represent an adapter.

    Attributes:
        field: the field of adapter_config.json, or the tensor, that cannot be represented.
    """

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}")
        self.field = field
