"""Key-value cache: the keys and values of one request's sequences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from everstep.engine.transfer import upload

_INITIAL_CAPACITY = 64
_MIN_SHARED_BYTES = 4 << 20
"""Size of a layer's copies of a prompt from which its sequences read the one that they share."""

KeysValues = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, [n, heads, length, width] each."""
LayerCache = dict[int, KeysValues]
"""Keys and values by layer."""


class KvCache:
    """Keys and values of one request.

    On a CPU those of half precision are held in float32, which represents them exactly: there the
    products of a lone query are several times faster in float32 than in half precision.
    """

    def __init__(self) -> None:
        self._layers: LayerCache = {}
        self._lengths: dict[int, int] = {}
        self._prompts: LayerCache = {}
        self._dtype: torch.dtype | None = None

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> KeysValues:
        """Append positions to a layer. Returns all of its keys and values but a shared prompt's."""
        begin = self._lengths.get(layer, 0)
        end = begin + key.shape[2]
        self._dtype = key.dtype
        if layer not in self._layers or self._layers[layer][0].shape[2] < end:
            self._grow(layer, key, value, end)
        keys, values = self._layers[layer]
        keys[:, :, begin:end] = key
        values[:, :, begin:end] = value
        self._lengths[layer] = end
        return keys[:, :, :end], values[:, :, :end]

    def copy_positions(self, begin: int, end: int) -> LayerCache:
        """Copy the keys and values of a range of positions, in the dtype of the model."""
        return {
            layer: (
                keys[:, :, begin:end].to(self._dtype, copy=True),
                values[:, :, begin:end].to(self._dtype, copy=True),
            )
            for layer, (keys, values) in self._layers.items()
        }

    def branch(self, rows: int) -> None:
        """Go on with this many sequences after the prompt, which is the cache's only row by now.

        A layer's prompt is copied for each of them if it is small, and shared by them otherwise.
        """
        if rows == 1:
            return
        for layer, both in self._layers.items():
            length = self._lengths[layer]
            prompt = both[0][:, :, :length], both[1][:, :, :length]
            if rows * (prompt[0].nbytes + prompt[1].nbytes) >= _MIN_SHARED_BYTES:
                self._prompts[layer] = prompt
            else:
                self._layers[layer] = _copies(both, rows)
        for layer in self._prompts:
            del self._layers[layer], self._lengths[layer]

    def prompt(self, layer: int) -> KeysValues | None:
        """Return the keys and values [1, heads, length, width] that all rows of a layer share."""
        return self._prompts.get(layer)

    def unshare(self, layer: int, rows: int) -> None:
        """Copy a layer's shared prompt for each row, to which nothing has been appended yet."""
        prompt = self._prompts.pop(layer)
        self._layers[layer] = _copies(prompt, rows)
        self._lengths[layer] = prompt[0].shape[2]

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows."""
        index: torch.Tensor | None = None
        for layer, (keys, values) in self._layers.items():
            if index is None:
                index = upload(np.array(rows, dtype=np.int64), keys.device)
            kept = keys.index_select(0, index), values.index_select(0, index)
            self._layers[layer] = kept

    def _grow(self, layer: int, key: torch.Tensor, value: torch.Tensor, end: int) -> None:
        capacity = _INITIAL_CAPACITY
        while capacity < end:
            capacity *= 2
        grown = []
        for index, new in enumerate((key, value)):
            buffer = new.new_empty(*new.shape[:2], capacity, new.shape[3], dtype=_held_dtype(new))
            if layer in self._layers:
                length = self._lengths[layer]
                buffer[:, :, :length] = self._layers[layer][index][:, :, :length]
            grown.append(buffer)
        self._layers[layer] = (grown[0], grown[1])


def _held_dtype(new: torch.Tensor) -> torch.dtype:
    half = new.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and new.device.type == "cpu" else new.dtype


def _copies(both: KeysValues, rows: int) -> KeysValues:
    keys, values = (each.expand(rows, -1, -1, -1).contiguous() for each in both)
    return keys, values
