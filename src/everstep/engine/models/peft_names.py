"""PEFT names: the names by which PEFT finds an adapter's modules and reads its tensors.

transformers renames and fuses weights of some families as it loads a base model, and PEFT applies
the same to an adapter. It takes ``gate_proj`` in ``target_modules`` for the experts that were
fused, also where it names a dense or shared MLP. Named in ``target_parameters``, the projection is
adapted itself. A renaming that also matches the module's own name would garble a tensor's name:
such tensors are written under the name that PEFT renames to the module's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

_EXPERTS = re.compile(r"\bexperts\b")
_TENSOR = ".lora_A.default.weight"


@dataclass(frozen=True)
class PeftNames:
    """PEFT's names of a model's projections.

    Attributes:
        fused: last names of projections that PEFT would take for fused experts.
        in_files: names in an adapter's files that differ from the module's, by module.
        unloadable: modules whose tensors PEFT can't load under any name.
    """

    fused: frozenset[str] = frozenset()
    in_files: Mapping[str, str] = field(default_factory=dict)
    unloadable: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: PreTrainedModel, modules: Collection[str]) -> PeftNames:
        """Return the names of a model's projections, given their names in the model."""
        transforms = get_model_conversion_mapping(model)
        renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        in_files: dict[str, str] = {}
        unloadable = []
        for module in modules:
            if _renamed(module, renamings) == module:
                continue
            name = _renamed(module, [each.reverse_transform() for each in reversed(renamings)])
            if _renamed(name, renamings) == module:
                in_files[module] = name
            else:
                unloadable.append(module)
        return cls(_fused(transforms), in_files, tuple(unloadable))

    def targets(
        self, modules: Sequence[str], others: Collection[str], *, whole: bool = False
    ) -> dict[str, list[str]]:
        """Return the fields of adapter_config.json that select modules.

        Args:
            modules: the modules.
            others: names of all other modules of the model.
            whole: use whole names, since the checkpoint has modules that are not loaded here.
        """
        parameters = [name for name in modules if _last(name) in self.fused]
        plain = [name for name in modules if _last(name) not in self.fused]
        short = sorted({_last(name) for name in plain})
        taken = {_last(name) for name in others}
        selected = {"target_modules": plain if whole or taken & set(short) else short}
        if parameters:
            selected["target_parameters"] = [f"{name}.weight" for name in parameters]
        return selected


def _fused(transforms: Sequence[Any]) -> frozenset[str]:
    """Return the last names of the expert projections that transformers fuses, and the router's."""
    names = {
        pattern.removesuffix(".weight").rsplit(".", 1)[-1]
        for each in transforms
        if isinstance(each, WeightConverter)
        for pattern in each.source_patterns
        if _EXPERTS.search(pattern)
    }
    return frozenset(names | {"gate"}) if names else frozenset()


def _renamed(module: str, renamings: Sequence[WeightRenaming]) -> str:
    """Return the module whose tensor a module's becomes as PEFT loads it."""
    name = f"{module}{_TENSOR}"
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name.removesuffix(_TENSOR)


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]
