"""Attention, for training and for decoding, registered with transformers under one name.

In training it is causal over rows that are padded on the right, so no mask is ever made. In
decoding every request has a key-value cache of its own and attends over it alone: shapes depend
on the request, never on what it shares the pass with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from everstep.engine.errors import ModelUnsupported

NAME = "everstep"
_FIRST_CAPACITY = 64


Layers = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Keys and values by layer, [n, heads, length, width] each."""


class KvCache:
    """Keys and values of one request."""

    def __init__(self) -> None:
        self._layers: Layers = {}
        self._lengths: dict[int, int] = {}

    def append(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add positions to a layer; returns all keys and values of it."""
        begin = self._lengths.get(layer, 0)
        end = begin + key.shape[2]
        if layer not in self._layers or self._layers[layer][0].shape[2] < end:
            self._grow(layer, key, value, end)
        keys, values = self._layers[layer]
        keys[:, :, begin:end] = key
        values[:, :, begin:end] = value
        self._lengths[layer] = end
        return keys[:, :, :end], values[:, :, :end]

    def part(self, begin: int, end: int) -> Layers:
        """A copy of what some positions have."""
        return {
            layer: (keys[:, :, begin:end].clone(), values[:, :, begin:end].clone())
            for layer, (keys, values) in self._layers.items()
        }

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may be taken several times."""
        self._layers = {layer: (k[rows], v[rows]) for layer, (k, v) in self._layers.items()}

    def _grow(self, layer: int, key: torch.Tensor, value: torch.Tensor, end: int) -> None:
        capacity = _FIRST_CAPACITY
        while capacity < end:
            capacity *= 2
        grown = []
        for index, new in enumerate((key, value)):
            buffer = new.new_zeros(*new.shape[:2], capacity, new.shape[3])
            if layer in self._layers:
                old = self._layers[layer][index]
                buffer[:, :, : old.shape[2]] = old
            grown.append(buffer)
        self._layers[layer] = (grown[0], grown[1])


@dataclass(frozen=True)
class Group:
    """Rows of a decoding pass that belong to one request, and its cache."""

    rows: slice
    cache: KvCache


@dataclass
class Seen:
    """What a model asked of the attention while it was watched.

    Attributes:
        masks: the mask functions: of batch, head, query's and key's position.
        windows: sliding windows by layer; None: all of the context.
    """

    masks: list[Callable[..., torch.Tensor]] = field(default_factory=list)
    windows: dict[int, int | None] = field(default_factory=dict)


class _Pass:
    """The pass that runs now: its groups, None in training, and who watches."""

    groups: Sequence[Group] | None = None
    seen: Seen | None = None


@contextmanager
def decoding(groups: Sequence[Group]) -> Iterator[None]:
    """Attend to the groups' caches, and add to them, for the time of a pass."""
    _Pass.groups = groups
    try:
        yield
    finally:
        _Pass.groups = None


@contextmanager
def watching() -> Iterator[Seen]:
    """Note what a model asks of the attention, for the time of a pass."""
    _Pass.seen = Seen()
    try:
        yield _Pass.seen
    finally:
        _Pass.seen = None


def register() -> None:
    """Make the attention known to transformers; may be called again."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _no_mask)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention; query [B, heads, T, width] → output [B, T, heads, width].

    Raises:
        ModelUnsupported: the family attends with something that isn't known here.
    """
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise ModelUnsupported("Attention sinks and position biases are not supported.")
    if attention_mask is not None or kwargs.get("is_causal") is False:
        raise ModelUnsupported("Attention that is not simply causal is not supported.")
    if _Pass.seen is not None:
        _Pass.seen.windows[int(module.layer_idx)] = sliding_window  # type: ignore[arg-type]
    settings = _Settings(scaling, sliding_window, softcap)
    if _Pass.groups is None:
        output = _causal(query, key, value, settings)
    else:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        output = query.new_zeros(*query.shape[:3], value.shape[3])
        for group in _Pass.groups:
            keys, values = group.cache.append(layer, key[group.rows], value[group.rows])
            output[group.rows] = _causal(query[group.rows], keys, values, settings)
    return output.transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class _Settings:
    scale: float | None
    window: int | None
    softcap: float | None


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, settings: _Settings
) -> torch.Tensor:
    """The last T of L positions attend to themselves and to what lies before them."""
    length, total = query.shape[2], key.shape[2]
    if length == 1 and settings.window is not None and total > settings.window:
        key, value = key[:, :, -settings.window :], value[:, :, -settings.window :]
        total = settings.window
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    windowed = settings.window is not None and total > settings.window
    if settings.softcap is not None:
        return _capped(query, key, value, _mask(length, total, settings, query.device), settings)
    if windowed or 1 < length < total:
        mask = _mask(length, total, settings, query.device)
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=settings.scale
        )
    return functional.scaled_dot_product_attention(
        query, key, value, is_causal=length > 1, scale=settings.scale
    )


def _mask(length: int, total: int, settings: _Settings, device: torch.device) -> torch.Tensor:
    """Which of L positions each of the last T may see."""
    own = torch.arange(total - length, total, device=device).unsqueeze(1)
    other = torch.arange(total, device=device).unsqueeze(0)
    seen = other <= own
    return seen if settings.window is None else seen & (other > own - settings.window)


def _capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    settings: _Settings,
) -> torch.Tensor:
    """Attention whose scores are bent to ±softcap, as Gemma 2 has it."""
    scale = settings.scale if settings.scale is not None else query.shape[-1] ** -0.5
    cap = settings.softcap or 1.0
    scores = torch.tanh(query @ key.transpose(2, 3) * scale / cap) * cap
    weights = scores.masked_fill(~mask, float("-inf")).float().softmax(dim=-1)
    return weights.to(value.dtype) @ value


def _no_mask(*args: Any, mask_function: Callable[..., torch.Tensor], **kwargs: Any) -> None:
    """Make none; `attend` is causal by itself, and `probe` checks that nothing else is meant."""
    if _Pass.seen is not None:
        _Pass.seen.masks.append(mask_function)
