"""Attention for training and decoding, registered with transformers.

In training, texts are packed into one row, and each attends to itself alone. In decoding, each
request attends over its own key-value cache alone: shapes depend on the request and never on the
others in its pass. A lone query reads each key and value once: the heads that share them are
queries of one product, and so are the sequences that share a prompt.
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

from everstep.engine.alignment import aligned
from everstep.engine.errors import ModelUnsupported
from everstep.engine.kernels.packing import Packing, TextGroup
from everstep.engine.kernels.short_attention import MAX_LENGTHS, ShortAttention
from everstep.engine.models.kv_cache import KeysValues, KvCache

NAME = "everstep"
"""The attention's name in transformers, with masks that load checks can look at."""
UNMASKED = "everstep_unmasked"
"""The same without masks: transformers makes none for a name that has none. It would look into the
positions for packed texts, and on a GPU the host would wait for them in every pass."""

MaskFunction = Callable[..., torch.Tensor]
"""Whether a query may see a key: of batch, head, query position and key position."""


@dataclass(frozen=True)
class CachedRows:
    """Rows of a decoding pass that belong to one request, with its cache."""

    rows: slice
    cache: KvCache


@dataclass(frozen=True)
class AttentionSettings:
    """Settings of a layer's attention.

    Attributes:
        scale: factor of the scores. None: by the heads' width.
        window: positions that a query sees, its own among them. None: all before it.
        softcap: bound of the scores. None: they are not capped.
    """

    scale: float | None
    window: int | None
    softcap: float | None


@dataclass
class AttentionTrace:
    """Masks and windows that a model requested during a traced pass.

    Attributes:
        masks: the masks that the model made, whether or not a layer uses them.
        windows: sliding windows by layer. None: the whole context.
        settings: what the model passed to the attention, by layer.
    """

    masks: list[MaskFunction] = field(default_factory=list)
    windows: dict[int, int | None] = field(default_factory=dict)
    settings: dict[int, AttentionSettings] = field(default_factory=dict)


@dataclass
class _MaskTrace:
    """Masks that were made, by their place in memory, and those that layers were given."""

    made: dict[int, tuple[torch.Tensor, MaskFunction]] = field(default_factory=dict)
    used: dict[int, MaskFunction] = field(default_factory=dict)


class _Pass:
    """State of the running pass: cached rows (decoding), packed texts (training), traces."""

    cached_rows: Sequence[CachedRows] | None = None
    packing: Packing | None = None
    trace: AttentionTrace | None = None
    masks: _MaskTrace | None = None


@contextmanager
def decoding(cached_rows: Sequence[CachedRows]) -> Iterator[None]:
    """Attend over the requests' caches, and append to them, for the duration of a pass."""
    _Pass.cached_rows = cached_rows
    try:
        yield
    finally:
        _Pass.cached_rows = None


def is_decoding() -> bool:
    """Whether the running pass attends over caches."""
    return _Pass.cached_rows is not None


@contextmanager
def packed(packing: Packing) -> Iterator[None]:
    """Let each of the texts that are packed into a pass's one row attend to itself alone."""
    _Pass.packing = packing
    try:
        yield
    finally:
        _Pass.packing = None


@contextmanager
def trace_attention() -> Iterator[AttentionTrace]:
    """Record a model's requests to the attention for the duration of a pass."""
    _Pass.trace = AttentionTrace()
    try:
        yield _Pass.trace
    finally:
        _Pass.trace = None


@contextmanager
def trace_masks() -> Iterator[dict[int, MaskFunction]]:
    """Record which mask each layer is given, for the duration of a pass that ignores them.

    Layers that alter their mask, or are given none, are left out.
    """
    _Pass.masks = _MaskTrace()
    try:
        yield _Pass.masks.used
    finally:
        _Pass.masks = None


def register() -> None:
    """Register the attention with transformers. Repeated calls are harmless."""
    AttentionInterface.register(NAME, attend)
    AttentionInterface.register(UNMASKED, attend)
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
    """Compute causal attention: query [B, heads, T, width] → output [B, T, heads, width].

    Raises:
        ModelUnsupported: the family's attention has an unknown feature.
    """
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise ModelUnsupported("Attention sinks and position biases are not supported.")
    if _Pass.masks is not None and attention_mask is not None:
        _, function = _Pass.masks.made[attention_mask.untyped_storage().data_ptr()]
        _Pass.masks.used[int(module.layer_idx)] = function  # type: ignore[arg-type]
        attention_mask = None
    if attention_mask is not None or kwargs.get("is_causal") is False:
        raise ModelUnsupported("Attention that is not simply causal is not supported.")
    settings = AttentionSettings(scaling, sliding_window, softcap)
    if _Pass.trace is not None:
        _Pass.trace.windows[int(module.layer_idx)] = sliding_window  # type: ignore[arg-type]
        _Pass.trace.settings[int(module.layer_idx)] = settings  # type: ignore[arg-type]
    if _Pass.packing is not None:
        return attend_packed(query, key, value, settings, _Pass.packing.groups), None
    if _Pass.cached_rows is None:
        output = _causal(query, key, value, settings).transpose(1, 2).contiguous()
    else:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        output = attend_cached(layer, query, key, value, _Pass.cached_rows, settings)
    return output, None


def attend_cached(
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cached_rows: Sequence[CachedRows],
    settings: AttentionSettings,
) -> torch.Tensor:
    """Append to the requests' caches, and let each request attend over its own alone.

    Args:
        layer: number of the layer.
        query: [B, heads, T, width].
        key: [B, key heads, T, width].
        value: [B, key heads, T, value width].
        cached_rows: the requests' rows and caches. Rows of none are zero in the output.
        settings: the layer's settings.

    Returns:
        [B, T, heads, value width], contiguous.
    """
    output = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    for cached in cached_rows:
        rows = cached.rows
        own = aligned(query[rows])
        prompt = cached.cache.prompt(layer)
        if prompt is not None and not _can_merge(own, prompt, settings):
            cached.cache.unshare(layer, len(own))
            prompt = None
        keys, values = cached.cache.append(layer, key[rows], value[rows])
        if prompt is None:
            attended = _causal(own, keys, values, settings)
        else:
            attended = _after_prompt(own, prompt, (keys, values), settings)
        output[rows] = attended.transpose(1, 2)
    return output


def _can_merge(query: torch.Tensor, prompt: KeysValues, settings: AttentionSettings) -> bool:
    """Whether attention over a shared prompt and over the rest can be merged by `_after_prompt`."""
    keys, values = prompt
    return (
        query.device.type == "cpu"
        and query.shape[2] == 1
        and settings.softcap is None
        and keys.shape[3] == values.shape[3]
        and keys.dtype in (torch.float32, torch.float64)
    )


def _after_prompt(
    query: torch.Tensor, prompt: KeysValues, own: KeysValues, settings: AttentionSettings
) -> torch.Tensor:
    """Let the last position of each row attend to a prompt that all rows share, and to its own.

    Both are computed alone, and weighted by the sums of their scores' exponentials. The prompt is
    read once for all rows.
    """
    if settings.window is not None:
        seen = settings.window - own[0].shape[2]
        if seen <= 0:
            return _causal(query, *own, settings)
        prompt = prompt[0][:, :, -seen:], prompt[1][:, :, -seen:]
    rows, heads, _, width = query.shape
    groups = prompt[0].shape[1]
    queries = query.view(rows, groups, heads // groups, width).to(prompt[0].dtype)
    by_group = queries.transpose(0, 1)
    first, first_sums = _flash(by_group.reshape(1, groups, -1, width), *prompt, settings)
    rest, rest_sums = _flash(queries, *own, settings)
    share = torch.sigmoid(first_sums.view(by_group.shape[:3]).transpose(0, 1) - rest_sums)
    merged = torch.lerp(rest, first.view(by_group.shape).transpose(0, 1), share.unsqueeze(-1))
    return merged.reshape(rows, heads, 1, width)


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, settings: AttentionSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention to all positions, and the logarithms of the exponentials' sums."""
    output, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
        query, key, value, scale=settings.scale
    )
    return output, sums


def attend_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    settings: AttentionSettings,
    groups: Sequence[TextGroup],
) -> torch.Tensor:
    """Let packed texts attend to themselves: [1, heads, N, width] → [1, N, heads, width]."""
    sizes = [group.size for group in groups]
    parts = (torch.split(each[0], sizes, dim=1) for each in (query, key, value))
    outputs = [
        group.flat(_whole_texts(group.grid(q), group.grid(k), group.grid(v), settings))
        for group, q, k, v in zip(groups, *parts, strict=True)
    ]
    return torch.cat(outputs).unsqueeze(0)


def _whole_texts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, settings: AttentionSettings
) -> torch.Tensor:
    """Let texts of one length attend to themselves."""
    length = query.shape[2]
    windowed = settings.window is not None and length > settings.window
    short = query.device.type == "cpu" and length <= MAX_LENGTHS.get(query.dtype, 0)
    if not short or windowed or settings.softcap is not None:
        return _causal(query, key, value, settings)
    scale = settings.scale if settings.scale is not None else query.shape[-1] ** -0.5
    output: torch.Tensor = ShortAttention.apply(query, key, value, scale)  # type: ignore[no-untyped-call]
    return output


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, settings: AttentionSettings
) -> torch.Tensor:
    """Let the last T of L positions attend to themselves and to all positions before them."""
    length, total = query.shape[2], key.shape[2]
    if length == 1 and settings.window is not None and total > settings.window:
        key, value = key[:, :, -settings.window :], value[:, :, -settings.window :]
        total = settings.window
    if length == 1 < total and settings.softcap is None and query.device.type == "cpu":
        return _lone(query, key, value, settings)
    key, value = key.to(query.dtype), value.to(query.dtype)
    windowed = settings.window is not None and total > settings.window
    repeats = query.shape[1] // key.shape[1]
    whole = length == total and not windowed and settings.softcap is None
    shares = whole and query.device.type == "cpu"  # elsewhere, not every kernel can
    if repeats > 1 and not shares:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if settings.softcap is not None:
        return _softcapped(
            query, key, value, _mask(length, total, settings, query.device), settings
        )
    if windowed or 1 < length < total:
        mask = _mask(length, total, settings, query.device)
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=settings.scale
        )
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        is_causal=length > 1,
        scale=settings.scale,
        enable_gqa=repeats > 1 and shares,
    )


def _lone(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, settings: AttentionSettings
) -> torch.Tensor:
    """Let the last position attend to all, in the dtype of the keys.

    The heads that share keys are computed as if they were positions, so that each key is read once.
    """
    rows, heads, _, width = query.shape
    shared = query.view(rows, key.shape[1], heads // key.shape[1], width).to(key.dtype)
    attended = functional.scaled_dot_product_attention(shared, key, value, scale=settings.scale)
    return attended.reshape(rows, heads, 1, -1)


def _mask(
    length: int, total: int, settings: AttentionSettings, device: torch.device
) -> torch.Tensor:
    """Return which of L positions each of the last T may attend to."""
    own = torch.arange(total - length, total, device=device).unsqueeze(1)
    other = torch.arange(total, device=device).unsqueeze(0)
    visible = other <= own
    return visible if settings.window is None else visible & (other > own - settings.window)


def _softcapped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    settings: AttentionSettings,
) -> torch.Tensor:
    """Compute attention with scores capped smoothly at ±softcap, as in Gemma 2."""
    scale = settings.scale if settings.scale is not None else query.shape[-1] ** -0.5
    cap = settings.softcap or 1.0
    scores = torch.tanh(query @ key.transpose(2, 3) * scale / cap) * cap
    weights = scores.masked_fill(~mask, float("-inf")).float().softmax(dim=-1)
    return weights.to(value.dtype) @ value


def _no_mask(
    *args: Any, mask_function: MaskFunction, kv_length: int = 0, **kwargs: Any
) -> torch.Tensor | None:
    """Create no mask: `attend` is causal, and `load_checks` verifies that models are."""
    if _Pass.trace is not None:
        _Pass.trace.masks.append(mask_function)
    if _Pass.masks is None:
        return None
    mask = torch.ones(1, 1, kv_length, kv_length, dtype=torch.bool, device=kwargs.get("device"))
    _Pass.masks.made[mask.untyped_storage().data_ptr()] = mask, mask_function
    return mask
