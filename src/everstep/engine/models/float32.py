"""Float32 passes of a model in half precision, with the memory of one module more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """Compute in float32: each module's weights are converted while it runs, and put back.

    The weights keep their place in memory and their values.
    """
    with ExitStack() as stack:
        for each in module.modules():
            own = [p for p in each.parameters(recurse=False) if p.is_floating_point()]
            if own:
                stack.enter_context(_converted_while_running(each, own))
        yield


@contextmanager
def _converted_while_running(module: nn.Module, own: list[nn.Parameter]) -> Iterator[None]:
    kept: list[torch.Tensor] = []

    def convert(*_: Any) -> None:
        kept[:] = [parameter.data for parameter in own]
        for parameter in own:
            parameter.data = parameter.data.float()

    def restore(*_: Any) -> None:
        for parameter, data in zip(own, kept, strict=True):
            parameter.data = data

    hooks = (
        module.register_forward_pre_hook(convert),
        module.register_forward_hook(restore, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
