"""Errors of the engine.

EngineError
├── InputError         the request is wrong: the message says where, and how to correct it
│   ├── ConfigMismatch a checkpoint does not fit the run: the message names each field
│   └── Diverged       weights, moments or gradients are or would be NaN or infinite
└── ModelUnsupported   a base model cannot be served: the message says why
"""


class EngineError(Exception):
    """Base class of the engine's errors."""


class InputError(EngineError, ValueError):
    """A request cannot be computed."""


class ConfigMismatch(InputError):
    """A state does not fit the run that it is loaded into."""


class Diverged(InputError):
    """An adapter or its optimizer has diverged, or a step would make it diverge."""


class ModelUnsupported(EngineError, ValueError):
    """A base model cannot be trained or sampled exactly."""


def first_line(error: Exception) -> str:
    """Return the first line of a library's error, or its type where it has no text."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
