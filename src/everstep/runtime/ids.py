"""Ids: names of runs, samplers and losses, and the kinds of operations in the ledger.

A run is ``<session>:train:<n>``. Operation 0 creates it, and its training operations have the
sequence ids 1, 2, …. A sampler is ``<session>:sample:<n>``, or ``<run>:sample:<n>`` if the run's
n-th operation saves its weights. A sampler numbers its own samples.
"""

from __future__ import annotations

import hashlib

from everstep.ledger import records

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
SAMPLE = records.SAMPLE
CREATE_CUSTOM_LOSS = "create_custom_loss"
MISSING = "missing"
"""Kind of a row that takes the sequence id of an operation that did not arrive in time."""

PASSES = frozenset({FORWARD, FORWARD_BACKWARD})
"""Kinds whose requests are large."""
LOGGED = PASSES | {SAMPLE}
"""Kinds whose large requests go to the payload log. Requests of others are read by statements of
the ledger, and stay in their rows."""
CHANGES_STATE = frozenset({FORWARD_BACKWARD, OPTIM_STEP, LOAD_WEIGHTS})
"""Kinds that change a run's state and that recovery replays."""


def run_id(session_id: str, model_seq_id: int) -> str:
    """Return the id of a session's n-th run, as clients compute it."""
    return f"{session_id}:train:{model_seq_id}"


def sampler_id(session_id: str, sampling_session_seq_id: int) -> str:
    """Return the id of a session's n-th sampler."""
    return f"{session_id}:sample:{sampling_session_seq_id}"


def alias_sampler_id(sampler: str, subject: str) -> str:
    """Return the id of a sampler whose number belongs to a sampler of other weights."""
    return f"{sampler}:{hashlib.sha256(subject.encode()).hexdigest()[:16]}"


def saved_sampler_id(run: str, seq_id: int) -> str:
    """Return the id of the sampler on an unnamed save of a run.

    It does not contain the number that the client gives it: Tinkex counts these from 0 in each run.
    """
    return f"{run}:sample:{seq_id}"


def unload_scope(run: str) -> str:
    """Return the ledger scope of a run's unload operations, which clients don't number."""
    return f"{run}/unload"


def loss_scope(session_id: str) -> str:
    """Return the ledger scope of a session's custom losses, by ``custom_loss_seq_id``."""
    return f"{session_id}:loss"


def loss_id(scope: str, custom_loss_seq_id: int) -> str:
    """Return the id of a session's n-th custom loss."""
    return f"{scope}:{custom_loss_seq_id}"


def seed_for(scope: str, seq_id: int) -> int:
    """Return the seed of a request that has none: 31 bits, equal for retries and replays."""
    digest = hashlib.sha256(f"{scope}#{seq_id}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1
