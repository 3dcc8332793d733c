"""PEFT adapter: reads and checks an adapter of any origin in PEFT's format.

    adapter_config.json          its configuration
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight  [rank, in]
                                 base_model.model.<module>.lora_B.weight  [out, rank]

A run has one rank and one scale over whole projections. Any other configuration is rejected by the
name of its field, and never loaded approximately. Unknown fields, as of later PEFT releases, are
rejected unless they are null, false or empty.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from everstep.interchange.base import EMBEDDINGS, HEADS, read_json
from everstep.interchange.errors import DivergedAdapter, UnreadableFile, UnsupportedAdapter
from everstep.interchange.numbers import Array
from everstep.interchange.tensors import TensorFile, row_ranges
from everstep.safetensors_files import FLOAT_BYTES

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PICKLED = "adapter_model.bin"
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_WEIGHTS = (".weight", ".base_layer.weight")
_MAX_INTEGER = 2**31 - 1
_IGNORED = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "r",
        "revision",
        "target_modules",
        "use_rslora",
    }
)
"""Fields that are read elsewhere, or that only record how the present tensors were selected."""
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM"),
    "bias": (None, "none"),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}
"""Fields with the values that a run supports. Other initialisations change the base model."""


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter whose tensors agree with its configuration.

    Attributes:
        base_model: name of the base model in its configuration, if any.
        rank: rank of all its projections.
        alpha: the product is scaled by alpha / rank.
        dropout: dropout during its training.
        fan_in_fan_out: whether square weights of the base model are [in, out].
        widths: in and out features by module.
        copied: names of the tensors that copy base weights, by module. PEFT saves them with an
            adapter of the output head. They have to equal the base's.
        file: its tensors.
    """

    base_model: str | None
    rank: int
    alpha: float
    dropout: float
    fan_in_fan_out: bool
    widths: dict[str, tuple[int, int]]
    copied: dict[str, str]
    file: TensorFile

    @classmethod
    def open(cls, directory: Path) -> PeftAdapter:
        """Open an adapter's directory, reading only the header of its tensors.

        Raises:
            UnsupportedAdapter: a run cannot represent it. The message names the field.
            UnreadableFile: a file is missing or malformed.
        """
        config = read_json(directory / ADAPTER_CONFIG)
        _check_fields(config)
        rank = _positive_integer(config, "r")
        alpha = _finite(config, "lora_alpha")
        if alpha <= 0:
            raise UnsupportedAdapter("lora_alpha", f"{alpha} is not above 0.")
        if config.get("use_rslora"):  # scaled by alpha / sqrt(rank)
            alpha *= math.sqrt(rank)
        file = TensorFile(directory / ADAPTER)
        copied = {module: name for name in file.specs if (module := _copied_module(name))}
        base_model = config.get("base_model_name_or_path")
        return cls(
            base_model=base_model if isinstance(base_model, str) and base_model else None,
            rank=rank,
            alpha=alpha,
            dropout=_finite(config, "lora_dropout", 0.0),
            fan_in_fan_out=config.get("fan_in_fan_out") is True,
            widths=_widths(file, rank, copied.values()),
            copied=copied,
            file=file,
        )

    @property
    def scale(self) -> float:
        """Factor of the product of B and A: alpha / rank."""
        return self.alpha / self.rank

    def a(self, module: str) -> Array:
        """Read a module's A, [rank, in], float32."""
        return self.file.whole(f"{_PREFIX}{module}{_A}")

    def b(self, module: str, first: int = 0, last: int | None = None) -> Array:
        """Read rows of a module's B, [out, rank], float32."""
        last = self.widths[module][1] if last is None else last
        return self.file.rows(f"{_PREFIX}{module}{_B}", first, last)

    def check_finite(self) -> None:
        """Read its weights through. Raises `DivergedAdapter` if one is NaN or infinite."""
        names = [f"{_PREFIX}{module}{part}" for module in self.widths for part in (_A, _B)]
        wrong = [name for name in names if not self._is_finite(name)]
        if wrong:
            raise DivergedAdapter(
                f"This adapter has diverged: its weights hold NaN or infinity in {len(wrong)} of "
                f"{len(names)} tensors, first in {wrong[0]}. Go back to an earlier checkpoint."
            )

    def _is_finite(self, name: str) -> bool:
        ranges = row_ranges(self.file.specs[name].shape)
        return all(np.isfinite(self.file.rows(name, *each)).all() for each in ranges)


def with_target_parameters(
    config: Mapping[str, Any], modules: Collection[str], parameters: Collection[str]
) -> dict[str, Any]:
    """Return an adapter_config.json that names modules as PEFT has to find them.

    Args:
        config: content of the saved one.
        modules: the modules that the adapter adapts.
        parameters: last names of modules that PEFT would take for routed experts in
            ``target_modules``. They go to ``target_parameters``.
    """
    named = config.get("target_modules")
    if not isinstance(named, list):
        return dict(config)
    moved = {name for name in named if _last(name) in parameters}
    if not moved:
        return dict(config)
    own = [f"{each}.weight" for each in modules if _last(each) in {_last(name) for name in moved}]
    return {
        **config,
        "target_modules": [name for name in named if name not in moved],
        "target_parameters": [*(config.get("target_parameters") or []), *own],
    }


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _check_fields(config: Mapping[str, Any]) -> None:
    for field, values in _ALLOWED.items():
        if config.get(field, values[0]) not in values:
            allowed = ", ".join(repr(value) for value in values)
            raise UnsupportedAdapter(field, f"{config[field]!r:.100} is not one of {allowed}.")
    for field, value in config.items():
        if field == "target_parameters" and _projections_only(value):
            continue
        if field not in _IGNORED and field not in _ALLOWED and _is_set(value):
            raise UnsupportedAdapter(
                field,
                f"{value!r:.100} can't be represented: a run has one rank and one alpha over "
                "whole projections, without weights of other kinds. Merge the adapter into its "
                "base model with PEFT, or train one without this.",
            )


def _projections_only(target_parameters: Any) -> bool:
    """Whether all parameters are whole projections' weights, not experts stacked in one."""
    return isinstance(target_parameters, list) and all(
        isinstance(name, str) and name.endswith(".weight") for name in target_parameters
    )


def _is_set(value: Any) -> bool:
    """Whether a field has a value other than null, false or empty, at any depth."""
    if isinstance(value, dict):
        return any(map(_is_set, value.values()))
    return bool(value)


def _positive_integer(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if type(value) is not int or not 1 <= value <= _MAX_INTEGER:
        raise UnsupportedAdapter(
            field, f"{value!r:.100} is not a whole number from 1 to {_MAX_INTEGER}."
        )
    return value


def _finite(config: Mapping[str, Any], field: str, absent: float | None = None) -> float:
    value = config.get(field, absent)
    is_number = type(value) is float or (type(value) is int and abs(value) <= _MAX_INTEGER)
    if not is_number or not math.isfinite(value):
        raise UnsupportedAdapter(field, f"{value!r:.100} is not a finite number.")
    return float(value)


def _copied_module(name: str) -> str | None:
    """Return the module whose base weight a tensor copies, if any."""
    module = name.removeprefix(_PREFIX).removesuffix(".weight").removesuffix(".base_layer")
    is_table = module.rsplit(".", 1)[-1] in (*HEADS, *EMBEDDINGS)
    return module if name in (f"{_PREFIX}{module}{end}" for end in _WEIGHTS) and is_table else None


def _widths(file: TensorFile, rank: int, copied: Collection[str]) -> dict[str, tuple[int, int]]:
    """Return in and out features by module, checking that all tensors are pairs of A and B."""
    ins: dict[str, int] = {}
    outs: dict[str, int] = {}
    for name, spec in file.specs.items():
        if name in copied:
            continue
        widths = ins if name.endswith(_A) else outs if name.endswith(_B) else None
        if widths is None or not name.startswith(_PREFIX):
            raise UnsupportedAdapter(
                name, f"not a tensor of an adapter ({_PREFIX}<module>{_A} or {_B.lstrip('.')})."
            )
        if len(spec.shape) != 2 or spec.dtype not in FLOAT_BYTES:
            raise UnsupportedAdapter(
                name, f"{spec.dtype} {list(spec.shape)} is no matrix of floats."
            )
        own_rank, width = spec.shape if widths is ins else spec.shape[::-1]
        if own_rank != rank:
            raise UnsupportedAdapter(
                name, f"shape {list(spec.shape)} is not that of rank {rank} (r)."
            )
        widths[name.removeprefix(_PREFIX).removesuffix(_A if widths is ins else _B)] = width
    if unpaired := sorted(ins.keys() ^ outs.keys()):
        raise UnsupportedAdapter(unpaired[0], "only one of its lora_A and lora_B is there.")
    if not ins:
        raise UnreadableFile(f"{file.path.name} holds no tensors.")
    return {module: (width, outs[module]) for module, width in ins.items()}
