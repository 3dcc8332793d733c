"""A run's state as files: safetensors headers over flat buffers, and PEFT's adapter_config.json.

safetensors is ``<header length: u64><header: JSON><bytes>`` with tensors at stated offsets
(https://github.com/huggingface/safetensors#format). The arena's layout is a legal one, so that a
file is a header and the buffer as it lies in memory, and reading is a map and one copy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from everstep.engine.errors import InputError

Buffer = bytes | bytearray | memoryview
Shapes = Mapping[str, tuple[int, ...]]
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
OPTIMIZER = "optimizer.safetensors"
GRADIENTS = "gradients.safetensors"
_ALIGNMENT = 8


@dataclass(frozen=True)
class Section:
    """Float32 tensors that lie one behind the other in a flat buffer.

    Attributes:
        shapes: the tensors' names and shapes, in the buffer's order.
        buffer: float32, flat.
    """

    shapes: Shapes
    buffer: np.ndarray[Any, Any]


def safetensors_file(sections: Sequence[Section]) -> list[Buffer]:
    """Return the chunks of a file that holds sections, without copying them."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for section in sections:
        for name, shape in section.shapes.items():
            end = offset + 4 * int(np.prod(shape))
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    chunks: list[Buffer] = [len(encoded).to_bytes(8, "little") + encoded]
    chunks += [section.buffer.data.cast("B") for section in sections]
    return chunks


def read_safetensors(data: Buffer, what: str) -> dict[str, np.ndarray[Any, Any]]:
    """Map a file's float32 tensors by name.

    Raises:
        InputError: it is not such a file.
    """
    view = memoryview(data)
    try:
        size = int.from_bytes(view[:8], "little")
        header = json.loads(bytes(view[8 : 8 + size]))
        header.pop("__metadata__", None)
        body = view[8 + size :]
        return {name: _tensor(body, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{what} is not a safetensors file of float32 tensors: {error}") from error


def _tensor(body: memoryview, entry: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    if entry["dtype"] != "F32":
        raise ValueError(f"dtype {entry['dtype']} instead of F32")
    begin, end = entry["data_offsets"]
    return np.frombuffer(body[begin:end], dtype="<f4").reshape(entry["shape"])


def adapter_config(
    base_model: str, rank: int, alpha: float, target_modules: Sequence[str], fan_in_fan_out: bool
) -> bytes:
    """Return PEFT's adapter_config.json."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "target_modules": list(target_modules),
        "modules_to_save": None,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    return json.dumps(config, indent=2).encode()
