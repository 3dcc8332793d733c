"""Faulty services, as code between a client and a real service."""

from __future__ import annotations

import json
import posixpath
import random
import re
from collections import defaultdict
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

import numpy as np

from everstep.wire.codecs.proto import (
    decode_forward_backward_output,
    encode_forward_backward_output,
)
from everstep.wire.paths import SCHEME
from tests.conformance.proxy import Answer, Call, Forward, answer, failed

SAVES = ("/save_weights", "/save_weights_for_sampler")
PLAIN = re.compile(r"[\w+=-][\w.+=-]{0,127}", re.ASCII)
MISSING = "never-saved"


async def drops_optimizer(call: Call, forward: Forward) -> Answer:
    """Every load is cold."""
    if call.path == "/load_weights":
        call = call.with_json(optimizer=None)
    return await forward(call)


async def always_optimizer(call: Call, forward: Forward) -> Answer:
    """No load is cold."""
    if call.path == "/load_weights" and "/weights/" in call.json["path"]:
        call = call.with_json(optimizer=True)
    return await forward(call)


class Torn:
    """A save reports success, but a later load returns the checkpoint before it."""

    def __init__(self) -> None:
        self.saved: dict[str, list[str | None]] = defaultdict(list)

    async def __call__(self, call: Call, forward: Forward) -> Answer:
        body = call.json
        if call.path == "/save_weights":
            self.saved[body["model_id"]].append(body.get("path"))
        if call.path == "/load_weights":
            run, _, name = body["path"].removeprefix(SCHEME).partition("/weights/")
            names = self.saved[run]
            if name in names[1:]:
                call = call.with_json(path=f"{SCHEME}{run}/weights/{names[names.index(name) - 1]}")
        return await forward(call)


class CollidesKinds:
    """sampler_weights/x returns the content of weights/x."""

    def __init__(self) -> None:
        self.training: set[str] = set()

    async def __call__(self, call: Call, forward: Forward) -> Answer:
        body = call.json
        if call.path == "/save_weights":
            self.training.add(f"{SCHEME}{body['model_id']}/weights/{body.get('path')}")
        field = {"/load_weights": "path", "/create_sampling_session": "model_path"}.get(call.path)
        if field is not None:
            training_path = body[field].replace("/sampler_weights/", "/weights/")
            if training_path in self.training:
                call = call.with_json(**{field: training_path})
        return await forward(call)


async def refuses_overwrite(call: Call, forward: Forward) -> Answer:
    """The flag is ignored."""
    if call.path == "/save_weights":
        call = call.with_json(overwrite=None)
    return await forward(call)


async def always_overwrites(call: Call, forward: Forward) -> Answer:
    """A used name is overwritten."""
    if call.path == "/save_weights":
        call = call.with_json(overwrite=True)
    return await forward(call)


async def keeps_old(call: Call, forward: Forward) -> Answer:
    """An overwrite reports success and changes nothing."""
    if call.path == "/save_weights" and call.json.get("overwrite"):
        call = call.with_json(overwrite=None, path=call.json["path"] + "-elsewhere")
    return await forward(call)


async def one_unnamed(call: Call, forward: Forward) -> Answer:
    """Saves without a name share one name."""
    if call.path == "/save_weights" and "path" not in call.json:
        call = call.with_json(path="latest", overwrite=True)
    return await forward(call)


async def ignores_ttl(call: Call, forward: Forward) -> Answer:
    """Any ttl_seconds is accepted and ignored."""
    if call.path in SAVES:
        call = call.with_json(ttl_seconds=None)
    return await forward(call)


async def forgets_changed_ttl(call: Call, forward: Forward) -> Answer:
    """A change of ttl_seconds is acknowledged and ignored."""
    return Answer(204) if call.path.endswith("/ttl") else await forward(call)


async def samples_anything(call: Call, forward: Forward) -> Answer:
    """A sampler on a path that names nothing samples from the base model."""
    got = await forward(call)
    if call.path == "/create_sampling_session" and got.status == 404:
        got = answer(200, sampling_session_id=f"{call.json['session_id']}:sample:base")
    return got


class ConflictsWithItself:
    """A retried save conflicts with its own name."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int]] = set()

    async def __call__(self, call: Call, forward: Forward) -> Answer:
        if call.path in SAVES:
            assert call.operation is not None
            if call.operation in self.seen:
                return answer(409, detail="Checkpoint with the same name already exists.")
            self.seen.add(call.operation)
        return await forward(call)


class AcceptsNames:
    """Any text is accepted as a name."""

    def __init__(self) -> None:
        self.count = 0

    async def __call__(self, call: Call, forward: Forward) -> Answer:
        name = call.json.get("path")
        if call.path in SAVES and name is not None and not PLAIN.fullmatch(name):
            self.count += 1
            call = call.with_json(path=f"made-plain-{self.count}")
        return await forward(call)


async def resolves_paths(call: Call, forward: Forward) -> Answer:
    """A path is decoded and normalised before it is parsed."""
    for field in ("path", "tinker_path", "model_path"):
        value = call.json.get(field)
        if call.path not in SAVES and isinstance(value, str) and value.startswith(SCHEME):
            plain = posixpath.normpath("/" + unquote(value.removeprefix(SCHEME)))
            call = call.with_json(**{field: SCHEME + plain.lstrip("/")})
    return await forward(call)


async def resolves_deletions(call: Call, forward: Forward) -> Answer:
    """The path of a deletion is decoded and normalised."""
    if call.method == "DELETE":
        call = replace(call, path=posixpath.normpath(unquote(call.path)))
    return await forward(call)


async def deletes_nothing(call: Call, forward: Forward) -> Answer:
    """A deletion is acknowledged and ignored."""
    return Answer(204) if call.method == "DELETE" else await forward(call)


class ArrivalOrder:
    """Operations are executed in the order of arrival."""

    def __init__(self) -> None:
        self.assigned: dict[str, dict[int, int]] = defaultdict(dict)

    async def __call__(self, call: Call, forward: Forward) -> Answer:
        if call.operation is not None:
            model_id, seq_id = call.operation
            assigned = self.assigned[model_id]
            call = call.with_seq_id(assigned.setdefault(seq_id, len(assigned) + 1))
        return await forward(call)


class Inserting:
    """Base of services that insert operations into a run."""

    def __init__(self) -> None:
        self.last: dict[str, int] = defaultdict(int)
        self.shift: dict[str, int] = defaultdict(int)

    async def __call__(self, call: Call, forward: Forward) -> Answer:
        call = await self.before(call, forward)
        if call.operation is not None:
            model_id, seq_id = call.operation
            call = call.with_seq_id(seq_id + self.shift[model_id])
            self.last[model_id] = max(self.last[model_id], seq_id)
        return await forward(call)

    def inserted(self, model_id: str) -> int:
        """Return a sequence id after all that were used."""
        self.shift[model_id] += 1
        return self.last[model_id] + self.shift[model_id]

    async def before(self, call: Call, forward: Forward) -> Call:
        raise NotImplementedError


class AppliesTwice(Inserting):
    """A retried operation is applied again."""

    async def before(self, call: Call, forward: Forward) -> Call:
        if call.operation is not None and call.operation[1] <= self.last[call.operation[0]]:
            self.shift[call.operation[0]] += 1
        return call


class SamplingLoads(Inserting):
    """Sampling from a checkpoint loads it into the live run."""

    async def before(self, call: Call, forward: Forward) -> Call:
        path = call.json.get("model_path")
        if call.path == "/create_sampling_session" and path:
            model_id = path.removeprefix(SCHEME).split("/")[0]
            load = {"model_id": model_id, "seq_id": self.inserted(model_id), "path": path}
            body = json.dumps(load).encode()
            assert (await forward(replace(call, path="/load_weights", body=body))).status == 200
        return call


class SamplersFollow:
    """A sampler uses the latest sampler checkpoint of its run."""

    def __init__(self) -> None:
        self.run_of: dict[str, str] = {}
        self.newest: dict[str, str] = {}

    async def __call__(self, call: Call, forward: Forward) -> Answer:
        sampler = call.json.get("sampling_session_id")
        if call.path == "/asample" and sampler in self.run_of:
            call = call.with_json(sampling_session_id=self.newest[self.run_of[sampler]])
        got = await forward(call)
        if call.path == "/create_sampling_session" and got.status == 200:
            run = call.json["model_path"].removeprefix(SCHEME).split("/")[0]
            sampler = got.json["sampling_session_id"]
            self.run_of[sampler], self.newest[run] = run, sampler
        return got


class SaysFailed:
    """Base of services that execute an operation and report a failure."""

    def __init__(self) -> None:
        self.lies: set[str] = set()

    async def __call__(self, call: Call, forward: Forward) -> Answer:
        if call.path == "/retrieve_future" and call.json["request_id"] in self.lies:
            got = await forward(call)
            return got if got.status == 408 else failed("That was wrong.")
        changed = self.changed(call)
        if changed is None:
            return await forward(call)
        got = await forward(changed)
        self.lies.add(got.json["request_id"])
        return got

    def changed(self, call: Call) -> Call | None:
        raise NotImplementedError


class LeavesGradient(SaysFailed):
    """Of a failed pass, the datums before the bad one leave their gradients."""

    def changed(self, call: Call) -> Call | None:
        message = call.training_pass
        if message is None:
            return None
        good = [d for d in message.data if _largest(d) < 1000]
        if len(good) == len(message.data):
            return None
        del message.data[:]
        message.data.extend(good)
        return replace(call, body=message.SerializeToString())


class LoadsAnything(SaysFailed):
    """A load of a missing checkpoint resets a run, or creates one.

    Args:
        field: ``model_id`` for loads into live runs, ``session_id`` for new ones.
    """

    def __init__(self, field: str) -> None:
        super().__init__()
        self.field = field
        self.other = ""

    def changed(self, call: Call) -> Call | None:
        if call.path != "/load_weights":
            return None
        path = call.json["path"]
        if not path.endswith(MISSING):
            self.other = path
            return None
        return call.with_json(path=self.other, optimizer=None) if self.field in call.json else None


async def hides_flags(call: Call, forward: Forward) -> Answer:
    """weights_info lacks the train flags."""
    got = await forward(call)
    if call.path == "/weights_info" and got.status == 200:
        kept = {name: value for name, value in got.json.items() if not name.startswith("train_")}
        return answer(200, **kept)
    return got


async def knows_json_only(call: Call, forward: Forward) -> Answer:
    """An older service without protobuf, which is not wrong."""
    if call.training_pass is not None:
        return answer(415, detail="Send JSON.")
    return await forward(replace(call, accept="application/json"))


class Noisy:
    """The same computation gives slightly different numbers each time."""

    def __init__(self, size: float) -> None:
        self.size = size
        self.random = random.Random(1)
        self.passes: set[str] = set()

    async def __call__(self, call: Call, forward: Forward) -> Answer:
        got = await forward(call)
        if call.training_pass is not None:
            self.passes.add(got.json["request_id"])
        if call.json.get("request_id") not in self.passes or got.status != 200:
            return got
        output = decode_forward_backward_output(got.body)
        rows = [
            {name: self._moved(tensor.to_numpy()) for name, tensor in row.items()}
            for row in output.loss_fn_outputs
        ]
        return replace(got, body=encode_forward_backward_output(rows, output.metrics))

    def _moved(self, array: Any) -> Any:
        noise = [self.random.uniform(-self.size, self.size) for _ in range(array.size)]
        return array + np.asarray(noise, dtype=array.dtype).reshape(array.shape)


class Tenants:
    """Keys are distinguished, which the service behind does not do.

    Args:
        open_to_all: a method that is not guarded.
    """

    def __init__(self, open_to_all: str = "") -> None:
        self.open = open_to_all
        self.owner: dict[str, str] = {}

    async def __call__(self, call: Call, forward: Forward) -> Answer:
        said = call.path + unquote(call.path) + call.body.decode(errors="replace")
        foreign = [i for i, key in self.owner.items() if key != call.key]
        if call.method != self.open and any(i in said for i in foreign):
            return answer(404, detail="There is no such thing.")
        got = await forward(call)
        new = got.json.get("session_id") or got.json.get("request_id")
        if new is not None:
            self.owner.setdefault(new, call.key)
        if call.method == "GET" and any(i in got.body.decode(errors="replace") for i in foreign):
            return answer(200, training_runs=[], checkpoints=[])
        return got


def _largest(datum: Any) -> int:
    chunks = [np.frombuffer(c.encoded_text.tokens, "<i4") for c in datum.model_input]
    return int(max(chunk.max() for chunk in chunks))
