"""Import: loads an adapter from outside into a run's state and saves that as a checkpoint.

An imported checkpoint is written by the same code as a trained one, and has the bytes that a save
of that state would have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from everstep.engine import Model, RunState
from everstep.engine import adapter_files as files
from everstep.engine.alignment import tensor_from
from everstep.engine.divergence import UNKNOWN, nonfinite
from everstep.engine.errors import ConfigMismatch, Diverged
from everstep.engine.validation import check_adapter
from everstep.interchange.peft_config import PeftAdapter
from everstep.vault import Vault
from everstep.worker.checkpoint_io import write_checkpoint
from everstep.worker.protocol.messages import AdapterImported, ImportAdapter


def write_import(
    vault: Vault, model: Model, command: ImportAdapter, environment: Mapping[str, Any]
) -> AdapterImported:
    """Write an imported adapter as a checkpoint, durably and atomically.

    Args:
        vault: where it goes.
        model: its base model.
        command: the adapter's directory and the manifest's fields.
        environment: the numeric environment.

    Raises:
        InputError: no run of the model can have this adapter. Names the field.
        Diverged: its weights, moments or gradients are NaN or infinite.
        DiskFull: the disk has too little free space for it.
    """
    directory = Path(command.directory)
    optimizer = (directory / files.OPTIMIZER).exists()
    state = _state(model, directory, command, optimizer=optimizer)
    lora = state.layout.config.to_dict()
    wanted = command.lora or lora
    if {**wanted, "seed": lora["seed"]} != lora:  # an archive without a manifest knows no seed
        raise ConfigMismatch(
            f"The adapter is {lora}, and the collection's others are {wanted}. Import it "
            "into a collection of its own."
        )
    written = write_checkpoint(
        vault, state.capture(optimizer=optimizer), {**command.manifest, "lora": lora}, environment
    )
    return AdapterImported(**written, lora=lora)


def _state(model: Model, directory: Path, command: ImportAdapter, *, optimizer: bool) -> RunState:
    adapter = PeftAdapter.open(directory)
    config = model.config_for(adapter.rank, adapter.alpha, adapter.widths)
    for module, name in adapter.copied.items():
        model.check_base_weight(module, adapter.file.whole(name))
    config = replace(config, seed=command.seed)
    check_adapter(config)
    state = model.new_run(config)
    if optimizer:
        names = (files.ADAPTER, files.OPTIMIZER, files.GRADIENTS)
        contents = {n: (directory / n).read_bytes() for n in names if (directory / n).exists()}
        state.restore(contents, {"step": command.step}, optimizer=True)
    else:
        weights = state.layout.weights(state.arena.views("params"))
        for name in adapter.widths:
            a, b = weights[model.module_of(name)]
            a.copy_(tensor_from(adapter.a(name)))
            b.copy_(tensor_from(adapter.b(name)))
        state.step = command.step  # for information: without moments nothing continues from it
    _check_finite(state)
    return state


def _check_finite(state: RunState) -> None:
    state.magnitudes = UNKNOWN
    state.check_weights()
    if not state.magnitudes.finite:
        raise Diverged(
            f"This adapter's optimizer has diverged: {files.OPTIMIZER} holds NaN or infinity. "
            "Leave it out, or go back to an earlier checkpoint."
        )
    found = nonfinite(state.arena.views("grads"))
    if found is not None:
        raise Diverged(f"{files.GRADIENTS} holds {found}. Leave it out.")
