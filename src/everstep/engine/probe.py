"""What is checked of a model when it is loaded: that the engine computes what transformers does.

A family that attends in a way the engine doesn't know, or that keeps another state than keys and
values, would load and give wrong numbers; here it is refused instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from everstep.engine.attention import Group, KvCache, Seen, decoding, watching
from everstep.engine.errors import ModelUnsupported

if TYPE_CHECKING:
    from everstep.engine.model import Model

_LENGTH = 8
_CACHED = 5
_FAR = 3
"""How many windows long the sequences are on which masks are compared."""
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_TOLERANCE = 0.1


def watched_logits(module: Any) -> torch.Tensor:
    """A short text's logits by the model as it was loaded; its attention is checked on the way.

    Raises:
        ModelUnsupported: it attends in a way that the engine doesn't know.
    """
    name = type(module).__name__
    try:
        with watching() as seen:
            logits = _forward(module)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, ModelUnsupported):
            raise ModelUnsupported(f"{name}: {error}") from error
        raise ModelUnsupported(
            f"{name} can't be run with the engine's attention: {error}"
        ) from error
    _check_layers(name, module.config, seen)
    for mask in seen.masks:
        _check_mask(name, mask, seen, module.device)
    return logits


def check(model: Model, whole: torch.Tensor) -> None:
    """Raise `ModelUnsupported` unless the wrapped model, in pieces and cached, gives the same.

    Args:
        model: the wrapped model.
        whole: what `watched_logits` gave.
    """
    name = model.info.architecture
    with torch.no_grad():
        try:
            pieces = model.logits(model.hidden(_probe(model.device)))
        except (AttributeError, TypeError) as error:
            raise ModelUnsupported(
                f"{name} can't be run without its output head: {error}"
            ) from error
        if not torch.equal(pieces, whole):
            raise ModelUnsupported(
                f"{name} computes its logits in a way that the engine doesn't know "
                f"(largest difference {float((pieces - whole).abs().max()):g})."
            )
        _check_near(model, _cached_logits(model), whole, "with cached keys and values")
        _check_near(model, _eager_logits(model.module), whole, "with transformers' own attention")


def _probe(device: torch.device) -> torch.Tensor:
    return torch.arange(1, _LENGTH + 1, device=device).unsqueeze(0)


def _forward(module: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = module(_probe(module.device), use_cache=False).logits
    return logits.float()


def _check_layers(name: str, config: Any, seen: Seen) -> None:
    layers = int(config.get_text_config().num_hidden_layers)
    if set(seen.windows) != set(range(layers)):
        raise ModelUnsupported(
            f"{name} has {layers} layers, {len(seen.windows)} of which use the engine's attention; "
            "layers that keep another state than keys and values are not supported."
        )


def _check_mask(
    name: str, mask: Callable[..., torch.Tensor], seen: Seen, device: torch.device
) -> None:
    """A mask has to be causal, over everything or over the window that some layer asks for."""
    first = torch.tensor(0, device=device)
    for window in {None, *seen.windows.values()}:
        positions = _positions(window).to(device)
        query, key = positions.unsqueeze(1), positions.unsqueeze(0)
        expected = key <= query
        if window is not None:
            expected &= key > query - window
        if torch.equal(mask(first, first, query, key), expected):
            return
    raise ModelUnsupported(
        f"{name} masks its attention in a way that the engine doesn't know: it is neither causal "
        "nor causal within a sliding window."
    )


def _positions(window: int | None) -> torch.Tensor:
    """Positions on which masks differ if they do: the first, and those near a window's end."""
    near = torch.arange(2 * _LENGTH)
    if window is None:
        return torch.cat([near, 2 ** torch.arange(5, 18)])
    ends = [times * window + near - _LENGTH for times in range(1, _FAR + 1)]
    return torch.cat([near, *ends]).clamp(min=0)


def _cached_logits(model: Model) -> torch.Tensor:
    """The short text's logits, its end computed a token at a time."""
    tokens, cache, logits = _probe(model.device), KvCache(), []
    positions = torch.arange(_LENGTH, device=model.device).unsqueeze(0)
    for begin, end in ((0, _CACHED), *((at, at + 1) for at in range(_CACHED, _LENGTH))):
        with decoding([Group(slice(0, 1), cache)]):
            hidden = model.hidden(tokens[:, begin:end], position_ids=positions[:, begin:end])
        logits.append(model.logits(hidden))
    return torch.cat(logits, 1)


def _eager_logits(module: Any) -> torch.Tensor:
    """The short text's logits by transformers' plainest attention."""
    ours = module.config._attn_implementation
    module.set_attn_implementation("eager")
    try:
        return _forward(module)
    finally:
        module.set_attn_implementation(ours)


def _check_near(model: Model, found: torch.Tensor, whole: torch.Tensor, how: str) -> None:
    tolerance = _TOLERANCE.get(model.module.dtype, _HALF_TOLERANCE)
    difference = float((found - whole).abs().max())
    if not difference <= tolerance * float(whole.abs().max()):
        raise ModelUnsupported(
            f"{model.info.architecture} gives other logits {how} than the engine computes "
            f"(largest difference {difference:g})."
        )
