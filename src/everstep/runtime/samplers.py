"""The worker's samplers: adapters that are loaded for sampling, and one batch a model."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from everstep.engine import Adapter, AdapterConfig, Model, SamplingBatch
from everstep.engine.prefixes import Prefixes
from everstep.runtime.channel import Message
from everstep.runtime.sample_specs import sample_spec
from everstep.runtime.saving import ADAPTER_FILE
from everstep.vault import Vault
from everstep.vault.inspection import quarantining
from everstep.wire.proto import encode_sample_response
from everstep.wire.streams import DrawnTokens

_ADAPTERS_KEPT = 16


class Samplers:
    """Batches samples by model and keeps the adapters that were used last.

    Args:
        models: the base models by name.
        vault: where the adapters come from.
        finish: sends a finished sample: call id, header, body.
        fail: sends a failed one: call id, error.
        tell: sends what a sample has drawn since it was sent last: call id, by position.
        prefix_bytes: what keys and values of prompts may take together.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        vault: Vault,
        finish: Callable[[int, Mapping[str, Any], bytes], None],
        fail: Callable[[int, BaseException], None],
        tell: Callable[[int, Sequence[DrawnTokens]], None],
        prefix_bytes: int,
    ) -> None:
        self._models = models
        self._vault = vault
        self._finish = finish
        self._fail = fail
        self._tell = tell
        self._told: dict[int, int] = {}  # samples that are watched: the position that is next
        prefixes = Prefixes(prefix_bytes)
        self._batches = {name: SamplingBatch(model, prefixes) for name, model in models.items()}
        self._adapters: OrderedDict[tuple[str, str], Adapter] = OrderedDict()

    def add(self, message: Message) -> None:
        """Put a sample into its model's batch; a bad one is answered at once."""
        header = message.header
        try:
            spec = sample_spec(json.loads(message.body), header["default_seed"])
            weights, adapter = self._adapter(header["model"], header["source"])
            space = f"{header['sampler']} {header['model']} {weights}"
            self._batches[header["model"]].add(str(header["id"]), spec, adapter, space)
        except Exception as error:  # noqa: BLE001  one sample's failure is reported, not ours
            self._fail(header["id"], error)

    def step(self, name: str) -> bool:
        """One decode step of a model's batch; returns whether there is more to do."""
        batch = self._batches[name]
        if batch.busy:
            for key, outcome in batch.step():
                self._told.pop(int(key), None)
                if isinstance(outcome, Exception):
                    self._fail(int(key), outcome)
                else:
                    self._finish(int(key), {}, encode_sample_response(outcome))
            self._tell_of(batch)
        return batch.busy

    def watch(self, call_id: int, position: int) -> None:
        """Send what a sample has drawn from a position on, and what it draws from now on.

        One that has ended is not told of any more: its result holds it all.
        """
        for batch in self._batches.values():
            if batch.holds(str(call_id)):
                self._told[call_id] = position
                self._tell_of(batch)

    def cancel(self, call_id: int) -> None:
        """Stop a sample and free its place; one that has ended is no error."""
        self._told.pop(call_id, None)
        for batch in self._batches.values():
            batch.cancel(str(call_id))

    def _tell_of(self, batch: SamplingBatch) -> None:
        """Send what is new of the samples of a batch that are watched."""
        for call_id, position in self._told.items():
            drawn = batch.drawn(str(call_id), position)
            if drawn:
                self._told[call_id] = drawn[-1].position + 1
                self._tell(call_id, drawn)

    def _adapter(self, name: str, source: Mapping[str, Any] | None) -> tuple[str, Adapter | None]:
        """The adapter of a checkpoint, verified when it is first read, and its file's digest.

        The base model has neither.
        """
        if source is None:
            return "", None
        with quarantining(self._vault):
            manifest = self._vault.manifest(source["kind"], source["run"], source["name"])
            key = (name, manifest.files[ADAPTER_FILE].blake3)
            if key not in self._adapters:
                config = AdapterConfig(**manifest.lora)
                adapter_file = self._vault.read(manifest, ADAPTER_FILE)
                self._adapters[key] = self._models[name].load_adapter(config, adapter_file)
        self._adapters.move_to_end(key)
        while len(self._adapters) > _ADAPTERS_KEPT:
            self._adapters.popitem(last=False)
        return key[1], self._adapters[key]
