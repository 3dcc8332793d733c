"""Merge: adds a LoRA adapter to its base model, W + (alpha / rank) B A, weight by weight.

The base's weights are read from its files, and the merged ones are written to files of the same
names, in bounded chunks. Sums are computed in float32 and rounded once to the written dtype. A tied
output head that the adapter changes is untied and becomes a separate weight.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from everstep.interchange.base import (
    CONFIG,
    INDEX,
    BaseModel,
    input_embeddings,
    weight_name,
)
from everstep.interchange.errors import DivergedAdapter, MergeError
from everstep.interchange.numbers import Array, from_float32
from everstep.interchange.peft_config import PeftAdapter
from everstep.interchange.serving import is_output_head
from everstep.interchange.tensors import TensorFile, row_ranges, write_tensors
from everstep.safetensors_files import FLOAT_BYTES, TensorSpec

DTYPES = {"fp32": ("F32", "float32"), "bf16": ("BF16", "bfloat16")}
"""Dtypes that can be written: safetensors' name and config.json's."""
_Tensors = dict[str, tuple[TensorSpec, Iterable[bytes]]]


@dataclass(frozen=True)
class _Delta:
    """The module whose product is added to a weight. ``transposed``: the weight is [in, out]."""

    module: str
    transposed: bool


@dataclass(frozen=True)
class _Untied:
    """An output head that the base's files do not hold.

    Attributes:
        weight: name of its new weight.
        embeddings: the weight that it shared.
        bias: names of its new bias and of the one that it shared, if any.
    """

    weight: str
    embeddings: str
    bias: tuple[str, str] | None


@dataclass(frozen=True)
class _Plan:
    """The weights that change.

    Attributes:
        deltas: changes by the weights' names.
        untied: the output head that becomes a weight of its own, if any.
        head: whether the output head changes, so that it cannot stay tied to the embeddings.
    """

    deltas: dict[str, _Delta]
    untied: _Untied | None
    head: bool


def merge(base: BaseModel, adapter: PeftAdapter, dtype: str, directory: Path) -> None:
    """Write the merged model's files: weights, index, config.json and the base's other files.

    Args:
        base: the base model.
        adapter: the adapter.
        dtype: ``fp32`` or ``bf16``.
        directory: an existing directory without files of these names.

    Raises:
        DivergedAdapter: the adapter's weights, or merged ones, are NaN or infinite.
        MergeError: the adapter does not fit the base model, or the base model is quantized.
        UnreadableFile: a file of the base model is incomplete.
    """
    if "quantization_config" in base.config:
        raise MergeError(
            "The base model is quantized: an adapter cannot be added to its weights. Merge into "
            "the model that it was quantized from."
        )
    plan = _plan(base, adapter)
    adapter.check_finite()
    weight_map: dict[str, str] = {}
    total = 0
    for shard in base.shards:
        tensors = _merged(base.shard(shard), adapter, plan, DTYPES[dtype][0])
        total += write_tensors(directory / shard, tensors)
        weight_map |= dict.fromkeys(tensors, shard)
    if base.weight_map is not None:
        _write_json(
            directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    config = _config(base.config, dtype, untied=plan.head)
    if config == base.config:
        shutil.copyfile(base.directory / CONFIG, directory / CONFIG)
    else:
        _write_json(directory / CONFIG, config)
    base.copy_other_files(directory)


def _plan(base: BaseModel, adapter: PeftAdapter) -> _Plan:
    where = base.locate_weights()
    deltas: dict[str, _Delta] = {}
    untied = None
    for module, (width_in, width_out) in adapter.widths.items():
        name = weight_name(module, where)
        if name is None:
            if not is_output_head(module) or base.config.get("tie_word_embeddings") is False:
                raise MergeError(
                    f"The base model in {base.directory} has no weight of {module}, which the "
                    "adapter changes. Merge it into the model that it was trained on."
                )
            name = f"{module}.weight"
            embeddings = input_embeddings(where, (width_out, width_in))
            untied = _Untied(name, embeddings, _shared_bias(module, where))
            shape: tuple[int, ...] = (width_out, width_in)
        else:
            shape = where[name][1].shape
        deltas[name] = _Delta(module, _is_transposed(adapter, module, name, shape))
    return _Plan(deltas, untied, any(map(is_output_head, adapter.widths)))


def _shared_bias(
    module: str, where: Mapping[str, tuple[str, TensorSpec]]
) -> tuple[str, str] | None:
    """Return the names of a head's bias and of the one that its parent module holds for it."""
    own, shared = f"{module}.bias", f"{module.rpartition('.')[0]}.bias"
    return (own, shared) if own not in where and shared in where else None


def _is_transposed(adapter: PeftAdapter, module: str, name: str, shape: tuple[int, ...]) -> bool:
    width_in, width_out = adapter.widths[module]
    if shape == (width_out, width_in) != (width_in, width_out):
        return False
    if shape == (width_in, width_out):
        return width_in != width_out or adapter.fan_in_fan_out
    raise MergeError(
        f"The base model's {name} has shape {list(shape)}, the adapter's {module} is "
        f"{width_in} → {width_out}. Merge it into the model that it was trained on."
    )


def _merged(file: TensorFile, adapter: PeftAdapter, plan: _Plan, dtype: str) -> _Tensors:
    """Return a shard's merged tensors. Their data is read lazily."""
    tensors: _Tensors = {}
    for name, spec in file.specs.items():
        is_float = spec.dtype in FLOAT_BYTES
        written = TensorSpec(dtype, spec.shape) if is_float else spec
        if name in plan.deltas:
            chunks = _add_delta(file, name, adapter, plan.deltas[name], dtype)
        else:
            chunks = file.converted(name, dtype)
        tensors[name] = (written, chunks)
        if plan.untied is not None and plan.untied.embeddings == name:
            head = plan.untied.weight
            chunks = _add_delta(file, name, adapter, plan.deltas[head], dtype)
            tensors[head] = (written, chunks)
        if plan.untied is not None and plan.untied.bias is not None:
            own, shared = plan.untied.bias
            if shared == name:
                tensors[own] = (written, file.converted(name, dtype))
    return tensors


def _add_delta(
    file: TensorFile, name: str, adapter: PeftAdapter, delta: _Delta, dtype: str
) -> Iterator[bytes]:
    for first, last in row_ranges(file.specs[name].shape):
        rows = file.rows(name, first, last)
        with np.errstate(over="ignore", invalid="ignore"):
            rows += _product(adapter, delta, first, last)
        if not np.isfinite(rows).all():
            raise DivergedAdapter(
                f"This adapter has diverged: merged with it, {name} holds NaN or infinity. Go back "
                "to an earlier checkpoint."
            )
        yield from_float32(rows, dtype)


def _product(adapter: PeftAdapter, delta: _Delta, first: int, last: int) -> Array:
    """Compute rows of the product that the adapter adds to a weight."""
    if delta.transposed:
        a = adapter.a(delta.module)[:, first:last]
        product = a.T @ adapter.b(delta.module).T
    else:
        product = adapter.b(delta.module, first, last) @ adapter.a(delta.module)
    scaled: Array = product * np.float32(adapter.scale)
    return scaled


def _config(config: Mapping[str, Any], dtype: str, *, untied: bool) -> dict[str, Any]:
    """Return the base's config.json with the merged model's dtype and tying."""
    changed = dict(config)
    for field in [each for each in ("dtype", "torch_dtype") if each in config] or ["dtype"]:
        changed[field] = DTYPES[dtype][1]
    if untied:
        changed["tie_word_embeddings"] = False
        if isinstance(text := changed.get("text_config"), dict):
            changed["text_config"] = {**text, "tie_word_embeddings": False}
    return changed


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
