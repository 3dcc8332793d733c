"""Prepared passes: large training passes, encoded and checked away from the service. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from everstep.engine.errors import InputError
from everstep.engine.losses.specs import CUSTOM, LOSSES
from everstep.engine.validation import check_pass
from everstep.spool import Data
from everstep.wire.codecs.proto import TrainingPass, encode_training_pass


@dataclass(frozen=True)
class ModelLimits:
    """What a model allows in a pass.

    Attributes:
        vocab_size: token ids have to be below it.
        max_context_length: maximum tokens of a datum.
    """

    vocab_size: int
    max_context_length: int


@dataclass(frozen=True)
class PreparedPass:
    """A training pass in its canonical form, with what a check said.

    Attributes:
        model_id: its run.
        seq_id: its sequence id in the run.
        loss_fn: name of the loss.
        forward_only: whether it computes no gradients.
        payload: the pass, as `encode_training_pass` encodes it.
        failures: why a model can't compute it, or None if it can, by the limits that were checked.
    """

    model_id: str
    seq_id: int
    loss_fn: str
    forward_only: bool
    payload: Data = field(repr=False)
    failures: Mapping[ModelLimits, str | None]


def prepare(
    request: TrainingPass, models: Iterable[ModelLimits], *, refuse_stable_reinforce: bool
) -> PreparedPass:
    """Encode a pass, and check it for each model that its run may have.

    A pass whose loss reads the ledger is checked for none: that takes what the ledger holds.

    Args:
        request: the pass.
        models: limits of the served models.
        refuse_stable_reinforce: as for `check_pass`.
    """
    failures: dict[ModelLimits, str | None] = {}
    for limits in () if _needs_ledger(request.loss_fn) else models:
        failures[limits] = None
        try:
            check_pass(
                request.examples,
                request.loss_fn,
                request.loss_fn_config,
                vocab_size=limits.vocab_size,
                max_context_length=limits.max_context_length,
                refuse_stable_reinforce=refuse_stable_reinforce,
            )
        except InputError as error:
            failures[limits] = str(error)
    return PreparedPass(
        request.model_id,
        request.seq_id,
        request.loss_fn,
        request.forward_only,
        encode_training_pass(request),
        failures,
    )


def _needs_ledger(loss_fn: str) -> bool:
    return loss_fn == CUSTOM or (loss_fn in LOSSES and LOSSES[loss_fn].recorded)
