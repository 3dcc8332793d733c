"""An adapter in PEFT's format, as somebody else may have made it.

    adapter_config.json          what it is
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight  [rank, in]
                                 base_model.model.<module>.lora_B.weight  [out, rank]

A run is one rank and one scale over whole projections. Whatever else a configuration asks for is
refused, with its field named: it is never loaded as something that it is not. So is a field that
PEFT may get one day, unless it is null, false or empty.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everstep.interchange.base import EMBEDDINGS, HEADS, read_json
from everstep.interchange.errors import AdapterRefused, Unreadable
from everstep.interchange.numbers import SIZES, Array
from everstep.interchange.tensors import TensorFile

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PICKLED = "adapter_model.bin"
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_WEIGHTS = (".weight", ".base_layer.weight")
_SAYS_NOTHING = frozenset(
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
"""Fields that are read elsewhere, or only say how the tensors, which are there, were chosen."""
_ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM"),
    "bias": (None, "none"),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}
"""Fields and the values that a run can have. Other initialisations change the base model."""


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter that was looked at, and whose tensors are as its configuration says.

    Attributes:
        base_model: what it says that it was trained on; None where it doesn't.
        rank: of all its projections.
        alpha: the product is scaled by alpha / rank.
        dropout: what it was trained with.
        fan_in_fan_out: whether square weights of the base model are [in, out].
        widths: in and out features by module.
        copied: base weights that the file holds as well, as PEFT saves them beside an adapter of
            the output head: their modules, and the tensors' names. They have to be the base's.
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
        """Look at an adapter's directory; of its tensors only the header is read.

        Raises:
            AdapterRefused: a run can't be made of it; names the field.
            Unreadable: a file isn't there, or not what it should be.
        """
        config = read_json(directory / ADAPTER_CONFIG)
        _check_fields(config)
        rank = _whole(config, "r")
        alpha = _finite(config, "lora_alpha")
        if alpha <= 0:
            raise AdapterRefused("lora_alpha", f"{alpha} is not above 0.")
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
        """What the product of B and A is multiplied by."""
        return self.alpha / self.rank

    def a(self, module: str) -> Array:
        """A module's A, [rank, in], float32."""
        return self.file.whole(f"{_PREFIX}{module}{_A}")

    def b(self, module: str, first: int = 0, last: int | None = None) -> Array:
        """Rows of a module's B, [out, rank], float32."""
        last = self.widths[module][1] if last is None else last
        return self.file.rows(f"{_PREFIX}{module}{_B}", first, last)


def _check_fields(config: Mapping[str, Any]) -> None:
    for field, values in _ONLY.items():
        if config.get(field, values[0]) not in values:
            wanted = ", ".join(repr(value) for value in values)
            raise AdapterRefused(field, f"{config[field]!r:.100} is not one of {wanted}.")
    for field, value in config.items():
        if field not in _SAYS_NOTHING and field not in _ONLY and _asks(value):
            raise AdapterRefused(
                field,
                f"{value!r:.100} can't be represented: a run is one rank and one alpha over "
                "whole projections, without weights of other kinds. Merge the adapter into its "
                "base model with PEFT, or train one without this.",
            )


def _asks(value: Any) -> bool:
    """Whether a field asks for anything: nested settings that are all empty don't."""
    if isinstance(value, dict):
        return any(map(_asks, value.values()))
    return bool(value)


def _whole(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if type(value) is not int or value < 1:
        raise AdapterRefused(field, f"{value!r:.100} is not a whole number of 1 or more.")
    return value


def _finite(config: Mapping[str, Any], field: str, absent: float | None = None) -> float:
    value = config.get(field, absent)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise AdapterRefused(field, f"{value!r:.100} is not a finite number.")
    return float(value)


def _copied_module(name: str) -> str | None:
    """The module whose base weight a tensor is a copy of, if it can be one."""
    module = name.removeprefix(_PREFIX).removesuffix(".weight").removesuffix(".base_layer")
    is_table = module.rsplit(".", 1)[-1] in (*HEADS, *EMBEDDINGS)
    return module if name in (f"{_PREFIX}{module}{end}" for end in _WEIGHTS) and is_table else None


def _widths(file: TensorFile, rank: int, copied: Collection[str]) -> dict[str, tuple[int, int]]:
    """In and out features by module; every other tensor is one of a pair of the stated rank."""
    ins: dict[str, int] = {}
    outs: dict[str, int] = {}
    for name, spec in file.specs.items():
        if name in copied:
            continue
        widths = ins if name.endswith(_A) else outs if name.endswith(_B) else None
        if widths is None or not name.startswith(_PREFIX):
            raise AdapterRefused(
                name, f"not a tensor of an adapter ({_PREFIX}<module>{_A} or {_B.lstrip('.')})."
            )
        if len(spec.shape) != 2 or spec.dtype not in SIZES:
            raise AdapterRefused(name, f"{spec.dtype} {list(spec.shape)} is no matrix of floats.")
        mine, width = spec.shape if widths is ins else spec.shape[::-1]
        if mine != rank:
            raise AdapterRefused(name, f"shape {list(spec.shape)} is not that of rank {rank} (r).")
        widths[name.removeprefix(_PREFIX).removesuffix(_A if widths is ins else _B)] = width
    if lone := sorted(ins.keys() ^ outs.keys()):
        raise AdapterRefused(lone[0], "only one of its lora_A and lora_B is there.")
    if not ins:
        raise Unreadable(f"{file.path.name} holds no tensors.")
    return {module: (width, outs[module]) for module, width in ins.items()}
