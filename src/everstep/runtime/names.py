"""Ids and kinds of operations: what the ledger's rows are called.

A run is ``<session>:train:<n>`` and its training operations carry the sequence ids 1, 2, …; what
creates it is operation 0. A sampler is ``<session>:sample:<n>``, or ``<run>:sample:<n>`` where the
run's n-th operation saves what it samples from, and numbers its own samples.
"""

from __future__ import annotations

import hashlib

CREATE_MODEL = "create_model"
CREATE_FROM_STATE = "create_from_state"
FORWARD = "forward"
FORWARD_BACKWARD = "forward_backward"
OPTIM_STEP = "optim_step"
SAVE_WEIGHTS = "save_weights"
SAVE_WEIGHTS_FOR_SAMPLER = "save_weights_for_sampler"
SAVE_WEIGHTS_EXTERNAL = "save_weights_external"
LOAD_WEIGHTS = "load_weights"
UNLOAD_MODEL = "unload_model"
SAMPLE = "sample"
CREATE_CUSTOM_LOSS = "create_custom_loss"
MISSING = "missing"
"""Takes the place of an operation that did not arrive in time."""

PASSES = frozenset({FORWARD, FORWARD_BACKWARD})
"""Kinds whose requests are large."""
CHANGES_STATE = frozenset({FORWARD_BACKWARD, OPTIM_STEP, LOAD_WEIGHTS})
"""Kinds that change a run's state: what recovery applies again."""


def run_id(session_id: str, model_seq_id: int) -> str:
    """The id of a session's n-th run, as the client expects it."""
    return f"{session_id}:train:{model_seq_id}"


def sampler_id(session_id: str, sampling_session_seq_id: int) -> str:
    """The id of a session's n-th sampler."""
    return f"{session_id}:sample:{sampling_session_seq_id}"


def twin_sampler_id(sampler: str, subject: str) -> str:
    """The id of a sampler whose number another one has, that samples from something else."""
    return f"{sampler}:{hashlib.sha256(subject.encode()).hexdigest()[:16]}"


def saved_sampler_id(run: str, seq_id: int) -> str:
    """The id of the sampler on what a run's operation saves without a name.

    Not by the number that its client gives it: Tinkex counts these in each run, from 0.
    """
    return f"{run}:sample:{seq_id}"


def unload_scope(run: str) -> str:
    """The ledger scope of a run's unload operations, which carry no sequence id."""
    return f"{run}/unload"


def loss_scope(session_id: str) -> str:
    """The ledger scope of a session's own losses, numbered by their ``custom_loss_seq_id``."""
    return f"{session_id}:loss"


def loss_id(scope: str, custom_loss_seq_id: int) -> str:
    """The id of a session's n-th loss."""
    return f"{scope}:{custom_loss_seq_id}"


def seed_for(scope: str, seq_id: int) -> int:
    """The seed of a request that names none: 31 bits, the same for every retry and replay."""
    digest = hashlib.sha256(f"{scope}#{seq_id}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1
