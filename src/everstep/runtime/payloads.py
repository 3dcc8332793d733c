"""Payloads: the canonical form of requests in the ledger, and the rows of new runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from everstep.ledger import Run, as_strings
from everstep.runtime.errors import OperationFailed
from everstep.wire import types
from everstep.wire.paths import validate_name
from everstep.worker.encryption import check_recipients

_UNDISCLOSED = ("dimuon",)
"""Optimizers of the hosted service with public parameters and unpublished arithmetic."""


def payload_json(value: Mapping[str, Any]) -> bytes:
    """Encode as canonical JSON: equal requests give equal bytes."""
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def optimizer_of(config: Any) -> dict[str, Any]:
    """Return an optimizer's configuration as JSON. AdamW if the request has none."""
    return config.model_dump(mode="json") if config is not None else {"type": "adamw"}


def check_optimizer(optimizer: Mapping[str, Any]) -> None:
    """Raise `OperationFailed` for an optimizer that is not supported."""
    if optimizer["type"] != "adamw":
        undisclosed = optimizer["type"] in _UNDISCLOSED
        why = "how it is defined is not public" if undisclosed else "there is no such optimizer"
        raise OperationFailed(
            f"Optimizer {optimizer['type']!r} is not supported here: {why}. Use 'adamw'."
        )


def new_run(
    run_id: str,
    session_id: str,
    base_model: str,
    lora: dict[str, Any],
    optimizer: dict[str, Any],
    request: types.CreateModelRequest | types.LoadWeightsRequest,
) -> Run:
    """Build the row of a run that a request creates."""
    now = datetime.now(UTC)
    return Run(
        run_id=run_id,
        session_id=session_id,
        base_model=base_model,
        lora=lora,
        optimizer=optimizer,
        user_metadata=as_strings(request.user_metadata),
        created_at=now,
        last_request_at=now,
        status="live",
    )


def optim_step_payload(request: types.OptimStepRequest) -> dict[str, Any]:
    """Build the payload of an optimizer step. Raises `OperationFailed` for invalid values."""
    params = request.adam_params
    if params is None:
        other = request.optimizer_params
        if other is not None and other.type != "adamw":
            raise OperationFailed(
                f"Optimizer {other.type!r} is not supported here; use AdamParams."
            )
        params = types.AdamParams()
    values = params.model_dump(
        include={"learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm"}
    )
    for field, value in values.items():
        upper = 1.0 if field.startswith("beta") else math.inf
        if not (0 <= value < upper):
            raise OperationFailed(
                f"adam_params.{field} must be a finite number, at least 0"
                f"{' and below 1' if upper == 1.0 else ''}; got {value}."
            )
    return {"params": values}


def save_payload(request: types.SaveWeightsRequest) -> dict[str, Any]:
    """Build the payload of a save of the training state. Raises `InvalidName`."""
    name = request.path if request.path is not None else f"checkpoint-{request.seq_id:06d}"
    return {
        "name": validate_name(name),
        "ttl_seconds": request.ttl_seconds,
        "overwrite": request.overwrite,
        "user_metadata": request.user_metadata,
    }


def external_payload(request: types.SaveWeightsExternalRequest) -> dict[str, Any]:
    """Build the payload of an external save. Raises `InvalidName`, `OperationFailed`."""
    check_recipients(request.age_encryption_recipients)
    return {
        "name": validate_name(request.path),
        "ttl_seconds": request.ttl_seconds,
        "user_metadata": None,
        "age_encryption_recipients": request.age_encryption_recipients or [],
    }
