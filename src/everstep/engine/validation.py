"""Checks of training requests before they are accepted. No torch.

What passes here can only fail for reasons that could not be seen: so an accepted operation fails
for memory or hardware, not for its input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from everstep.engine.config import MAX_RANK, AdapterConfig
from everstep.engine.errors import InputError
from everstep.engine.loss_graph import LossProgram
from everstep.wire.proto import Example

Array = np.ndarray[Any, Any]
POLICY_INPUTS = ("target_tokens", "logprobs", "advantages")
INPUTS: Mapping[str, tuple[str, ...]] = {
    "cross_entropy": ("target_tokens",),
    "importance_sampling": POLICY_INPUTS,
    "ppo": POLICY_INPUTS,
    "cispo": POLICY_INPUTS,
    "dro": POLICY_INPUTS,
    "gspo": (*POLICY_INPUTS, "sequence_ratio_mask"),
}
"""What each loss needs of every datum."""
OPTIONAL: Mapping[str, tuple[str, ...]] = {"cross_entropy": ("weights",)}
CONFIG: Mapping[str, Mapping[str, float]] = {
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    "cispo": {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
    "dro": {"beta": 0.05},
    "gspo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
}
"""What each loss can be told, with the defaults."""
CUSTOM = "custom"
"""A loss of a user's own, by its ``loss_id``."""
LOSS_ID = "loss_id"
PROGRAM = "program"
"""Where an accepted pass carries such a loss itself, so that its replay needs nothing else."""
UNDISCLOSED = ("stable_reinforce",)
"""Losses of the hosted service of which no definition is public."""


def check_adapter(config: AdapterConfig) -> None:
    """Raise `InputError` for an adapter that can't be made."""
    if config.rank <= 0:
        raise InputError(f"lora_config.rank must be positive; got {config.rank}")
    if config.rank > MAX_RANK:
        raise InputError(f"lora_config.rank must be at most {MAX_RANK}; got {config.rank}")
    if not (config.train_attn or config.train_mlp or config.train_unembed):
        raise InputError("At least one of train_unembed, train_mlp, or train_attn must be True")
    if not 0 <= config.seed < 2**63:
        raise InputError(f"lora_config.seed must be 0 to 2^63 - 1; got {config.seed}")


def check_pass(
    examples: Sequence[Example],
    loss_fn: str,
    config: Mapping[str, float | str],
    *,
    vocab_size: int,
    max_context_length: int,
    program: LossProgram | None = None,
) -> None:
    """Raise `InputError` for a training pass that can't be computed.

    Args:
        examples: the datums.
        loss_fn: the loss's name.
        config: its settings.
        vocab_size: token ids are below it.
        max_context_length: most tokens of a datum.
        program: of the loss ``custom``, and only of that.
    """
    if program is None:
        _check_loss(loss_fn)
        _check_config(loss_fn, config)
    if not examples:
        raise InputError("data is empty; give at least one datum.")
    for index, example in enumerate(examples):
        where = f"datum {index}"
        if example.media:
            raise InputError(f"{where} has a chunk of type {example.media[0]!r}; use text tokens.")
        length = len(example.tokens)
        if length == 0:
            raise InputError(f"{where}: model_input has no tokens.")
        if length > max_context_length:
            raise InputError(
                f"{where} has {length} tokens; the model's context window is {max_context_length}."
            )
        check_tokens(example.tokens, vocab_size, f"{where}, model_input")
        if program is None:
            _check_inputs(example, loss_fn, where, vocab_size)
        else:
            _check_custom_inputs(example, program, where, vocab_size)


def _check_loss(loss_fn: str) -> None:
    if loss_fn in INPUTS:
        return
    why = "its definition is not public" if loss_fn in UNDISCLOSED else "there is no such loss"
    raise InputError(
        f"Loss {loss_fn!r} is not supported here: {why}. Use one of {', '.join(INPUTS)}, or a loss "
        "of your own (forward_backward_custom)."
    )


def check_tokens(tokens: Array, vocab_size: int, where: str) -> None:
    """Raise `InputError` naming the first token id that is out of range."""
    wrong = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
    if len(wrong):
        position = int(wrong[0])
        raise InputError(
            f"{where}: token id {int(tokens.ravel()[position])} at position {position} is not in "
            f"the vocabulary of {vocab_size}."
        )


def _check_config(loss_fn: str, config: Mapping[str, float | str]) -> None:
    known = CONFIG[loss_fn]
    for key, value in config.items():
        if key not in known:
            allowed = ", ".join(known) or "nothing"
            raise InputError(
                f"loss_fn_config[{key!r}] is unknown to {loss_fn}; it takes {allowed}."
            )
        if isinstance(value, str) or not np.isfinite(value):
            raise InputError(f"loss_fn_config[{key!r}] must be a finite number; got {value!r}.")
    settings = {**known, **config}
    low, high = settings.get("clip_low_threshold", 0.0), settings.get("clip_high_threshold", 0.0)
    if low > high:  # type: ignore[operator]
        raise InputError(
            f"loss_fn_config: clip_low_threshold {low} is above clip_high_threshold {high}."
        )


def _check_inputs(example: Example, loss_fn: str, where: str, vocab_size: int) -> None:
    needed = INPUTS[loss_fn]
    for name in needed:
        if name not in example.inputs:
            raise InputError(f"{where}: loss_fn_inputs[{name!r}] is missing; {loss_fn} needs it.")
    allowed = (*needed, *OPTIONAL.get(loss_fn, ()))
    for name in example.inputs:
        if name not in allowed:
            raise InputError(
                f"{where}: loss_fn_inputs[{name!r}] is unknown to {loss_fn}; it takes "
                f"{', '.join(allowed)}."
            )
    targets = example.inputs["target_tokens"]
    _check_targets(targets, len(example.tokens), loss_fn, where, vocab_size)
    for name, array in example.inputs.items():
        if name == "target_tokens":
            continue
        if array.shape != targets.shape:
            raise InputError(
                f"{where}: loss_fn_inputs[{name!r}] has shape {list(array.shape)}; target_tokens "
                f"has {list(targets.shape)}."
            )
        wrong = np.flatnonzero(~np.isfinite(array.ravel()))
        if len(wrong):
            raise InputError(
                f"{where}: loss_fn_inputs[{name!r}] is {array.ravel()[wrong[0]]} at position "
                f"{int(wrong[0])}; it has to be finite."
            )
        if name == "sequence_ratio_mask" and (array < 0).any():
            raise InputError(
                f"{where}: loss_fn_inputs[{name!r}] holds {array.min()}; a mask is 0 or more."
            )


def _check_custom_inputs(
    example: Example, program: LossProgram, where: str, vocab_size: int
) -> None:
    """What a loss of a user's own reads has to be there, in its rank; the rest is not looked at."""
    for name, rank in program.inputs.items():
        key = "target_tokens" if name == "logprobs" else name
        if key not in example.inputs:
            raise InputError(
                f"{where}: loss_fn_inputs[{key!r}] is missing; loss {program.name!r} reads it."
            )
        array = example.inputs[key]
        found = 0 if rank == 0 and array.size == 1 else array.ndim
        if found != rank:
            raise InputError(
                f"{where}: loss_fn_inputs[{key!r}] has rank {found}; loss {program.name!r} was "
                f"created for rank {rank}."
            )
    targets = example.inputs["target_tokens"]
    _check_targets(targets, len(example.tokens), CUSTOM, where, vocab_size)


def _check_targets(targets: Array, length: int, loss_fn: str, where: str, vocab_size: int) -> None:
    if targets.dtype.kind != "i":
        raise InputError(f"{where}: target_tokens must be int64; got {targets.dtype}.")
    wide = loss_fn in ("cross_entropy", CUSTOM)
    shapes = "[T] or [T, K]" if wide else "[T]"
    dimensions = (1, 2) if wide else (1,)
    if targets.ndim not in dimensions or targets.shape[0] != length or targets.size == 0:
        raise InputError(
            f"{where}: target_tokens has shape {list(targets.shape)}; {loss_fn} takes {shapes} "
            f"with T = {length}, the length of model_input."
        )
    check_tokens(targets, vocab_size, f"{where}, target_tokens")
