"""Provenance: adds the logprobs recorded at sampling to the passes that train on them.

A pass is accepted with the logprobs inside: its replay needs no record, whatever became of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from everstep.engine.losses.specs import SAMPLED_SEQUENCES, SAMPLING_LOGPROBS, TARGETS
from everstep.ledger import Ledger, LedgerDamaged, RecordedSample
from everstep.runtime.errors import OperationFailed
from everstep.runtime.sampling.recorded import SampledTokens, sampled_tokens
from everstep.wire.errors import ErrorCategory
from everstep.wire.messages.inputs import ProvenanceSpan, SampledProvenanceSpan
from everstep.wire.messages.passes import Example, TrainingPass

Array = np.ndarray[Any, Any]
_MAX_INDEX_DIGITS = 9


async def with_recorded(
    ledger: Ledger, session_id: str, request: TrainingPass, keep_seconds: float
) -> tuple[TrainingPass, tuple[str, ...]]:
    """Add the recorded logprobs of the sequences that a pass's provenance names.

    Args:
        ledger: holds the records.
        session_id: the session of the pass's run. Only its samples can be named.
        request: the pass. `check_pass` has accepted it.
        keep_seconds: how long a record is kept after its last use.

    Returns:
        The pass with `SAMPLING_LOGPROBS` and `SAMPLED_SEQUENCES`, and the request ids of the
        samples.

    Raises:
        OperationFailed: a datum has no provenance, names a sequence that is not recorded, or
            differs from what was sampled. Or a record is damaged.
    """
    names: dict[str, int] = {}  # each sequence with the first datum that names it
    for index, example in enumerate(request.examples):
        for span in _spans(example, index):
            names.setdefault(span.sequence_id, index)
    request_ids = tuple(dict.fromkeys(_request_id(name) for name in names))
    try:
        records = await ledger.samples.recorded.read(request_ids)
    except LedgerDamaged as damage:
        raise OperationFailed(str(damage), ErrorCategory.SERVER) from damage
    oldest = datetime.now(UTC) - timedelta(seconds=keep_seconds)
    usable = {
        request_id: sampled_tokens(record)
        for request_id, record in records.items()
        if _usable(record, session_id, oldest)
    }
    sequences: dict[str, SampledTokens] = {}
    for name, index in names.items():
        found = _sequence(usable.get(_request_id(name), []), name)
        if found is None:
            reason = await _missing(ledger, session_id, name, keep_seconds)
            raise OperationFailed(f"datum {index}: sequence {name[:200]!r} {reason}")
        sequences[name] = found
    examples = [
        _with_logprobs(example, f"datum {index}", sequences)
        for index, example in enumerate(request.examples)
    ]
    return replace(request, examples=examples), request_ids


def with_recorded_of(request: TrainingPass, accepted: TrainingPass) -> TrainingPass:
    """Add the logprobs that an earlier request with the same sequence id was accepted with."""
    names = (SAMPLING_LOGPROBS, SAMPLED_SEQUENCES)
    examples = [
        replace(new, inputs={**new.inputs, **{n: old.inputs[n] for n in names if n in old.inputs}})
        for new, old in zip(request.examples, accepted.examples, strict=False)
    ]
    return replace(request, examples=[*examples, *request.examples[len(examples) :]])


def _spans(example: Example, index: int) -> list[ProvenanceSpan]:
    """Return the spans of a datum that cover tokens. Raises `OperationFailed` without any."""
    provenance = example.provenance
    if provenance is None:
        raise OperationFailed(
            f"datum {index} has no provenance, which stable_reinforce needs: sample with "
            "record_stability_info=True, and name the sequences of its tokens with "
            "Datum.with_provenance."
        )
    for field, spans in (
        ("model_input", provenance.model_input),
        ("loss_fn_input", provenance.targets),
    ):
        total = sum(span.length for span in spans)
        if total != len(example.tokens):
            raise OperationFailed(
                f"datum {index}: the spans of {field} cover {total} positions, but there are "
                f"{len(example.tokens)}; they have to cover each once, in order."
            )
    return [span for span in (*provenance.model_input, *provenance.targets) if span.length]


def _request_id(sequence_id: str) -> str:
    return sequence_id.rpartition(":")[0]


def _usable(record: RecordedSample, session_id: str, oldest: datetime) -> bool:
    used = record.last_used_at
    return record.session_id == session_id and used is not None and used >= oldest


def _sequence(sequences: list[SampledTokens], sequence_id: str) -> SampledTokens | None:
    number = sequence_id.rpartition(":")[2]
    readable = number.isascii() and number.isdecimal() and len(number) <= _MAX_INDEX_DIGITS
    known = readable and int(number) < len(sequences)
    return sequences[int(number)] if known else None


async def _missing(ledger: Ledger, session_id: str, sequence_id: str, keep_seconds: float) -> str:
    """Say why a sequence can't be used, and what to do."""
    operation = await ledger.operation(_request_id(sequence_id))
    sampler = await ledger.sampler(operation.scope) if operation is not None else None
    if operation is None or sampler is None or sampler.session_id != session_id:
        return "was not sampled in this run's session. Sample and train in the same session."
    if operation.status != "succeeded" or operation.finished_at is None:
        ended = "failed" if operation.status == "failed" else "has not finished"
        return f"has no tokens: its sample {ended}."
    hours = f"{keep_seconds / 3600:g} h"
    if datetime.now(UTC) - operation.finished_at < timedelta(seconds=keep_seconds):
        return (
            "was sampled without record_stability_info=True (see create_sampling_client and "
            "save_weights_and_get_sampling_client), or does not exist in its sample."
        )
    return (
        f"was sampled without record_stability_info=True, or its record has expired: records are "
        f"kept for {hours} after their last use. Sample again."
    )


def _with_logprobs(example: Example, where: str, sequences: Mapping[str, SampledTokens]) -> Example:
    """Add the recorded logprobs to a datum.

    Raises:
        OperationFailed: a span claims other tokens than were sampled.
    """
    provenance = example.provenance
    assert provenance is not None
    _check_tokens(example.tokens, provenance.model_input, f"{where}, model_input", sequences, True)
    targets = example.inputs[TARGETS]
    _check_tokens(targets, provenance.targets, f"{where}, target_tokens", sequences, False)
    logprobs = np.zeros(len(targets), dtype=np.float32)
    numbers = np.full(len(targets), -1, dtype=np.int64)
    counted: dict[str, int] = {}
    seen: dict[str, Array] = {}
    position = 0
    for span in provenance.targets:
        here, there = _slices(span, position)
        position += span.length
        if not span.length or not isinstance(span, SampledProvenanceSpan):
            continue
        sequence = sequences[span.sequence_id]
        taken = seen.setdefault(span.sequence_id, np.zeros(len(sequence.tokens), dtype=bool))
        if taken[there].any():
            raise OperationFailed(
                f"{where}, target_tokens: spans cover a token of sequence {span.sequence_id!r} "
                "twice."
            )
        taken[there] = True
        logprobs[here] = sequence.logprobs[there]
        numbers[here] = counted.setdefault(span.sequence_id, len(counted))
    _check_values(example, where, logprobs, numbers)
    recorded: dict[str, Array] = {SAMPLING_LOGPROBS: logprobs, SAMPLED_SEQUENCES: numbers}
    return replace(example, inputs={**example.inputs, **recorded})


def _slices(span: ProvenanceSpan, position: int) -> tuple[slice, slice]:
    """Return the positions of a span in the datum and in the sequence."""
    return (
        slice(position, position + span.length),
        slice(span.offset, span.offset + span.length),
    )


def _check_tokens(
    tokens: Array,
    spans: tuple[ProvenanceSpan, ...],
    where: str,
    sequences: Mapping[str, SampledTokens],
    check_prompts: bool,
) -> None:
    """Raise `OperationFailed` for tokens that are not those of their span.

    Targets that belong to a prompt may be anything, because no loss is computed for them.
    """
    position = 0
    for span in spans:
        here, there = _slices(span, position)
        position += span.length
        if not span.length:
            continue
        sequence = sequences[span.sequence_id]
        sampled = isinstance(span, SampledProvenanceSpan)
        source, kind = (sequence.tokens, "sampled") if sampled else (sequence.prompt, "prompt")
        if there.stop > len(source):
            raise OperationFailed(
                f"{where}: a span covers {kind} tokens {there.start} to {there.stop - 1} of "
                f"sequence {span.sequence_id!r}, which has {len(source)}."
            )
        differs = np.flatnonzero(tokens[here] != source[there])
        if len(differs) and (sampled or check_prompts):
            first = int(differs[0])
            raise OperationFailed(
                f"{where}: the token at position {here.start + first} is "
                f"{int(tokens[here.start + first])}, but {kind} token {there.start + first} of "
                f"sequence {span.sequence_id!r} is {int(source[there.start + first])}. Recorded "
                "logprobs belong to the tokens that were sampled."
            )


def _check_values(example: Example, where: str, logprobs: Array, numbers: Array) -> None:
    """Raise `OperationFailed` for logprobs that can't be used or advantages without one."""
    if not np.isfinite(logprobs).all():
        raise OperationFailed(
            f"{where}: a recorded logprob is {logprobs[~np.isfinite(logprobs)][0]}. The weights "
            "that it was sampled from had diverged."
        )
    stray = np.flatnonzero((example.inputs["advantages"] != 0) & (numbers < 0))
    if len(stray):
        raise OperationFailed(
            f"{where}: loss_fn_inputs['advantages'] is "
            f"{example.inputs['advantages'][stray[0]]} at position {int(stray[0])}, which is not a "
            "sampled token. Only sampled tokens may have an advantage."
        )
