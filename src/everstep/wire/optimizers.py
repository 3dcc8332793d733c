"""Optimizer families and their parameters a step."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny

from everstep.wire.base import Request


class OptimizerConfigBase(BaseModel):
    """An optimizer family, chosen when a run is created; keeps fields it doesn't know."""

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
    """Parameters of one AdamW step: decoupled decay, 0 for no clipping."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class OptimParamsBase(BaseModel):
    """Parameters of a step of another family; keeps fields it doesn't know."""

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
