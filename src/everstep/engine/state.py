"""The state of a run: adapter, moments, pending gradients, step. Captured and restored exactly."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from everstep.engine import adapter_files as files
from everstep.engine.arena import Arena
from everstep.engine.config import AdapterConfig
from everstep.engine.errors import ConfigMismatch, InputError
from everstep.engine.lora import Bound, Weights

_MOMENTS = ("exp_avg", "exp_avg_sq")
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterLayout:
    """Where an adapter's tensors are.

    Attributes:
        config: rank, alpha, seed, flags.
        widths: in and out features by module, in the model's order.
        peft_config: the adapter_config.json of its files.
    """

    config: AdapterConfig
    widths: Mapping[str, tuple[int, int]]
    peft_config: bytes

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of A and B by PEFT's names."""
        rank = self.config.rank
        shapes: dict[str, tuple[int, ...]] = {}
        for module, (width_in, width_out) in self.widths.items():
            shapes[f"{_PREFIX}{module}.lora_A.weight"] = (rank, width_in)
            shapes[f"{_PREFIX}{module}.lora_B.weight"] = (width_out, rank)
        return shapes

    def weights(self, tensors: Mapping[str, torch.Tensor]) -> Weights:
        """A and B by module."""
        return {
            module: (
                tensors[f"{_PREFIX}{module}.lora_A.weight"],
                tensors[f"{_PREFIX}{module}.lora_B.weight"],
            )
            for module in self.widths
        }


@dataclass(frozen=True)
class Adapter:
    """Frozen weights to sample with."""

    layout: AdapterLayout
    weights: Weights

    def bound(self, rows: slice | None = None) -> Bound:
        """For a pass, on these rows of it."""
        return Bound(self.weights, self.layout.config.scale, rows)


class RunState:
    """One run's state.

    Args:
        layout: the adapter's.
        device: where it lies.

    Attributes:
        layout: as given.
        arena: the buffers.
        step: how many optimizer steps were made.
        has_gradients: whether gradients wait for the next step.
    """

    def __init__(self, layout: AdapterLayout, device: torch.device) -> None:
        self.layout = layout
        self.arena = Arena(layout.shapes, device)
        self.step = 0
        self.has_gradients = False
        self._initialise()

    def _initialise(self) -> None:
        """A uniform within ±1/sqrt(in), drawn on the CPU from the seed; B zero."""
        generator = torch.Generator().manual_seed(_generator_seed(self.layout.config.seed))
        for name, tensor in self.arena.views("params").items():
            if name.endswith("lora_A.weight"):
                bound = 1 / math.sqrt(tensor.shape[1])
                drawn = torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator)
                tensor.copy_(drawn)

    @property
    def nbytes(self) -> int:
        """What the state takes in memory."""
        return sum(buffer.nbytes for buffer in self.arena.buffers.values())

    def leaves(self) -> dict[str, torch.Tensor]:
        """The parameters as tensors that a pass differentiates by, sharing the arena's memory."""
        return {
            name: view.detach().requires_grad_()
            for name, view in self.arena.views("params").items()
        }

    def adapter_hash(self) -> str:
        """SHA-256 over the parameters' bytes."""
        return hashlib.sha256(_host(self.arena.buffers["params"]).tobytes()).hexdigest()

    def capture(self, *, optimizer: bool) -> Capture:
        """Take the state as it is now; it stays so while the run goes on.

        Args:
            optimizer: whether moments and pending gradients are wanted as well.
        """
        names = ["params"]
        if optimizer:
            names += [*_MOMENTS, *(["grads"] if self.has_gradients else [])]
        return Capture(self.layout, self.arena, self.arena.pin(*names), self.step)

    def restore(
        self, contents: Mapping[str, files.Buffer], meta: Mapping[str, Any], *, optimizer: bool
    ) -> None:
        """Take a captured state over. Checked whole first: on an error nothing has changed.

        Without the optimizer the run is then as a fresh one that begins with these weights:
        moments zero, step 0, no pending gradients.

        Args:
            contents: files by name, as `Capture.files` made them.
            meta: ``step`` of the state.
            optimizer: whether moments, step and pending gradients are taken over.

        Raises:
            ConfigMismatch: a tensor is missing, too many, or of another shape.
            InputError: a file is not what it should be.
        """
        shapes = self.arena.shapes
        step = int(meta["step"]) if optimizer else 0
        loaded = {"params": _flat(contents, files.ADAPTER, shapes)}
        if optimizer:
            if files.OPTIMIZER not in contents:
                raise ConfigMismatch("The checkpoint holds no optimizer state.")
            moments = files.read_safetensors(contents[files.OPTIMIZER], files.OPTIMIZER)
            for moment in _MOMENTS:
                own = {
                    k.removeprefix(f"{moment}."): v
                    for k, v in moments.items()
                    if k.startswith(f"{moment}.")
                }
                loaded[moment] = _checked(own, shapes, f"{files.OPTIMIZER} ({moment})")
            if files.GRADIENTS in contents:
                loaded["grads"] = _flat(contents, files.GRADIENTS, shapes)
        buffers = dict(zip(_ALL, self.arena.writable(*_ALL), strict=True))
        for name, buffer in buffers.items():
            if name in loaded:
                _copy(loaded[name], buffer, shapes)
            else:
                buffer.zero_()
        self.has_gradients = "grads" in loaded
        self.step = step


def _generator_seed(seed: int) -> int:
    """A seed as torch's CPU generator can tell it apart: by its low 32 bits, and no others."""
    if seed < 2**32:
        return seed
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "little")


_ALL = ("params", "grads", *_MOMENTS)


class Capture:
    """A run's state at one instant.

    Attributes:
        meta: ``step`` of the state.
    """

    def __init__(
        self,
        layout: AdapterLayout,
        arena: Arena,
        buffers: Mapping[str, torch.Tensor],
        step: int,
    ) -> None:
        self.meta: dict[str, Any] = {"step": step}
        self._layout = layout
        self._arena = arena
        self._buffers = buffers

    def files(self) -> dict[str, list[files.Buffer]]:
        """The files' chunks by name, without a copy of what lies on the CPU."""
        shapes = self._arena.shapes
        host = {name: _host(buffer) for name, buffer in self._buffers.items()}
        made: dict[str, list[files.Buffer]] = {
            files.ADAPTER: files.safetensors_file([files.Section(shapes, host["params"])]),
            files.ADAPTER_CONFIG: [self._layout.peft_config],
        }
        if _MOMENTS[0] in host:
            sections = [
                files.Section({f"{moment}.{k}": v for k, v in shapes.items()}, host[moment])
                for moment in _MOMENTS
            ]
            made[files.OPTIMIZER] = files.safetensors_file(sections)
        if "grads" in host:
            made[files.GRADIENTS] = files.safetensors_file([files.Section(shapes, host["grads"])])
        return made

    def release(self) -> None:
        """Let the run have its buffers back."""
        self._arena.unpin(self._buffers)


def read_adapter(layout: AdapterLayout, content: files.Buffer, device: torch.device) -> Adapter:
    """Read an adapter's weights to sample with; raises as `RunState.restore` does."""
    arrays = _flat({files.ADAPTER: content}, files.ADAPTER, layout.shapes)
    tensors = {name: torch.from_numpy(array.copy()).to(device) for name, array in arrays.items()}
    return Adapter(layout, layout.weights(tensors))


def _flat(
    contents: Mapping[str, files.Buffer], name: str, shapes: files.Shapes
) -> dict[str, np.ndarray[Any, Any]]:
    if name not in contents:
        raise InputError(f"The checkpoint holds no {name}.")
    return _checked(files.read_safetensors(contents[name], name), shapes, name)


def _checked(
    tensors: dict[str, np.ndarray[Any, Any]], shapes: files.Shapes, what: str
) -> dict[str, np.ndarray[Any, Any]]:
    problems = [f"{name} is missing" for name in shapes if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in shapes]
    problems += [
        f"{name} has shape {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != tuple(shape)
    ]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ConfigMismatch(f"{what} does not fit this run: {'; '.join(problems[:5])}{more}.")
    return tensors


def _copy(
    arrays: Mapping[str, np.ndarray[Any, Any]], buffer: torch.Tensor, shapes: files.Shapes
) -> None:
    host = np.concatenate([arrays[name].ravel() for name in shapes])
    buffer.copy_(torch.from_numpy(host))


def _host(buffer: torch.Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = buffer.detach().cpu().numpy()
    return array
