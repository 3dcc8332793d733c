"""In the worker: an adapter from outside becomes a run's state, and that a checkpoint.

So what is imported is written by the same code as what is trained, and is whatever a save of that
state would be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from everstep.engine import Model, RunState
from everstep.engine import adapter_files as files
from everstep.engine.errors import ConfigMismatch, InputError
from everstep.engine.validation import check_adapter
from everstep.interchange.peft_config import PeftAdapter
from everstep.runtime.saving import write_checkpoint
from everstep.vault import Vault


def write_import(
    vault: Vault, model: Model, header: Mapping[str, Any], environment: Mapping[str, Any]
) -> dict[str, Any]:
    """Write an import and make it appear, durably and at once.

    Args:
        vault: where it goes.
        model: its base model.
        header: ``directory`` with its files, ``step`` that it has seen, the ``seed`` that it
            began with, ``lora`` that it has to have (None: any), and ``manifest``, the fields that
            the service knows.
        environment: the numeric environment.

    Returns:
        ``size_bytes`` of its files, its ``step`` and ``lora``.

    Raises:
        InputError: no run of the model can have this adapter; names the field.
        DiskFull: there is no room for it.
    """
    directory = Path(header["directory"])
    optimizer = (directory / files.OPTIMIZER).exists()
    state = _state(model, directory, header, optimizer=optimizer)
    lora = state.layout.config.to_dict()
    wanted = header["lora"] or lora
    if {**wanted, "seed": lora["seed"]} != lora:  # an archive without a manifest knows no seed
        raise ConfigMismatch(
            f"The adapter is {lora}, and the collection's others are {wanted}. Import it "
            "into a collection of its own."
        )
    written = write_checkpoint(
        vault, state.capture(optimizer=optimizer), {**header["manifest"], "lora": lora}, environment
    )
    return {**written, "lora": lora}


def _state(
    model: Model, directory: Path, header: Mapping[str, Any], *, optimizer: bool
) -> RunState:
    adapter = PeftAdapter.open(directory)
    config = model.fitting(adapter.rank, adapter.alpha, adapter.widths)
    for module, name in adapter.copied.items():
        model.check_weight(module, adapter.file.whole(name))
    config = replace(config, seed=header["seed"])
    check_adapter(config)
    state = model.new_run(config)
    if optimizer:
        names = (files.ADAPTER, files.OPTIMIZER, files.GRADIENTS)
        contents = {n: (directory / n).read_bytes() for n in names if (directory / n).exists()}
        state.restore(contents, {"step": header["step"]}, optimizer=True)
    else:
        weights = state.layout.weights(state.arena.views("params"))
        for module, (a, b) in weights.items():
            a.copy_(torch.from_numpy(adapter.a(module)))
            b.copy_(torch.from_numpy(adapter.b(module)))
        state.step = header["step"]  # told of it; without moments nothing goes on from there
    for name, tensor in state.arena.views("params").items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{name} holds values that are not finite numbers.")
    return state
