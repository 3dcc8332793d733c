"""Adapted modules, an extension of Everstep: what a run or a checkpoint adapts."""

from __future__ import annotations

from typing import Literal

from everstep.wire.base import Response


class AdaptedModules(Response):
    """The modules that an adapter adapts, and those that it does not. An extension.

    Modules are counted by the form of their names, as ``model.layers.*.self_attn.q_proj``.

    Attributes:
        attention: those that ``train_attn`` selected.
        mlp: those that ``train_mlp`` selected.
        unembed: the output head, if ``train_unembed`` selected it.
        not_adapted: the others by kind: ``routed experts``, ``routers``, kinds whose flag is off.
    """

    attention: dict[str, int]
    mlp: dict[str, int]
    unembed: dict[str, int]
    not_adapted: dict[str, dict[str, int]]


class CreateModelResponse(Response):
    """A run that was created. ``lora_seed`` and ``adapted_modules`` are extensions."""

    model_id: str
    lora_seed: int | None = None
    adapted_modules: AdaptedModules | None = None
    type: Literal["create_model"] = "create_model"
