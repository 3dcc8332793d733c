"""Decoder checks: choose a model's decoder when it is loaded.

The direct decoder is faster, and served only where its logits are those of the modules to the bit,
at the beginning and at the end of the context. With an adapter, whose products it stacks, they may
differ by rounding. Rows are padded to less only where that keeps their bits, too.
"""

from __future__ import annotations

import numpy as np
import torch

from everstep.engine.config import AdapterConfig
from everstep.engine.models.attention import CachedRows, trace_attention
from everstep.engine.models.decoder import Decoder, ModuleDecoder
from everstep.engine.models.direct_decoder import DirectDecoder
from everstep.engine.models.frozen_product import ROW_MULTIPLE, check_rows
from everstep.engine.models.kv_cache import KvCache
from everstep.engine.models.lora import LoraProjection
from everstep.engine.models.model import Model
from everstep.engine.run_state import Adapter

_RANK = 4
_STEPS = 3
"""Tokens that are decoded one after another."""
_SEED = 5
_TOLERANCE = 1e-5
"""Largest difference of float32 logits with an adapter, relative to the largest logit."""
_HALF_ROUNDING = 0.02
"""The same for logits of half precision."""


@torch.no_grad()
def choose_decoder(model: Model) -> Decoder:
    """Return the direct decoder where it computes what the modules compute, or the modules'."""
    modules = ModuleDecoder(model)
    multiple = _check_products(model)
    if not model.is_llama_like:
        return modules
    adapter = _random_adapter(model)
    with trace_attention() as trace:
        expected = _decode(model, modules, ROW_MULTIPLE, None)
    try:
        direct = DirectDecoder(model, trace.settings)
    except (AttributeError, TypeError):
        return modules
    found = _decode(model, direct, ROW_MULTIPLE, None)
    if not torch.equal(found, expected):
        return modules
    adapted = _decode(model, modules, ROW_MULTIPLE, adapter)
    difference = (_decode(model, direct, ROW_MULTIPLE, adapter) - adapted).abs().max()
    if not difference <= _tolerance(model) * adapted.abs().max():
        return modules
    few = _decode(model, direct, multiple, None)
    direct.serve(multiple if torch.equal(few, found[:, :multiple]) else ROW_MULTIPLE)
    return direct


def _check_products(model: Model) -> int:
    """Return the multiple of rows at which projections keep each row's bits. See `check_rows`."""
    if model.device.type != "cpu":
        return ROW_MULTIPLE
    projections = [each for each in model.module.modules() if isinstance(each, LoraProjection)]
    products = [each.product for each in projections if each.product is not None]
    return check_rows(products)


def _tolerance(model: Model) -> float:
    exact = model.module.dtype in (torch.float32, torch.float64)
    return _TOLERANCE if exact else _HALF_ROUNDING


def _decode(model: Model, decoder: Decoder, rows: int, adapter: Adapter | None) -> torch.Tensor:
    """Decode a few tokens a row, the last one at the end of the context.

    Returns:
        The logits, [steps, rows, V].
    """
    vocabulary, last = model.info.vocab_size, model.info.max_context_length - 1
    tokens = np.random.default_rng(_SEED).integers(0, vocabulary, (_STEPS, ROW_MULTIPLE))
    cached = [CachedRows(slice(0, rows), KvCache())]
    results = []
    for step, position in enumerate((*range(_STEPS - 1), last)):
        positions = np.full(rows, position, dtype=np.int64)
        adapters = [(adapter, slice(0, rows))]
        results.append(decoder.logits(tokens[step, :rows], positions, cached, adapters))
    return torch.stack(results)


def _random_adapter(model: Model) -> Adapter:
    """Create an adapter of all projections that changes every logit."""
    layout = model.layout(AdapterConfig(_RANK))
    generator = torch.Generator().manual_seed(_SEED)
    tensors = {
        name: torch.randn(shape, generator=generator).mul_(0.02).to(model.device)
        for name, shape in layout.shapes.items()
    }
    return Adapter(layout, layout.weights(tensors), tensors)
