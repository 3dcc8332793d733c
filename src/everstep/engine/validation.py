"""Training validation: rejects a request that cannot be computed before it is accepted. No torch.

An operation that passes these checks can fail for memory or hardware, but not for its input.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from everstep.engine.config import MAX_RANK, MAX_SEED, AdapterConfig
from everstep.engine.errors import InputError
from everstep.engine.losses.graph_read import LossProgram
from everstep.engine.losses.specs import (
    CUSTOM,
    CUSTOM_TARGET_DIMS,
    LOSSES,
    STABLE_REINFORCE,
    TARGETS,
    InputSpec,
    LossSpec,
)
from everstep.wire.codecs.proto import Example

Array = np.ndarray[Any, Any]


def check_adapter(config: AdapterConfig) -> None:
    """Raise `InputError` for an adapter that cannot be created."""
    if config.rank <= 0:
        raise InputError(f"lora_config.rank must be positive; got {config.rank}")
    if config.rank > MAX_RANK:
        raise InputError(f"lora_config.rank must be at most {MAX_RANK}; got {config.rank}")
    if not (config.train_attn or config.train_mlp or config.train_unembed):
        raise InputError("At least one of train_unembed, train_mlp, or train_attn must be True")
    if type(config.seed) is not int or not 0 <= config.seed <= MAX_SEED:
        raise InputError(f"lora_config.seed must be 0 to 2^63 - 1; got {config.seed!r:.100}")


def check_pass(
    examples: Sequence[Example],
    loss_fn: str,
    config: Mapping[str, float | str],
    *,
    vocab_size: int,
    max_context_length: int,
    program: LossProgram | None = None,
    refuse_stable_reinforce: bool = False,
) -> None:
    """Raise `InputError` for a training pass that cannot be computed.

    Args:
        examples: the datums.
        loss_fn: name of the loss.
        config: the loss's settings.
        vocab_size: token ids have to be below it.
        max_context_length: maximum tokens of a datum.
        program: the graph of the loss ``custom``. None for any other loss.
        refuse_stable_reinforce: reject the loss whose definition is Everstep's own.
    """
    spec = None
    if program is None:
        spec = _loss_spec(loss_fn, {STABLE_REINFORCE} if refuse_stable_reinforce else set())
        check_settings(spec, config)
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
        if spec is not None:
            _check_inputs(example, spec, where, vocab_size)
        elif program is not None:
            _check_custom_inputs(example, program, where, vocab_size)


def check_tokens(tokens: Array, vocab_size: int, where: str) -> None:
    """Raise `InputError` naming the first token id that is out of range."""
    outside = (tokens < 0) | (tokens >= vocab_size)
    if outside.any():
        position = int(np.flatnonzero(outside)[0])
        raise InputError(
            f"{where}: token id {int(tokens.ravel()[position])} at position {position} is not in "
            f"the vocabulary of {vocab_size}."
        )


def check_settings(spec: LossSpec, config: Mapping[str, float | str]) -> None:
    """Raise `InputError` for settings that a loss does not have or that are out of bounds."""
    settings = spec.defaults
    for key, value in config.items():
        if key not in settings:
            allowed = ", ".join(settings) or "nothing"
            raise InputError(
                f"loss_fn_config[{key!r}] is unknown to {spec.name}; it takes {allowed}."
            )
        if isinstance(value, str) or not np.isfinite(value):
            raise InputError(f"loss_fn_config[{key!r}] must be a finite number; got {value!r}.")
        settings[key] = value
    for setting in spec.settings:
        if settings[setting.name] < setting.minimum:
            raise InputError(
                f"loss_fn_config: {setting.name} is {settings[setting.name]:g}; its minimum is "
                f"{setting.minimum:g}."
            )
        if setting.at_most is not None and settings[setting.name] > settings[setting.at_most]:
            raise InputError(
                f"loss_fn_config: {setting.name} {settings[setting.name]} is above "
                f"{setting.at_most} {settings[setting.at_most]}."
            )


def _loss_spec(loss_fn: str, refused: Collection[str]) -> LossSpec:
    allowed = [name for name in LOSSES if name not in refused]
    if loss_fn in allowed:
        return LOSSES[loss_fn]
    why = "its definition is not public" if loss_fn in refused else "there is no such loss"
    raise InputError(
        f"Loss {loss_fn!r} is not supported here: {why}. Use one of {', '.join(allowed)}, or a "
        "loss of your own (forward_backward_custom)."
    )


def _check_inputs(example: Example, spec: LossSpec, where: str, vocab_size: int) -> None:
    needed = (TARGETS, *(item.name for item in spec.inputs))
    for name in needed:
        if name not in example.inputs:
            raise InputError(f"{where}: loss_fn_inputs[{name!r}] is missing; {spec.name} needs it.")
    allowed = (*needed, *(item.name for item in spec.optional))
    for name in example.inputs:
        if name not in allowed:
            raise InputError(
                f"{where}: loss_fn_inputs[{name!r}] is unknown to {spec.name}; it takes "
                f"{', '.join(allowed)}."
            )
    targets = example.inputs[TARGETS]
    _check_targets(targets, len(example.tokens), spec.name, spec.target_dims, where, vocab_size)
    arrays = {item.name: item for item in (*spec.inputs, *spec.optional)}
    for name, array in example.inputs.items():
        if name in arrays:
            _check_array(array, arrays[name], targets.shape, where)


def _check_array(array: Array, spec: InputSpec, shape: tuple[int, ...], where: str) -> None:
    if array.shape != shape:
        raise InputError(
            f"{where}: loss_fn_inputs[{spec.name!r}] has shape {list(array.shape)}; target_tokens "
            f"has {list(shape)}."
        )
    if not np.isfinite(array).all():
        wrong = np.flatnonzero(~np.isfinite(array.ravel()))
        raise InputError(
            f"{where}: loss_fn_inputs[{spec.name!r}] is {array.ravel()[wrong[0]]} at position "
            f"{int(wrong[0])}; it has to be finite."
        )
    if math.isfinite(spec.minimum) and (array < spec.minimum).any():
        raise InputError(
            f"{where}: loss_fn_inputs[{spec.name!r}] holds {array.min()}; its minimum is "
            f"{spec.minimum:g}."
        )


def _check_custom_inputs(
    example: Example, program: LossProgram, where: str, vocab_size: int
) -> None:
    """Check that the inputs a custom loss reads are there, in their rank. Others are ignored."""
    for name, rank in program.inputs.items():
        key = TARGETS if name == "logprobs" else name
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
    targets = example.inputs[TARGETS]
    _check_targets(targets, len(example.tokens), CUSTOM, CUSTOM_TARGET_DIMS, where, vocab_size)


def _check_targets(
    targets: Array, length: int, loss: str, dims: tuple[int, ...], where: str, vocab_size: int
) -> None:
    if targets.dtype.kind != "i":
        raise InputError(f"{where}: target_tokens must be int64; got {targets.dtype}.")
    if targets.ndim not in dims or targets.shape[0] != length or targets.size == 0:
        shapes = " or ".join({1: "[T]", 2: "[T, K]"}[each] for each in dims)
        raise InputError(
            f"{where}: target_tokens has shape {list(targets.shape)}; {loss} takes {shapes} "
            f"with T = {length}, the length of model_input."
        )
    check_tokens(targets, vocab_size, f"{where}, target_tokens")
