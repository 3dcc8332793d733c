"""Run state: adapter, moments, pending gradients and step, captured and restored exactly."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from everstep.engine import adapter_files as files
from everstep.engine.arena import Arena, Pinned
from everstep.engine.config import AdapterConfig
from everstep.engine.divergence import UNKNOWN, Magnitudes, diverged, is_finite
from everstep.engine.errors import ConfigMismatch, InputError
from everstep.engine.models.lora import BoundAdapter, LoraWeights
from everstep.engine.numerics import Numerics
from everstep.engine.transfer import fill, upload

_MOMENTS = ("exp_avg", "exp_avg_sq")
_WITHOUT_GRADIENTS = ("params", *_MOMENTS)
_ALL = ("params", "grads", *_MOMENTS)
_PREFIX = "base_model.model."
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class AdapterLayout:
    """Names and shapes of an adapter's tensors.

    Attributes:
        config: rank, alpha, seed and flags.
        widths: in and out features by module, in the model's order.
        peft_config: content of its adapter_config.json.
        in_files: names in files that differ from the module's, by module.
    """

    config: AdapterConfig
    widths: Mapping[str, tuple[int, int]]
    peft_config: bytes
    in_files: Mapping[str, str] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of A and B by PEFT's names, in the arena's order."""
        rank = self.config.rank
        shapes: dict[str, tuple[int, ...]] = {}
        for module, (width_in, width_out) in self.widths.items():
            a, b = self._names(module)
            shapes[a], shapes[b] = (rank, width_in), (width_out, rank)
        return shapes

    def weights(self, tensors: Mapping[str, torch.Tensor]) -> LoraWeights:
        """Group tensors, named as in `shapes`, into A and B by module."""
        pairs = {module: self._names(module) for module in self.widths}
        return {module: (tensors[a], tensors[b]) for module, (a, b) in pairs.items()}

    def as_named_here(self, tensors: Mapping[str, _Value]) -> dict[str, _Value]:
        """Return tensors of a file by the names in `shapes`.

        Earlier releases wrote every tensor under its module's own name.
        """
        own = {
            written: name
            for module, alias in self.in_files.items()
            for written, name in zip(_names(module), _names(alias), strict=True)
        }
        return {own.get(name, name): tensor for name, tensor in tensors.items()}

    def _names(self, module: str) -> tuple[str, str]:
        return _names(self.in_files.get(module, module))


def module_name(tensor: str) -> str:
    """Return the module of a tensor's name in a file."""
    return tensor.removeprefix(_PREFIX).rsplit(".lora_", 1)[0]


def _names(module: str) -> tuple[str, str]:
    """Return PEFT's names of a module's A and B."""
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter's frozen weights for sampling. Each is equal to itself alone.

    Attributes:
        layout: its layout.
        weights: A and B by module.
        tensors: the same tensors by PEFT's names.
    """

    layout: AdapterLayout
    weights: LoraWeights
    tensors: Mapping[str, torch.Tensor]

    def bind(self, rows: slice | None = None) -> BoundAdapter:
        """Bind the adapter to rows of a pass. None: to all of them."""
        return BoundAdapter(self.weights, self.layout.config.scale, rows)


class RunState:
    """State of one run.

    Args:
        layout: layout of the adapter.
        device: device of the buffers.
        initialise: whether the weights are drawn from the adapter's seed. If not, the state is
            undefined until it is restored.

    Attributes:
        layout: as given.
        arena: the buffers.
        step: number of optimizer steps so far.
        numerics: choices of its arithmetic.
        has_gradients: whether gradients are pending for the next step.
        has_moments: whether a moment may differ from zero.
        magnitudes: bounds of the weights and moments. They follow from the steps: whoever else
            writes to the buffers sets them to `divergence.UNKNOWN`.
    """

    def __init__(
        self, layout: AdapterLayout, device: torch.device, *, initialise: bool = True
    ) -> None:
        self.layout = layout
        self.arena = Arena(layout.shapes, device, zero=initialise)
        self.step = 0
        self.numerics = Numerics()
        self.has_gradients = False
        self.has_moments = not initialise
        if initialise:
            self._initialise()
        self.magnitudes = Magnitudes(1.0, 0.0, 0.0)

    def _initialise(self) -> None:
        """Draw A uniformly within ±1/sqrt(in), on the CPU from the seed. B stays zero."""
        generator = torch.Generator().manual_seed(_generator_seed(self.layout.config.seed))
        for name, tensor in self.arena.views("params").items():
            if name.endswith("lora_A.weight"):
                bound = 1 / math.sqrt(tensor.shape[1])
                values = torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator)
                tensor.copy_(values)

    @property
    def nbytes(self) -> int:
        """Size of all buffers in bytes."""
        return sum(buffer.nbytes for buffer in self.arena.buffers.values())

    def leaves(self) -> dict[str, torch.Tensor]:
        """Return the parameters as leaf tensors for autograd. They share the arena's memory."""
        return {
            name: view.detach().requires_grad_()
            for name, view in self.arena.views("params").items()
        }

    def measure(self) -> Magnitudes:
        """Measure the weights and moments, and keep the result as their bounds."""
        self.magnitudes = Magnitudes.measure(self.arena.buffers)
        return self.magnitudes

    def check_weights(self) -> None:
        """Raise `Diverged` if a weight is NaN or infinite."""
        if self.has_diverged():
            raise diverged(self.arena.views("params"))

    def has_diverged(self) -> bool:
        """Whether a weight is NaN or infinite. Measured only if the bounds are not finite."""
        known = math.isfinite(self.magnitudes.params)
        return not known and not math.isfinite(self.measure().params)

    def adapter_hash(self) -> str:
        """Return the SHA-256 of the parameters' bytes."""
        return hashlib.sha256(_host(self.arena.buffers["params"]).tobytes()).hexdigest()

    def capture(
        self, *, optimizer: bool, zero_moments: bool = True, diverged: bool | None = None
    ) -> Capture:
        """Capture the present state. Training may go on while the capture is written.

        Args:
            optimizer: whether to include moments and pending gradients.
            zero_moments: whether to include moments that are all zero. If not, ``meta`` says that
                they are.
            diverged: whether a weight is NaN or infinite, if that is known.
        """
        names = ["params"]
        left_out = optimizer and not zero_moments and not self.has_moments
        if optimizer:
            names += [] if left_out else _MOMENTS
            names += ["grads"] if self.has_gradients else []
        meta = {
            "step": self.step,
            "diverged": self.has_diverged() if diverged is None else diverged,
            "zero_moments": left_out,
        }
        return Capture(self.layout, self.arena.pin(*names), meta)

    def restore(
        self, contents: Mapping[str, files.Buffer], meta: Mapping[str, Any], *, optimizer: bool
    ) -> None:
        """Load a captured state. All files are checked first: an error changes nothing.

        Without the optimizer, the run then equals a fresh one that begins with these weights:
        moments are zero, the step is 0 and no gradients are pending.

        Args:
            contents: files by name, as `Capture.files` returned them.
            meta: ``step`` of the state, and ``zero_moments`` if it has no file of them.
            optimizer: whether to load moments, step and pending gradients.

        Raises:
            ConfigMismatch: a tensor is missing, unknown, or of another shape.
            InputError: a file is missing or malformed.
        """
        shapes = self.arena.shapes
        step = int(meta["step"]) if optimizer else 0
        loaded = {"params": _flat(contents, files.ADAPTER, self.layout)}
        if optimizer and not meta.get("zero_moments", False):
            if files.OPTIMIZER not in contents:
                raise ConfigMismatch("The checkpoint holds no optimizer state.")
            moments = files.read_safetensors(contents[files.OPTIMIZER], files.OPTIMIZER)
            for moment in _MOMENTS:
                own = {
                    k.removeprefix(f"{moment}."): v
                    for k, v in moments.items()
                    if k.startswith(f"{moment}.")
                }
                loaded[moment] = _checked(own, self.layout, f"{files.OPTIMIZER} ({moment})")
        if optimizer and files.GRADIENTS in contents:
            loaded["grads"] = _flat(contents, files.GRADIENTS, self.layout)
        kept = _ALL if "grads" in loaded else _WITHOUT_GRADIENTS
        for name, buffer in zip(kept, self.arena.writable(*kept), strict=True):
            if name in loaded:
                fill(buffer, [loaded[name][each] for each in shapes])
            else:
                buffer.zero_()
        self.has_gradients = "grads" in loaded
        if not self.has_gradients:
            self.arena.clear_gradients()
        self.has_moments = _MOMENTS[0] in loaded
        self.step = step
        self.magnitudes = UNKNOWN


def _generator_seed(seed: int) -> int:
    """Return a seed of 32 bits: torch's CPU generator ignores the bits above them."""
    if seed < 2**32:
        return seed
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "little")


class Capture:
    """A run's state at one instant. Call `release` when its files are written.

    Attributes:
        meta: ``step`` of the state, whether a weight is NaN or infinite (``diverged``), and whether
            the moments are zero and in no file (``zero_moments``).
    """

    def __init__(self, layout: AdapterLayout, pinned: Pinned, meta: dict[str, Any]) -> None:
        self.meta = meta
        self._layout = layout
        self._pinned = pinned

    def prepare(self) -> None:
        """Touch the spare memory that a step may need meanwhile. For the thread that writes."""
        self._pinned.prepare()

    def files(self, *, once: bool = False) -> dict[str, files.Content]:
        """Return the files by name. Their content is not copied.

        Args:
            once: whether each is read only once. Then training needs no spare memory for what is
                read already.
        """
        shapes, config = self._layout.shapes, self._layout.peft_config
        contents = {
            files.ADAPTER: files.safetensors_content(shapes, [self._reader("params", once)]),
            files.ADAPTER_CONFIG: files.Content(len(config), [lambda: [config]]),
        }
        if _MOMENTS[0] in self._pinned.names:
            contents[files.OPTIMIZER] = files.safetensors_content(
                {f"{moment}.{k}": v for moment in _MOMENTS for k, v in shapes.items()},
                [self._reader(moment, once) for moment in _MOMENTS],
            )
        if "grads" in self._pinned.names:
            contents[files.GRADIENTS] = files.safetensors_content(
                shapes, [self._reader("grads", once)]
            )
        return contents

    def _reader(self, name: str, once: bool) -> Callable[[], Iterator[memoryview]]:
        return partial(self._pinned.read, name, once=once)

    def release(self) -> None:
        """Unpin the run's buffers."""
        self._pinned.release()


def load_adapter_weights(
    layout: AdapterLayout, content: files.Buffer, device: torch.device
) -> Adapter:
    """Read an adapter's weights for sampling.

    Raises:
        ConfigMismatch, InputError: as `RunState.restore`.
        Diverged: a weight is NaN or infinite.
    """
    arrays = _flat({files.ADAPTER: content}, files.ADAPTER, layout)
    tensors = {name: upload(array, device) for name, array in arrays.items()}
    if not all(map(is_finite, tensors.values())):
        raise diverged(tensors)
    return Adapter(layout, layout.weights(tensors), tensors)


def _flat(
    contents: Mapping[str, files.Buffer], name: str, layout: AdapterLayout
) -> dict[str, np.ndarray[Any, Any]]:
    if name not in contents:
        raise InputError(f"The checkpoint holds no {name}.")
    return _checked(files.read_safetensors(contents[name], name), layout, name)


def _checked(
    found: dict[str, np.ndarray[Any, Any]], layout: AdapterLayout, file: str
) -> dict[str, np.ndarray[Any, Any]]:
    tensors, shapes = layout.as_named_here(found), layout.shapes
    problems = [f"{name} is missing" for name in shapes if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in shapes]
    problems += [
        f"{name} has shape {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != tuple(shape)
    ]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ConfigMismatch(f"{file} does not fit this run: {'; '.join(problems[:5])}{more}.")
    return tensors


def _host(buffer: torch.Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = buffer.detach().cpu().numpy()
    return array
