"""Adapter files: a run's state as safetensors files, and PEFT's adapter_config.json.

The arena's layout is a legal layout of a safetensors file. Writing is therefore a header followed
by the buffer as it lies in memory, and reading is a map and one copy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from everstep.engine.errors import InputError
from everstep.safetensors_files import StoredTensor, TensorSpec, decode_header, encode_header

Buffer = bytes | bytearray | memoryview
Shapes = Mapping[str, tuple[int, ...]]
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
OPTIMIZER = "optimizer.safetensors"
GRADIENTS = "gradients.safetensors"
_LARGE, _PAGE = 1 << 20, 4096
"""The data of files that are larger than the first begin at a multiple of the second, so that they
can be written from where they lie in memory."""


@dataclass(frozen=True)
class Content:
    """A file's content. Each chunk is valid until the next one is asked for.

    Attributes:
        nbytes: the size of all chunks.
        parts: called for the chunks, one part of the file after the other.
    """

    nbytes: int
    parts: Sequence[Callable[[], Iterable[Buffer]]]

    def __iter__(self) -> Iterator[Buffer]:
        return chain.from_iterable(part() for part in self.parts)


def safetensors_content(
    shapes: Shapes, buffers: Sequence[Callable[[], Iterable[Buffer]]]
) -> Content:
    """Return the content of a file of float32 tensors, without copying them.

    Args:
        shapes: the tensors' names and shapes, in the order in which they lie in the buffers.
        buffers: called for the chunks of flat buffers.
    """
    specs = {name: TensorSpec("F32", tuple(shape)) for name, shape in shapes.items()}
    data = sum(spec.nbytes for spec in specs.values())
    header = encode_header(specs, _PAGE if data >= _LARGE else 8)
    size = len(header) + data
    return Content(size, [lambda: [header], *buffers])


def read_safetensors(data: Buffer, name: str) -> dict[str, np.ndarray[Any, Any]]:
    """Map a file's float32 tensors by name.

    Args:
        data: the file's content.
        name: the file's name, for errors.

    Raises:
        InputError: it is not a safetensors file of float32 tensors.
    """
    view = memoryview(data)
    try:
        return {key: _array(view, tensor) for key, tensor in decode_header(view).items()}
    except (ValueError, TypeError) as error:
        raise InputError(f"{name} is not a safetensors file of float32 tensors: {error}") from error


def _array(view: memoryview, tensor: StoredTensor) -> np.ndarray[Any, Any]:
    if tensor.spec.dtype != "F32":
        raise ValueError(f"dtype {tensor.spec.dtype} instead of F32")
    data = view[tensor.begin : tensor.end]
    return np.frombuffer(data, dtype="<f4").reshape(tensor.spec.shape)


def adapter_config(
    base_model: str,
    rank: int,
    alpha: float,
    targets: Mapping[str, Sequence[str]],
    fan_in_fan_out: bool,
) -> bytes:
    """Return PEFT's adapter_config.json.

    Args:
        base_model: name of the base model.
        rank: rank of all projections.
        alpha: the low-rank product is scaled by alpha / rank.
        targets: ``target_modules``, and ``target_parameters`` where there are any.
        fan_in_fan_out: whether the base's weights are [in, out].
    """
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        **{field: list(names) for field, names in targets.items()},
        "modules_to_save": None,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    return json.dumps(config, indent=2).encode()
