"""A LoRA adapter added to its base model: W + (alpha / rank) B A, weight by weight.

The base's weights are read from its files and the merged ones written to files of the same names,
a bounded piece at a time; sums are made in float32, and rounded once to the dtype that is written.
A head that was tied to the input embeddings, and that the adapter changes, becomes a weight of its
own, beside them.
"""

from __future__ import annotations

import json
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
    weight_of,
)
from everstep.interchange.errors import CannotMerge
from everstep.interchange.numbers import SIZES, Array, from_float32
from everstep.interchange.peft_config import PeftAdapter
from everstep.interchange.serving import is_head
from everstep.interchange.tensors import Spec, TensorFile, row_ranges, write_tensors

DTYPES = {"fp32": ("F32", "float32"), "bf16": ("BF16", "bfloat16")}
"""What can be written: safetensors' name of it, and config.json's."""
_Tensors = dict[str, tuple[Spec, Iterable[bytes]]]


@dataclass(frozen=True)
class _Delta:
    """What an adapter adds to one weight; ``transposed``: the weight is [in, out]."""

    module: str
    transposed: bool


@dataclass(frozen=True)
class _Plan:
    """Which weights change.

    Attributes:
        deltas: by the weight's name.
        untied: a head's new weight, and the embeddings that it shared.
        head: whether the output head changes, which then can't be the input embeddings.
    """

    deltas: dict[str, _Delta]
    untied: tuple[str, str] | None
    head: bool


def merge(base: BaseModel, adapter: PeftAdapter, dtype: str, directory: Path) -> None:
    """Write the merged model's files: weights, index, config.json and what lay beside them.

    Args:
        base: the base model.
        adapter: the adapter.
        dtype: ``fp32`` or ``bf16``.
        directory: where to; it exists, and holds nothing of these names.

    Raises:
        CannotMerge: the adapter doesn't fit the base model, or that is quantized.
        Unreadable: a file of the base model isn't whole.
    """
    if "quantization_config" in base.config:
        raise CannotMerge(
            "The base model is quantized: nothing can be added to its weights. Merge onto the "
            "model that it was made from."
        )
    plan = _plan(base, adapter)
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
    _write_json(directory / CONFIG, _config(base.config, dtype, untied=plan.head))
    base.copy_beside(directory)


def _plan(base: BaseModel, adapter: PeftAdapter) -> _Plan:
    where = base.where()
    deltas: dict[str, _Delta] = {}
    untied = None
    for module, (width_in, width_out) in adapter.widths.items():
        name = weight_of(module, where)
        if name is None:
            if not is_head(module) or base.config.get("tie_word_embeddings") is False:
                raise CannotMerge(
                    f"The base model in {base.directory} has no weight of {module}, which the "
                    "adapter changes. Merge it onto the model that it was trained on."
                )
            name = f"{module}.weight"
            untied = (name, input_embeddings(where, (width_out, width_in)))
            shape: tuple[int, ...] = (width_out, width_in)
        else:
            shape = where[name][1].shape
        deltas[name] = _Delta(module, _is_transposed(adapter, module, name, shape))
    return _Plan(deltas, untied, any(map(is_head, adapter.widths)))


def _is_transposed(adapter: PeftAdapter, module: str, name: str, shape: tuple[int, ...]) -> bool:
    width_in, width_out = adapter.widths[module]
    if shape == (width_out, width_in) != (width_in, width_out):
        return False
    if shape == (width_in, width_out):
        return width_in != width_out or adapter.fan_in_fan_out
    raise CannotMerge(
        f"The base model's {name} has shape {list(shape)}, the adapter's {module} is "
        f"{width_in} → {width_out}. Merge it onto the model that it was trained on."
    )


def _merged(file: TensorFile, adapter: PeftAdapter, plan: _Plan, dtype: str) -> _Tensors:
    """The tensors of a shard as they are to be written; nothing is read yet."""
    tensors: _Tensors = {}
    for name, spec in file.specs.items():
        is_float = spec.dtype in SIZES
        written = Spec(dtype, spec.shape) if is_float else spec
        if name in plan.deltas:
            pieces = _added(file, name, adapter, plan.deltas[name], dtype)
        else:
            pieces = file.converted(name, dtype)
        tensors[name] = (written, pieces)
        if plan.untied is not None and plan.untied[1] == name:
            head = plan.untied[0]
            pieces = _added(file, name, adapter, plan.deltas[head], dtype)
            tensors[head] = (written, pieces)
    return tensors


def _added(
    file: TensorFile, name: str, adapter: PeftAdapter, delta: _Delta, dtype: str
) -> Iterator[bytes]:
    for first, last in row_ranges(file.specs[name].shape):
        rows = file.rows(name, first, last)
        rows += _product(adapter, delta, first, last)
        yield from_float32(rows, dtype)


def _product(adapter: PeftAdapter, delta: _Delta, first: int, last: int) -> Array:
    """Rows of what the adapter adds to a weight."""
    if delta.transposed:
        a = adapter.a(delta.module)[:, first:last]
        product = a.T @ adapter.b(delta.module).T
    else:
        product = adapter.b(delta.module, first, last) @ adapter.a(delta.module)
    scaled: Array = product * np.float32(adapter.scale)
    return scaled


def _config(config: Mapping[str, Any], dtype: str, *, untied: bool) -> dict[str, Any]:
    """The base's config.json with what is different about the merged model."""
    changed = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    changed["torch_dtype" if "torch_dtype" in config else "dtype"] = DTYPES[dtype][1]
    if untied:
        changed["tie_word_embeddings"] = False
        if isinstance(text := changed.get("text_config"), dict):
            changed["text_config"] = {**text, "tie_word_embeddings": False}
    return changed


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
