"""Prepared samples: sample requests as the ledger keeps them, with what a check said."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from everstep.engine.errors import InputError
from everstep.engine.prepared_pass import ModelLimits
from everstep.engine.sampling.validation import check_sample
from everstep.wire import types
from everstep.wire.errors import WireError
from everstep.worker.protocol.errors import OperationFailed
from everstep.worker.protocol.sample_spec import sample_spec

_ANY_SEED = 0


@dataclass(frozen=True)
class PreparedSample:
    """A sample request in its canonical form, with what a check said.

    Attributes:
        sampling_session_id: its sampler.
        seq_id: its sequence id.
        payload: the request as canonical JSON: equal requests give equal bytes.
        failures: why a model can't sample it, or None if it can, by the limits that were checked.
    """

    sampling_session_id: str | None
    seq_id: int | None
    payload: bytes = field(repr=False)
    failures: Mapping[ModelLimits, str | None]


def prepare_sample(request: types.SampleRequest, models: Iterable[ModelLimits]) -> PreparedSample:
    """Encode a sample request, and check it for each model that its sampler may have."""
    content = request.model_dump(mode="json", exclude_none=True)
    failures: dict[ModelLimits, str | None] = {}
    for limits in models:
        failures[limits] = None
        try:
            check_sample(
                sample_spec(content, _ANY_SEED),
                vocab_size=limits.vocab_size,
                max_context_length=limits.max_context_length,
            )
        except (InputError, OperationFailed, WireError) as error:
            failures[limits] = str(error)
    payload = json.dumps(content, separators=(",", ":"), sort_keys=True).encode()
    return PreparedSample(request.sampling_session_id, request.seq_id, payload, failures)
