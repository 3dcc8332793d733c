"""What the engine raises.

EngineError
├── InputError         the request was wrong; the text says where and what to do
│   └── ConfigMismatch a checkpoint that doesn't fit the run; names each field
└── ModelUnsupported   a base model that can't be served; says why
"""


class EngineError(Exception):
    """Base of the engine's errors."""


class InputError(EngineError, ValueError):
    """A request that can't be computed as it is."""


class ConfigMismatch(InputError):
    """A state that doesn't fit the run that it is loaded into."""


class ModelUnsupported(EngineError, ValueError):
    """A base model that the engine can't train or sample exactly."""
