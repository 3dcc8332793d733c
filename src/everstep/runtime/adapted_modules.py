"""Adapted modules: which of a base model's projections an adapter adapts, and which not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from everstep.engine.models.info import Forms, ModelInfo, count_forms
from everstep.wire import types

_KINDS = {"attention": "train_attn", "mlp": "train_mlp", "unembed": "train_unembed"}


def adapted_modules(info: ModelInfo | None, lora: Mapping[str, Any]) -> types.AdaptedModules | None:
    """Return the modules that an adapter adapts, and those that it does not, by kind.

    Args:
        info: the base model. None: it is not served, and its modules are not known.
        lora: the adapter's LoRA configuration.
    """
    if info is None:
        return None
    chosen = lora.get("modules")
    forms = None if chosen is None else count_forms(chosen)
    adapted: dict[str, Forms] = {}
    left: dict[str, Forms] = {}
    for kind, flag in _KINDS.items():
        there: Forms = getattr(info.projections, kind)
        if not lora.get(flag, True):
            adapted[kind], left[kind] = {}, there
        elif forms is None:
            adapted[kind], left[kind] = there, {}
        else:
            adapted[kind] = {form: forms[form] for form in there if form in forms}
            left[kind] = _minus(there, adapted[kind])
    left |= info.projections.never
    return types.AdaptedModules.model_validate(
        {**adapted, "not_adapted": {kind: each for kind, each in left.items() if each}}
    )


def peft_note(info: ModelInfo | None, lora: Mapping[str, Any]) -> str | None:
    """Say which of an adapter's modules PEFT can't load. None: it loads all of them."""
    found = adapted_modules(info, lora)
    if info is None or found is None:
        return None
    adapted = {*found.attention, *found.mlp, *found.unembed}
    lost = sorted(adapted & set(info.projections.peft_lost))
    if not lost:
        return None
    return (
        f"PEFT can't load the tensors of {', '.join(lost)}: transformers renames them as it loads "
        f"an adapter of {info.name}. Export the merged model, or train without them."
    )


def saved_before_note(info: ModelInfo | None, adapter_config: Mapping[str, Any]) -> str | None:
    """Say that a saved adapter_config.json names modules that PEFT takes for routed experts.

    Earlier releases named them in ``target_modules``.
    """
    named = adapter_config.get("target_modules")
    if info is None or not isinstance(named, list):
        return None
    lost = sorted({_last(name) for name in named} & set(info.projections.peft_parameters))
    if not lost:
        return None
    return (
        f"Its adapter_config.json was written by an earlier release: PEFT takes {', '.join(lost)} "
        "for the routed experts and drops their tensors. 'everstep checkpoint export' writes one "
        "that PEFT loads."
    )


def _minus(forms: Forms, others: Forms) -> Forms:
    left = {form: count - others.get(form, 0) for form, count in forms.items()}
    return {form: count for form, count in left.items() if count > 0}


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def totals(found: types.AdaptedModules) -> dict[str, dict[str, int]]:
    """Return the numbers of modules by kind, for the log."""
    adapted = {kind: getattr(found, kind) for kind in _KINDS}
    return {"adapted": _sums(adapted), "not_adapted": _sums(found.not_adapted)}


def _sums(forms: Mapping[str, Forms]) -> dict[str, int]:
    return {kind: sum(each.values()) for kind, each in forms.items() if each}
