"""LoRA targets: finds a model's projections of attention, MLP and output head.

Routers are never adapted: another routing is another model, and what they choose has no gradient.
Routed experts are stacked into one parameter each, which the low-rank products here can't adapt.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from everstep.engine.errors import ModelUnsupported
from everstep.engine.models.lora import features

ROUTED_EXPERTS = "routed experts"
ROUTERS = "routers"
UNUSED = "unused by text"
OTHERS = "other projections"
_ATTENTION = re.compile(r"(^|\.)(\w*attn\w*|\w*attention\w*)(\.|$)")
_MLP = re.compile(r"(^|\.)(\w*mlp\w*|\w*ffn\w*|\w*feed_forward\w*|fc1|fc2)(\.|$)")
_ROUTER = re.compile(r"(^|[._])router([._]|$)")
_GATES = ("gate", "router", "shared_expert_gate")
_EXPERTS = re.compile(r"(^|\.)experts(\.|$)")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class LoraTargets:
    """Names of projections, in the model's order.

    Attributes:
        attn: projections that ``train_attn`` selects.
        mlp: projections that ``train_mlp`` selects.
        unembed: the output head, which ``train_unembed`` selects.
        retired: projections that no flag selects, and that earlier releases adapted. Checkpoints
            of theirs still load.
        unadapted: names of what no flag selects, by kind: routed experts, routers, projections
            that no text reaches, and projections of other kinds.
    """

    attn: tuple[str, ...]
    mlp: tuple[str, ...]
    unembed: tuple[str, ...]
    retired: tuple[str, ...] = ()
    unadapted: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def selectable(self) -> tuple[str, ...]:
        """All projections that a flag selects."""
        return (*self.attn, *self.mlp, *self.unembed)

    def reached_by(self, called: Collection[str]) -> LoraTargets:
        """Return the targets without the projections that a text does not reach.

        Those belong to other inputs, such as images, or are read without being called.

        Args:
            called: names of the projections that a text's pass called.
        """
        unused = tuple(
            name
            for name in (*self.attn, *self.mlp)
            if name not in called and not _EXPERTS.search(name)  # which is routed to by chance
        )
        if not unused:
            return self
        return replace(
            self,
            attn=tuple(name for name in self.attn if name not in unused),
            mlp=tuple(name for name in self.mlp if name not in unused),
            retired=(*self.retired, *unused),
            unadapted={**self.unadapted, UNUSED: unused},
        )


@contextmanager
def record_calls(model: PreTrainedModel) -> Iterator[set[str]]:
    """Collect the names of the projections that are called for the duration of a pass."""
    called: set[str] = set()
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                hooks.enter_context(_hook(module, name, called))
        yield called


@contextmanager
def _hook(module: nn.Module, name: str, called: set[str]) -> Iterator[None]:
    def add(*_: Any) -> None:
        called.add(name)

    handle = module.register_forward_pre_hook(add)
    try:
        yield
    finally:
        handle.remove()


def find_lora_targets(model: PreTrainedModel) -> LoraTargets:
    """Return the projections of a causal language model that LoRA can adapt.

    Raises:
        ModelUnsupported: it has no attention projections, or no output head.
    """
    head = model.get_output_embeddings()
    attn: list[str] = []
    mlp: list[str] = []
    unembed, retired = [], []
    mixture = _Mixture(model)
    left: dict[str, list[str]] = {ROUTED_EXPERTS: mixture.experts, ROUTERS: mixture.routers}
    for name, module in model.named_modules():
        if module is head:
            unembed.append(name)
        elif isinstance(module, nn.Linear | Conv1D):
            kind = attn if _ATTENTION.search(name) else mlp if _MLP.search(name) else None
            if mixture.routes(name, module):
                left[ROUTERS].append(name)
                if kind is attn or name.rsplit(".", 1)[-1] not in _GATES:
                    retired += [name] if kind is not None else []
            elif kind is None:
                left.setdefault(OTHERS, []).append(name)
            else:
                kind.append(name)
    if not attn or not unembed:
        raise ModelUnsupported(
            f"{type(model).__name__} has no {'attention' if not attn else 'output'} projections "
            "that LoRA could adapt."
        )
    unadapted = {kind: tuple(names) for kind, names in left.items() if names}
    return LoraTargets(tuple(attn), tuple(mlp), tuple(unembed), tuple(retired), unadapted)


class _Mixture:
    """The experts of a model, and the blocks that route to them.

    Attributes:
        experts: names of the experts' parameters.
        routers: names of the routers' matrices that are no projections, but parameters.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        self._counts: set[int | None] = {getattr(config, name, None) for name in _EXPERT_COUNTS}
        self._blocks: set[str] = set()
        self.experts: list[str] = []
        self.routers: list[str] = []
        tables: list[str] = []
        for name, parameter in model.named_parameters():
            owner, _, last = name.rpartition(".")
            module = model.get_submodule(owner)
            if isinstance(module, nn.Linear | Conv1D | nn.Embedding | _ConvNd):
                continue
            if _is_expert(name, parameter, self._counts):
                self.experts.append(name)
                self._blocks.add(_block(name))
                self._counts |= {parameter.shape[0]} if parameter.ndim == 3 else set()
            elif parameter.ndim == 2 and last == "weight":
                tables.append(name)
        self.routers += [name for name in tables if self._in_block(name)]

    def routes(self, name: str, projection: nn.Module) -> bool:
        """Whether a projection routes: to experts, or between them and a shared one."""
        if _ROUTER.search(name):
            return True
        if _MLP.search(name) and not _ATTENTION.search(name) and name.rsplit(".", 1)[-1] in _GATES:
            return True
        _, width = features(projection)
        return (width in self._counts or width == 1) and self._in_block(name)

    def _in_block(self, name: str) -> bool:
        """Whether a module is beside experts. In an attention, only those in it count."""
        parts = name.split(".")
        blocks = {".".join(parts[:end]) for end in range(1, len(parts))} & self._blocks
        if _ATTENTION.search(name):
            return any(_ATTENTION.search(block) for block in blocks)
        return bool(blocks)


def _is_expert(name: str, parameter: nn.Parameter, counts: Collection[Any]) -> bool:
    if _EXPERTS.search(name):
        return parameter.ndim > 1
    return parameter.ndim == 3 and int(parameter.shape[0]) in counts


def _block(name: str) -> str:
    """Return the module that an expert's parameter and its router are in."""
    found = _EXPERTS.search(name)
    if found is not None:
        return name[: found.start()]
    return name.rsplit(".", 2)[0]
