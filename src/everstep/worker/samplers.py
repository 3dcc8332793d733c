"""Samplers: one batch of samples per model, and the adapters that they sample from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cachetools import LRUCache

from everstep.engine import Adapter, AdapterConfig, Model, SamplingBatch
from everstep.engine.errors import Diverged
from everstep.engine.sampling.prefix_cache import PrefixCache
from everstep.vault import CheckpointId, Vault
from everstep.vault.integrity import quarantining
from everstep.wire.codecs.proto import encode_sample_response
from everstep.wire.messages.streams import DrawnTokens
from everstep.worker.checkpoint_io import ADAPTER_FILE
from everstep.worker.protocol.messages import Sample, SampleDone
from everstep.worker.protocol.sample_spec import sample_spec
from everstep.worker.protocol.stored_request import read_request

MAX_ADAPTERS = 16


class Samplers:
    """Batches samples by model and keeps the most recently used adapters.

    Args:
        models: the base models by name.
        vault: where the adapters are read from.
        home: where stored requests are.
        finish: sends the reply of a finished sample: call id, reply.
        fail: sends the failure of a sample: call id, error.
        stream: sends the tokens that a sample has drawn since the last time: call id, tokens by
            position.
        prefix_bytes: bound on the memory of the prompts' key-value cache.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        vault: Vault,
        home: Path,
        finish: Callable[[int, SampleDone], None],
        fail: Callable[[int, BaseException], None],
        stream: Callable[[int, Sequence[DrawnTokens]], None],
        prefix_bytes: int,
    ) -> None:
        self._models = models
        self._vault = vault
        self._home = home
        self._finish = finish
        self._fail = fail
        self._stream = stream
        self._watched: dict[int, int] = {}  # call id → the next position to send
        prefixes = PrefixCache(prefix_bytes)
        self._batches = {name: SamplingBatch(model, prefixes) for name, model in models.items()}
        self._adapters: LRUCache[tuple[str, str], Adapter | Diverged] = LRUCache(MAX_ADAPTERS)

    def add(self, call_id: int, command: Sample) -> None:
        """Add a sample to its model's batch. An invalid one fails at once."""
        try:
            request = read_request(self._home, command.body, command.stored)
            spec = sample_spec(json.loads(request), command.default_seed)
            weights, adapter = self._adapter(command.model, command.source)
            space = f"{command.sampler} {command.model} {weights}"
            self._batches[command.model].add(str(call_id), spec, adapter, space)
        except Exception as error:  # noqa: BLE001  one sample's failure is reported, not ours
            self._fail(call_id, error)

    def step(self, name: str) -> bool:
        """Make one decode step of a model's batch. Returns whether samples are left in it."""
        batch = self._batches[name]
        if batch.busy:
            for key, outcome in batch.step():
                self._watched.pop(int(key), None)
                if isinstance(outcome, Exception):
                    self._fail(int(key), outcome)
                else:
                    self._finish(int(key), SampleDone(encode_sample_response(outcome)))
            self._send_drawn(batch)
        return batch.busy

    def watch(self, call_id: int, position: int) -> None:
        """Send a sample's tokens from a position on, now and as they are drawn.

        Nothing is sent for a sample that has ended: its result holds all tokens.
        """
        for batch in self._batches.values():
            if batch.holds(str(call_id)):
                self._watched[call_id] = position
                self._send_drawn(batch)

    def cancel(self, call_id: int) -> None:
        """Stop a sample and remove it from its batch. One that has ended is no error."""
        self._watched.pop(call_id, None)
        for batch in self._batches.values():
            batch.cancel(str(call_id))

    def _send_drawn(self, batch: SamplingBatch) -> None:
        """Send the new tokens of a batch's watched samples."""
        for call_id, position in self._watched.items():
            drawn = batch.drawn(str(call_id), position)
            if drawn:
                self._watched[call_id] = drawn[-1].position + 1
                self._stream(call_id, drawn)

    def _adapter(self, name: str, source: CheckpointId | None) -> tuple[str, Adapter | None]:
        """A checkpoint's adapter, verified when it is first read, and its file's digest.

        Samples of the base model (``source`` None) have neither.
        """
        if source is None:
            return "", None
        with quarantining(self._vault):
            manifest = self._vault.manifest(*source)
            key = (name, manifest.files[ADAPTER_FILE].blake3)
            adapter = self._adapters.get(key)
            if adapter is None:
                config = AdapterConfig(**manifest.lora)
                adapter_file = self._vault.read(manifest, ADAPTER_FILE)
                try:
                    adapter = self._models[name].load_adapter(config, adapter_file)
                except Diverged as error:  # kept as well: many samples may ask for it
                    adapter = error
                self._adapters[key] = adapter
        if isinstance(adapter, Diverged):
            raise Diverged(str(adapter))
        return key[1], adapter
