"""What interchange raises.

InterchangeError
├── Unreadable       a file is not what it should be, or is not there
├── CannotMerge      an adapter and a base model that don't make a merged model
└── AdapterRefused   an adapter that a run can't be made of; names the field
"""

from __future__ import annotations


class InterchangeError(Exception):
    """Base of all; the text says what was wrong, with which input, what to do."""


class Unreadable(InterchangeError):
    """A file is not what it should be, or is not there."""


class CannotMerge(InterchangeError):
    """An adapter and a base model that don't make a merged model."""


class AdapterRefused(InterchangeError):
    """An adapter that a run can't be made of.

    Attributes:
        field: of adapter_config.json, or the tensor, that can't be represented.
    """

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}")
        self.field = field
