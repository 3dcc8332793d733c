"""Direct decoder: decodes Llama-like models without the modules of transformers.

For a small model, or for few rows, the modules cost more than the arithmetic. Here the layers are
called directly: stacked projections, rotary factors from a table, one adapter product a group of
projections. The operations and their order are those of the modules. `decoder_checks` compares
both when a model is loaded, to the bit, and models for which they differ keep the modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from everstep.engine.alignment import aligned
from everstep.engine.models.attention import AttentionSettings, CachedRows, attend_cached
from everstep.engine.models.decoder import AdapterRows
from everstep.engine.models.frozen_product import (
    ROW_MULTIPLE,
    check_rows,
    fuse_products,
    pack_products,
    probe_numbers,
)
from everstep.engine.models.model import Model
from everstep.engine.models.projection_group import GroupAdapter, ProjectionGroup, stack_adapters
from everstep.engine.run_state import Adapter
from everstep.engine.transfer import upload

MAX_COPIED_BYTES = 4 << 30
"""Largest weights of which a packed copy is made for decoding. It moves no bit."""
_FIRST_POSITIONS = 256
_Stacks = Sequence[tuple[Mapping[str, GroupAdapter], slice | None]]
"""Adapters' products by the first projection of a group, and their rows. None: all rows."""


class DirectDecoder:
    """Decodes a Llama-like model. See `Model.is_llama_like`.

    Args:
        model: the base model.
        settings: settings of each layer's attention.

    Raises:
        AttributeError, TypeError: the model is not built as such models are.
    """

    name = "direct"

    def __init__(self, model: Model, settings: Mapping[int, AttentionSettings]) -> None:
        self._model = model
        decoder = model.module.get_decoder()
        self._embedding: torch.Tensor = _plain_embedding(decoder.embed_tokens)
        self._layers = [
            _Layer(index, layer, settings[index]) for index, layer in enumerate(decoder.layers)
        ]
        self._norm = _norm(decoder.norm)
        self._head = ProjectionGroup(model.module.get_output_embeddings())
        self._rotary = _RotaryTable(decoder.rotary_emb, self._embedding, self._layers[0].width)
        self._groups = [*(group for layer in self._layers for group in layer.groups), self._head]
        self._adapters: WeakKeyDictionary[Adapter, _AdapterStack] = WeakKeyDictionary()
        self._multiple = ROW_MULTIPLE
        self._copies_weights = False

    def serve(self, row_multiple: int) -> None:
        """Begin to serve: the next pass copies the weights for the fastest products.

        Args:
            row_multiple: multiple of rows at which the model's products keep their bits.
        """
        self._multiple = row_multiple
        self._copies_weights = True

    def row_multiple(self, adapter: Adapter | None) -> int:
        """Return the multiple to which an adapter's rows must be padded in a pass."""
        if adapter is None:
            return self._multiple
        return max(self._multiple, self._stack(adapter).row_multiple)

    def logits(
        self,
        tokens: np.ndarray[Any, Any],
        positions: np.ndarray[Any, Any],
        cached: Sequence[CachedRows],
        adapters: AdapterRows,
    ) -> torch.Tensor:
        """Compute the logits of the next tokens. See `Decoder`."""
        if self._copies_weights:
            self._copy_weights()
        rows = len(tokens)
        stacks = [
            (self._stack(adapter).groups, None if part == slice(0, rows) else part)
            for adapter, part in adapters
            if adapter is not None
        ]
        rotary = self._rotary.rows(positions)
        x = functional.embedding(upload(tokens, self._model.device), self._embedding)
        for layer in self._layers:
            x = layer(x, rotary, cached, stacks)
        return self._model.scaled(_project(self._head, self._norm(x), stacks))

    def _copy_weights(self) -> None:
        """Copy the weights into the layout of the fastest products, if there is room for that."""
        self._copies_weights = False
        if sum(group.nbytes for group in self._groups) <= MAX_COPIED_BYTES:
            for group in self._groups:
                group.copy_weights()

    def _stack(self, adapter: Adapter) -> _AdapterStack:
        stack = self._adapters.get(adapter)
        if stack is None:
            stack = self._adapters[adapter] = _AdapterStack(adapter, self._groups)
        return stack


class _AdapterStack:
    """An adapter's products by the first projection of their group.

    Attributes:
        groups: the products.
        row_multiple: multiple of rows at which they keep their rows' bits.
    """

    def __init__(self, adapter: Adapter, groups: Sequence[ProjectionGroup]) -> None:
        self.groups = {
            group.names[0]: GroupAdapter(adapter, group)
            for group in groups
            if any(name in adapter.weights for name in group.names)
        }
        products = [product for each in self.groups.values() for product in each.products()]
        self.row_multiple = check_rows(products)
        pack_products(products)
        fuse_products(product for each in self.groups.values() for product in each.ups())
        both = [
            (each, self.groups[each.names[0]]) for each in groups if each.names[0] in self.groups
        ]
        stack_adapters(both, self.row_multiple, groups[0].dtype)


class _Layer:
    """One layer: attention and a gated MLP, each behind a norm and added to its input.

    Args:
        index: number of the layer.
        layer: its module.
        settings: settings of its attention.

    Attributes:
        groups: its projections.
        width: width of a head.
    """

    def __init__(self, index: int, layer: Any, settings: AttentionSettings) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._index = index
        self._settings = settings
        self.width = int(attention.head_dim)
        self._qkv = ProjectionGroup(attention.q_proj, attention.k_proj, attention.v_proj)
        self._output = ProjectionGroup(attention.o_proj)
        self._gate_up = ProjectionGroup(mlp.gate_proj, mlp.up_proj)
        self._down = ProjectionGroup(mlp.down_proj)
        self.groups = (self._qkv, self._output, self._gate_up, self._down)
        self._queries = self._qkv.widths[0] // self.width
        self._keys = self._qkv.widths[1] // self.width
        self._input_norm = _norm(layer.input_layernorm)
        self._mlp_norm = _norm(layer.post_attention_layernorm)
        self._head_norms = None
        if hasattr(attention, "q_norm"):
            self._head_norms = (_norm(attention.q_norm), _norm(attention.k_norm))
        self._activation = _activation(mlp.act_fn)

    def __call__(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cached: Sequence[CachedRows],
        stacks: _Stacks,
    ) -> torch.Tensor:
        """Compute the layer's output, [M, H] → [M, H]."""
        attended = self._attend(self._input_norm(x), rotary, cached, stacks)
        x = _project(self._output, attended, stacks).add_(x)
        both = _project(self._gate_up, self._mlp_norm(x), stacks)
        middle = self._gate_up.widths[0]
        gated = self._activation(both[:, :middle]).mul_(both[:, middle:])
        return _project(self._down, gated, stacks).add_(x)

    def _attend(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cached: Sequence[CachedRows],
        stacks: _Stacks,
    ) -> torch.Tensor:
        heads = _project(self._qkv, x, stacks).view(len(x), -1, self.width)
        rotated = heads[:, : self._queries + self._keys]
        if self._head_norms is not None:
            queries, keys = rotated[:, : self._queries], rotated[:, self._queries :]
            rotated = torch.cat((self._head_norms[0](queries), self._head_norms[1](keys)), 1)
        rotated = _rotate(rotated, *rotary).unsqueeze(2)
        output = attend_cached(
            self._index,
            rotated[:, : self._queries],
            rotated[:, self._queries :],
            heads[:, self._queries + self._keys :].unsqueeze(2),
            cached,
            self._settings,
        )
        return output.view(len(x), -1)


class _RotaryTable:
    """Cosines and signed sines by position, computed once.

    Args:
        rotary: the model's rotary embedding.
        like: a tensor of the model's dtype and device.
        width: width of a head, all of which is rotated.

    Raises:
        TypeError: only a part of a head is rotated.
    """

    def __init__(self, rotary: Any, like: torch.Tensor, width: int) -> None:
        self._rotary = rotary
        self._like = like
        self._width = width
        self._table = like.new_empty(0, 2 * width)
        self._grow(_FIRST_POSITIONS)

    def rows(self, positions: np.ndarray[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and signed sines of positions [M], [M, 1, width] each."""
        needed = int(positions.max()) + 1
        if needed > len(self._table):
            self._grow(2 * needed)
        index = upload(positions, self._table.device)
        rows = functional.embedding(index, self._table).unsqueeze(1)
        return rows[..., : self._width], rows[..., self._width :]

    def _grow(self, length: int) -> None:
        positions = torch.arange(length, device=self._like.device).unsqueeze(0)
        cosines, sines = (each[0] for each in self._rotary(self._like, positions))
        if cosines.shape[-1] != self._width:
            raise TypeError("only a part of each head is rotated")
        half = self._width // 2
        signed = torch.cat((-sines[:, :half], sines[:, half:]), -1)
        self._table = torch.cat((cosines, signed), -1).to(self._like.dtype)


def _rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotate the halves of heads [M, heads, width] against each other."""
    half = x.shape[-1] // 2
    turned = torch.cat((x[..., half:], x[..., :half]), -1).mul_(sines)
    return (x * cosines).add_(turned)


def _project(group: ProjectionGroup, x: torch.Tensor, stacks: _Stacks) -> torch.Tensor:
    y = group(x)
    for products, rows in stacks:
        adapter = products.get(group.names[0])
        if adapter is None:
            continue
        if rows is None:
            y = adapter.add(y, x)
        else:
            part = y[rows]
            added = adapter.add(part, aligned(x[rows]))
            if added is not part:
                part.copy_(added)
    return y


def _plain_embedding(module: nn.Module) -> torch.Tensor:
    if type(module) is not nn.Embedding:
        raise TypeError(f"{type(module).__name__} may do more than to look up rows")
    return module.weight


def _norm(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return torch's fused norm where it has the bits of the module, or the module."""
    weight: torch.Tensor = module.weight
    fused = partial(
        functional.rms_norm,
        normalized_shape=tuple(weight.shape),
        weight=weight,
        eps=module.variance_epsilon,
    )
    x = probe_numbers(ROW_MULTIPLE, weight.shape[0], weight)
    with torch.no_grad():
        return fused if torch.equal(fused(x), module(x)) else module


def _activation(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return functional.silu if isinstance(module, nn.SiLU) else module
