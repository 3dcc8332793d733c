"""The engine: base models, LoRA, losses, the optimizer, sampling. State in, state out.

It knows nothing of HTTP, databases or where checkpoints lie. What needs torch is loaded when it
is first used, so that `everstep.engine.validation` and its like cost a service no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from everstep.engine.config import AdamParams, AdapterConfig
from everstep.engine.info import ModelInfo
from everstep.engine.sample_spec import SampleSpec

if TYPE_CHECKING:
    from everstep.engine.model import Model, load_model
    from everstep.engine.optimizer import optim_step
    from everstep.engine.passes import PassResult, forward_backward
    from everstep.engine.sampling import SamplingBatch
    from everstep.engine.state import Adapter, Capture, RunState

_LAZY = {
    "Adapter": "state",
    "Capture": "state",
    "Model": "model",
    "PassResult": "passes",
    "RunState": "state",
    "SamplingBatch": "sampling",
    "forward_backward": "passes",
    "load_model": "model",
    "optim_step": "optimizer",
}

__all__ = [
    "AdamParams",
    "Adapter",
    "AdapterConfig",
    "Capture",
    "Model",
    "ModelInfo",
    "PassResult",
    "RunState",
    "SampleSpec",
    "SamplingBatch",
    "forward_backward",
    "load_model",
    "optim_step",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'everstep.engine' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"everstep.engine.{_LAZY[name]}"), name)
