"""Optimizers: families and the parameters of a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError

from everstep.wire.base import Model, Request, convert, problems
from everstep.wire.fields import fields_of


class OptimizerConfigBase(BaseModel):
    """An optimizer family, chosen when a run is created. Unknown fields are kept."""

    model_config = ConfigDict(extra="allow", frozen=True)
    type: str


class AdamOptimizerConfig(OptimizerConfigBase):
    """AdamW."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["adamw"] = "adamw"


class DimuonOptimizerConfig(OptimizerConfigBase):
    """Dimuon."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["dimuon"] = "dimuon"
    version: Literal[1] = 1


OptimizerConfig = AdamOptimizerConfig | DimuonOptimizerConfig | SerializeAsAny[OptimizerConfigBase]


class AdamParams(Request):
    """Parameters of one AdamW step, with decoupled decay. A clip norm of 0 means no clipping."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class OptimParamsBase(BaseModel):
    """Parameters of a step of another family. Unknown fields are kept."""

    model_config = ConfigDict(extra="allow", frozen=True)
    type: str


class DimuonParams(OptimParamsBase):
    """Parameters of one Dimuon step."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    type: Literal["dimuon"] = "dimuon"
    learning_rate: float = Field(ge=0)
    grad_clip_norm: float = 0.0
    beta1: float = Field(default=0.9, ge=0, lt=1)


OtherOptimParams = DimuonParams | SerializeAsAny[OptimParamsBase]
OptimParams = AdamParams | OtherOptimParams


def to_optim_params(value: Any) -> OptimParams:
    """Return the parameters of a step, whoever's class they are. Without a ``type``: Adam's.

    Raises:
        TypeError: the value is no such object.
        ValueError: a parameter has a wrong value, or doesn't exist.
    """
    if isinstance(value, AdamParams | OptimParamsBase):
        return value
    fields = fields_of(value, {"type", *AdamParams.model_fields})
    kind = fields.get("type", "") if isinstance(fields, Mapping) else None
    if not isinstance(kind, str):
        raise TypeError(f"optim_step takes AdamParams; got {type(value).__name__}")
    if not kind:
        return convert(AdamParams, value, "optim_params")
    family = DimuonParams if kind == "dimuon" else OptimParamsBase
    return _validated(family, fields, f"optim_params of type {kind!r}")


def to_optimizer_config(value: Any) -> OptimizerConfigBase:
    """Return an optimizer family, whoever's class it is. None is AdamW.

    Raises:
        TypeError: the value has no ``type``.
        ValueError: a field of a known family has a wrong value, or doesn't exist.
    """
    if value is None:
        return AdamOptimizerConfig()
    if isinstance(value, OptimizerConfigBase):
        return value
    fields = fields_of(value, ("type",))
    kind = fields.get("type") if isinstance(fields, Mapping) else None
    if not isinstance(kind, str):
        raise TypeError(f"optimizer has to be an OptimizerConfig; got {type(value).__name__}")
    family = _FAMILIES.get(kind, OptimizerConfigBase)
    return _validated(family, fields, f"optimizer of type {kind!r}")


_FAMILIES: dict[str, type[OptimizerConfigBase]] = {
    "adamw": AdamOptimizerConfig,
    "dimuon": DimuonOptimizerConfig,
}


def _validated(kind: type[Model], fields: Mapping[str, Any], name: str) -> Model:
    try:
        return kind.model_validate(dict(fields))
    except ValidationError as error:
        raise ValueError(f"{name}: {problems(error, 'type')}") from error
