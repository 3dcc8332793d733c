"""Load checks: compare the engine's logits with transformers' when a model is loaded.

A family with unknown attention, or with other state than keys and values, would load and compute
wrong numbers. These checks refuse it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from everstep.engine.errors import ModelUnsupported
from everstep.engine.models.attention import (
    AttentionTrace,
    CachedRows,
    MaskFunction,
    decoding,
    trace_attention,
    trace_masks,
)
from everstep.engine.models.float32 import in_float32
from everstep.engine.models.info import ModelInfo
from everstep.engine.models.kv_cache import KvCache
from everstep.engine.models.model import Model
from everstep.engine.models.pretrained import LIBRARY_ERRORS, context_length, first_sentence

_TEXT = "The harbour was quiet that morning, and the boats lay still on the water."
_LENGTH = 8
"""Tokens of the text whose logits are compared."""
_CACHED = 5
"""Tokens of it that are computed together before the rest follows one by one."""
_WINDOWS = 3
"""Length, in sliding windows, of the sequences on which masks are compared."""
_TOLERANCE = 1e-3
"""Largest difference of float32 logits, relative to the largest logit."""
_HALF_ROUNDING = 0.02
"""The same for logits of half precision whose rounding alone is too small to measure."""


def probe_tokens(tokenizer: Any, info: ModelInfo) -> torch.Tensor:
    """Return the token ids [1, T] of a text that the model was trained to read.

    On untrained special tokens, attention in half precision can be chaotic: there two exact
    implementations differ as much as two models do.
    """
    ids = tokenizer(_TEXT, add_special_tokens=True)["input_ids"][:_LENGTH]
    if len(ids) < _LENGTH or max(ids) >= info.vocab_size:
        ids = list(range(1, _LENGTH + 1))
    return torch.tensor([ids], device=info.device)


def trace_logits(module: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Compute a short text's logits with a model as loaded, and check its attention.

    Raises:
        ModelUnsupported: the engine does not know its attention.
    """
    name = type(module).__name__
    try:
        with trace_attention() as trace:
            logits = _forward(module, tokens)
    except ModelUnsupported as error:
        raise ModelUnsupported(f"{name}: {error}") from error
    except LIBRARY_ERRORS as error:
        raise ModelUnsupported(
            f"{name} can't be run with the engine's attention, which makes no mask and keeps no "
            f"other state than keys and values ({first_sentence(error)})."
        ) from error
    _check_layers(name, module.config, trace)
    windows = set(trace.windows.values())
    known = all(_is_known(mask, {None, *windows}, module) for mask in trace.masks)
    if not known and not _uses_known_masks(trace, module, tokens):
        raise ModelUnsupported(
            f"{name} masks its attention in a way that the engine does not know: it is neither "
            "causal nor causal within a sliding window."
        )
    return logits


def check_model(model: Model, tokens: torch.Tensor, reference: torch.Tensor) -> None:
    """Raise `ModelUnsupported` unless the wrapped model gives the same logits.

    They are computed without the head, with a cache, and with transformers' own attention. With
    weights of half precision that is done in float32, where a difference is not rounding; in the
    model's own dtype, the engine may differ from transformers' attention as much as that differs
    from itself in float32.

    Args:
        model: the wrapped model.
        tokens: result of `probe_tokens`.
        reference: result of `trace_logits`.
    """
    name = model.info.architecture
    with torch.no_grad():
        try:
            pieces = model.logits(model.hidden(tokens))
        except LIBRARY_ERRORS as error:
            raise ModelUnsupported(
                f"{name} can't be run without its output head ({first_sentence(error)})."
            ) from error
        if not torch.equal(pieces, reference):
            raise ModelUnsupported(
                f"{name} computes its logits in a way that the engine does not know "
                f"(largest difference {float((pieces - reference).abs().max()):g})."
            )
        if model.module.dtype in (torch.float32, torch.float64):
            _compare(model, tokens, reference)
            return
        own = _eager_logits(model.module, tokens)
        with in_float32(model.module):
            exact = model.logits(model.hidden(tokens))
            _compare(model, tokens, exact)
            rounding = float((own - _eager_logits(model.module, tokens)).abs().max())
        allowed = max(2 * rounding, _HALF_ROUNDING * float(own.abs().max()))
        _check_close(name, reference, own, allowed, "with transformers' own attention")


def _compare(model: Model, tokens: torch.Tensor, reference: torch.Tensor) -> None:
    """Compare float32 logits with those of a cache and those of transformers' own attention."""
    name = model.info.architecture
    allowed = _TOLERANCE * float(reference.abs().max())
    cached = _cached_logits(model, tokens)
    _check_close(name, cached, reference, allowed, "with cached keys and values")
    eager = _eager_logits(model.module, tokens)
    _check_close(name, eager, reference, allowed, "with transformers' own attention")


def _forward(module: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = module(tokens, use_cache=False).logits
    return logits.float()


def _check_layers(name: str, config: Any, trace: AttentionTrace) -> None:
    layers = int(config.get_text_config().num_hidden_layers)
    if set(trace.windows) != set(range(layers)):
        raise ModelUnsupported(
            f"{name} has {layers} layers, and {len(trace.windows)} of them use the engine's "
            "attention. Layers with other state than keys and values are not supported."
        )


def _is_known(mask: MaskFunction, windows: Collection[int | None], module: Any) -> bool:
    """Whether a mask is causal within one of these windows. None: over all positions."""
    first = torch.tensor(0, device=module.device)
    longest = context_length(module.config)
    for window in windows:
        positions = _positions(window).to(module.device)
        positions = positions[positions < longest]
        query, key = positions.unsqueeze(1), positions.unsqueeze(0)
        expected = key <= query
        if window is not None:
            expected &= key > query - window
        try:
            found = mask(first, first, query, key)
        except IndexError:  # it reads the text that it was made for
            return False
        if torch.equal(found, expected):
            return True
    return False


def _uses_known_masks(trace: AttentionTrace, module: Any, tokens: torch.Tensor) -> bool:
    """Whether every layer is given a known mask. A model may make others that no layer uses."""
    try:
        with trace_masks() as used:
            _forward(module, tokens)
    except (ModelUnsupported, *LIBRARY_ERRORS):
        return False
    return used.keys() == trace.windows.keys() and all(
        _is_known(mask, {trace.windows[layer]}, module) for layer, mask in used.items()
    )


def _positions(window: int | None) -> torch.Tensor:
    """Return positions at which masks differ: the first ones, and those near a window's end."""
    near = torch.arange(2 * _LENGTH)
    if window is None:
        return torch.cat([near, 2 ** torch.arange(5, 18)])
    ends = [times * window + near - _LENGTH for times in range(1, _WINDOWS + 1)]
    return torch.cat([near, *ends]).clamp(min=0)


def _cached_logits(model: Model, tokens: torch.Tensor) -> torch.Tensor:
    """Compute the text's logits with a cache, its last tokens one at a time."""
    cache, logits = KvCache(), []
    length = tokens.shape[1]
    positions = torch.arange(length, device=model.device).unsqueeze(0)
    for begin, end in ((0, _CACHED), *((at, at + 1) for at in range(_CACHED, length))):
        with decoding([CachedRows(slice(0, 1), cache)]):
            hidden = model.hidden(tokens[:, begin:end], position_ids=positions[:, begin:end])
        logits.append(model.logits(hidden))
    return torch.cat(logits, 1)


def _eager_logits(module: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Compute the text's logits with transformers' eager attention."""
    implementation = module.config._attn_implementation
    module.set_attn_implementation("eager")
    try:
        return _forward(module, tokens)
    finally:
        module.set_attn_implementation(implementation)


def _check_close(
    name: str, logits: torch.Tensor, reference: torch.Tensor, allowed: float, how: str
) -> None:
    difference = float((logits - reference).abs().max())
    if not difference <= allowed:
        raise ModelUnsupported(
            f"{name} gives other logits {how} than the engine (largest difference {difference:g}, "
            f"allowed {allowed:g})."
        )
