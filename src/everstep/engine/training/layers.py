"""Direct layers: the hidden states of packed texts, with gradients, of Llama-like models.

The modules of transformers consist of many small operations, each with results that a backward
needs. Here a layer is seven operations. Their values are those of the modules up to the order of
some sums. `checks` compares both when a model is loaded, and models for which they differ keep
the modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from everstep.engine.kernels.elementwise import Gate, RmsNorm, Rotate
from everstep.engine.kernels.packing import Packing
from everstep.engine.kernels.shared_input import AdaptedProducts, Projection
from everstep.engine.models.attention import AttentionSettings, attend_packed
from everstep.engine.models.lora import BoundAdapter, LoraProjection
from everstep.engine.models.model import Model

_Rotation = tuple[torch.Tensor, torch.Tensor]


class DirectLayers:
    """The layers of a Llama-like model, from token ids to the last hidden states.

    Args:
        model: the base model.
        settings: settings of each layer's attention.

    Raises:
        AttributeError, TypeError: the model is not built as such models are.
    """

    name = "direct"

    def __init__(self, model: Model, settings: Mapping[int, AttentionSettings]) -> None:
        decoder = model.module.get_decoder()
        if type(decoder.embed_tokens) is not nn.Embedding:
            raise TypeError("the embedding may do more than to look up rows")
        self._embedding = decoder.embed_tokens
        self._rotary = decoder.rotary_emb
        self._layers = [_Layer(each, settings[i]) for i, each in enumerate(decoder.layers)]
        self._norm = _Norm(decoder.norm)

    def hidden(self, tokens: torch.Tensor, packing: Packing, adapter: BoundAdapter) -> torch.Tensor:
        """Compute the last hidden states, [N, H], of packed token ids [N]."""
        x = functional.embedding(tokens, self._embedding.weight)
        cosines, sines = (each[0].to(x.dtype) for each in self._rotary(x, packing.positions))
        half = sines.shape[-1] // 2
        signed = torch.cat((-sines[:, :half], sines[:, half:]), -1)
        rotation = cosines.unsqueeze(1), signed.unsqueeze(1)
        for layer in self._layers:
            x = layer(x, rotation, packing, adapter)
        return self._norm(x)


class _Layer:
    """Attention and a gated MLP, each behind a norm and added to its input."""

    def __init__(self, layer: Any, settings: AttentionSettings) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        x = torch.linspace(-8, 8, 33)
        if not torch.equal(mlp.act_fn(x), functional.silu(x)):
            raise TypeError("the gate is no SiLU")
        self._settings = settings
        self._width = int(attention.head_dim)
        self._qkv = _Group(attention.q_proj, attention.k_proj, attention.v_proj)
        self._output = _Group(attention.o_proj)
        self._gate_up = _Group(mlp.gate_proj, mlp.up_proj)
        self._down = _Group(mlp.down_proj)
        self._input_norm = _Norm(layer.input_layernorm)
        self._mlp_norm = _Norm(layer.post_attention_layernorm)
        norms = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        self._head_norms = [None if norm is None else _Norm(norm) for norm in norms]

    def __call__(
        self, x: torch.Tensor, rotation: _Rotation, packing: Packing, adapter: BoundAdapter
    ) -> torch.Tensor:
        """Compute the layer's output, [N, H] → [N, H]."""
        attended = self._attend(self._input_norm(x), rotation, packing, adapter)
        (y,) = self._output(attended, adapter)
        x = y + x
        gate, up = self._gate_up(self._mlp_norm(x), adapter)
        gated = Gate.apply(gate, up)  # type: ignore[no-untyped-call]
        (y,) = self._down(gated, adapter)
        return y + x

    def _attend(
        self, x: torch.Tensor, rotation: _Rotation, packing: Packing, adapter: BoundAdapter
    ) -> torch.Tensor:
        heads = [y.view(len(x), -1, self._width) for y in self._qkv(x, adapter)]
        for index, norm in enumerate(self._head_norms):
            if norm is not None:
                heads[index] = norm(heads[index])
            heads[index] = Rotate.apply(heads[index], *rotation)  # type: ignore[no-untyped-call]
        q, k, v = (each.transpose(0, 1).unsqueeze(0) for each in heads)
        return attend_packed(q, k, v, self._settings, packing.groups).reshape(len(x), -1)


class _Group:
    """Projections of one input."""

    def __init__(self, *projections: Any) -> None:
        bases: list[Any] = [
            each.base if isinstance(each, LoraProjection) else each for each in projections
        ]
        if not all(type(base) is nn.Linear for base in bases):
            raise TypeError("a projection may do more than to multiply")
        self._names = [getattr(each, "name", "") for each in projections]
        self._bases = bases

    def __call__(self, x: torch.Tensor, adapter: BoundAdapter) -> tuple[torch.Tensor, ...]:
        adapted = tuple(i for i, name in enumerate(self._names) if name in adapter.weights)
        if not adapted:
            return tuple(functional.linear(x, base.weight, base.bias) for base in self._bases)
        pairs = [adapter.weights[self._names[index]] for index in adapted]
        outputs: tuple[torch.Tensor, ...] = AdaptedProducts.apply(  # type: ignore[no-untyped-call]
            x,
            adapter.scale,
            tuple(Projection(base.weight, base.bias) for base in self._bases),
            adapted,
            *(a for a, _ in pairs),
            *(b for _, b in pairs),
        )
        return outputs


class _Norm:
    """A norm over the last dimension."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._eps = float(module.variance_epsilon)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = RmsNorm.apply(x, self._module.weight, self._eps)  # type: ignore[no-untyped-call]
        return y
