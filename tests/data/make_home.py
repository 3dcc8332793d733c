"""Stored homes: make the archive of a release's home directories that later releases must read.

    PYTHONPATH=src python tests/data/make_home.py tests/data/home_0_1

Run it in a checkout of the release; `tests/data/home_0_1` was made on commit 95bd40b. It needs
nothing of the tests. It writes `homes.tar.xz` and `expected.json` into the directory.

    stopped   a service that was stopped: every kind of checkpoint, a copy, a deletion, samplers,
              lifetimes, publication, an access token
    killed    a service that was killed: operations after the newest state, some with a result
              and some without

`expected.json` holds requests that continue each home with the results that the release gave, and
every checkpoint with the hashes of its files.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyrage

MODEL = "everstep/pico"
LORA = {"rank": 1, "seed": 7, "train_mlp": False, "train_unembed": False, "train_attn": True}
ADAM = {"learning_rate": 0.01, "weight_decay": 0.1}
LONG = 900 * 365 * 24 * 3600
"""Seconds of a lifetime that ends after the last release."""
READY = "everstep: ready at "


class Service:
    """A service of this release on a home, over plain HTTP.

    Args:
        home: its home directory.
        environment: added to the process's environment.
    """

    def __init__(self, home: Path, **environment: str) -> None:
        command = [sys.executable, "-m", "everstep.cli", "serve", "--home", str(home), "--port"]
        settings = (
            "replay_seconds=1000",
            f"max_ttl_seconds={LONG}",
            "hang_seconds=1000",
            "threads=1",
        )
        command += ["0", *(word for each in settings for word in ("--set", each))]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            start_new_session=True,
        )
        assert self.process.stdout is not None
        url = next(line for line in self.process.stdout if line.startswith(READY))
        self.http = httpx.Client(base_url=url.removeprefix(READY).strip() + "/api/v1", timeout=60)
        self._seq_ids: dict[str, int] = {}

    def post(self, route: str, **body: Any) -> Any:
        answer = self.http.post(route, json=body)
        assert answer.status_code < 300, answer.text
        return answer.json() if answer.content else None

    def result(self, request_id: str) -> Any:
        while True:
            answer = self.http.post("retrieve_future", json={"request_id": request_id})
            if answer.status_code != 408:
                assert answer.status_code == 200, answer.text
                return answer.json()

    def send(self, run: str, route: str, **body: Any) -> str:
        """Submit a run's next operation; returns its request id."""
        self._seq_ids[run] = self._seq_ids.get(run, 0) + 1
        return str(self.post(route, model_id=run, seq_id=self._seq_ids[run], **body)["request_id"])

    def do(self, run: str, route: str, **body: Any) -> Any:
        result = self.result(self.send(run, route, **body))
        assert "error" not in result, result
        return result

    def next_seq_id(self, run: str) -> int:
        return self._seq_ids[run] + 1

    def create_run(self, session: str, number: int) -> str:
        body = {"session_id": session, "model_seq_id": number, "base_model": MODEL}
        made = self.post("create_model", **body, lora_config=LORA)
        return str(self.result(made["request_id"])["model_id"])

    def train(self, run: str, *shifts: int) -> None:
        for shift in shifts:
            self.do(run, "forward_backward", forward_backward_input=batch(shift))
            self.do(run, "optim_step", adam_params=ADAM)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End the service; SIGKILL ends its worker with it."""
        if number == signal.SIGKILL:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        self.process.wait(60)
        self.http.close()


@contextlib.contextmanager
def serving(home: Path, end: signal.Signals = signal.SIGTERM, **more: str) -> Iterator[Service]:
    service = Service(home, **more)
    try:
        yield service
        service.stop(end)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(service.process.pid, signal.SIGKILL)


def batch(shift: int, loss: str = "cross_entropy") -> dict[str, Any]:
    """A training pass in JSON."""
    datums = []
    for index in range(2):
        tokens = [(7 * i + 11 * index + shift) % 250 for i in range(12 + 5 * index)]
        weights = [float(i % 3 > 0) for i in range(len(tokens) - 1)]
        datums.append(
            {
                "model_input": {"chunks": [{"type": "encoded_text", "tokens": tokens[:-1]}]},
                "loss_fn_inputs": {
                    "target_tokens": {"data": tokens[1:], "dtype": "int64"},
                    "weights": {"data": weights, "dtype": "float32"},
                },
            }
        )
    return {"data": datums, "loss_fn": loss}


def sample(sampler: str, seq_id: int) -> dict[str, Any]:
    return {
        "sampling_session_id": sampler,
        "seq_id": seq_id,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]},
        "sampling_params": {"max_tokens": 8, "seed": 1, "stop": []},
        "num_samples": 2,
    }


def make_stopped(home: Path, recipients: list[str]) -> list[list[Any]]:
    """Make the home of a service that is stopped; returns the requests that continue it."""
    with serving(home) as service:
        session = service.post(
            "create_session", tags=["stored"], user_metadata={"who": "0.1"}, sdk_version="0.1.0"
        )["session_id"]
        run = service.create_run(session, 0)
        service.train(run, 0, 1)
        first = service.do(run, "save_weights", path="first", user_metadata={"epoch": "1"})["path"]
        weights = service.do(run, "save_weights_for_sampler", path="first", ttl_seconds=LONG)
        service.do(run, "save_weights_external", path="plain")
        service.do(
            run, "save_weights_external", path="sealed", age_encryption_recipients=recipients
        )
        service.do(run, "save_weights", path="gone")
        service.do(run, "save_weights_for_sampler", sampling_session_seq_id=0)
        named = {"session_id": session, "sampling_session_seq_id": 1, "model_path": weights["path"]}
        sampler = service.post("create_sampling_session", **named)["sampling_session_id"]
        service.train(run, 2)
        service.do(run, "save_weights", path="second")
        # A gradient that no step has consumed: the stop's snapshot holds it.
        service.do(run, "forward_backward", forward_backward_input=batch(3))
        route = f"training_runs/{run}/checkpoints/weights"
        assert service.http.post(f"{route}/first/publish").status_code < 300
        assert service.http.delete(f"{route}/gone").status_code < 300
        service.post("copy_weights", source_path=first, destination_project_id="p")
        service.post("everstep/weights_access_tokens", tinker_path=first)
        service.result(service.post("asample", **sample(sampler, 0))["request_id"])
        seq_id = service.next_seq_id(run)
    create = {"session_id": session, "model_seq_id": 1, "base_model": MODEL, "lora_config": LORA}
    other = run.removesuffix(":0") + ":1"

    def of(run: str, seq_id: int, **body: Any) -> dict[str, Any]:
        return {"model_id": run, "seq_id": seq_id, **body}

    return [
        ["optim_step", of(run, seq_id, adam_params=ADAM)],
        ["forward_backward", of(run, seq_id + 1, forward_backward_input=batch(4))],
        ["optim_step", of(run, seq_id + 2, adam_params=ADAM)],
        ["save_weights", of(run, seq_id + 3, path="later")],
        ["asample", sample(sampler, 1)],
        ["create_model", create],
        ["load_weights", of(other, 1, path=first, optimizer=True)],
        ["forward_backward", of(other, 2, forward_backward_input=batch(2))],
        ["optim_step", of(other, 3, adam_params=ADAM)],
        ["save_weights", of(other, 4, path="warm")],
        ["load_weights", of(other, 5, path=first, optimizer=False)],
        ["forward_backward", of(other, 6, forward_backward_input=batch(2))],
        ["optim_step", of(other, 7, adam_params=ADAM)],
        ["save_weights", of(other, 8, path="cold")],
    ]


def make_killed(home: Path) -> tuple[list[str], list[list[Any]]]:
    """Make the home of a service that is killed.

    Returns:
        The ids of requests without a result, and the requests that continue it.
    """
    with serving(home, signal.SIGKILL) as service:
        session = service.post("create_session", sdk_version="0.1.0")["session_id"]
        run = service.create_run(session, 0)
        service.train(run, 0)
        service.do(run, "save_weights", path="first")
        service.train(run, 1)  # has results, and no newer state stands for it
        seq_id = service.next_seq_id(run)
    with serving(home, signal.SIGKILL, EVERSTEP_FAILPOINTS="worker.command.begun=hang") as service:
        service._seq_ids[run] = seq_id - 1
        waiting = [
            service.send(run, "forward_backward", forward_backward_input=batch(2)),
            service.send(run, "optim_step", adam_params=ADAM),
        ]
        seq_id = service.next_seq_id(run)
    later = {"model_id": run, "seq_id": seq_id + 1, "path": "later"}
    step = {"model_id": run, "seq_id": seq_id, "forward_backward_input": batch(3)}
    return waiting, [["forward_backward", step], ["save_weights", later]]


def checkpoints(home: Path) -> dict[str, dict[str, str]]:
    """The SHA-256 of every file of every named checkpoint, by the checkpoint's id."""
    found = {}
    for path in sorted((home / "vault" / "manifests").rglob("*.json")):
        manifest = json.loads(path.read_text())
        if manifest["kind"] == "snapshot":
            continue
        hashes = {}
        for name, entry in manifest["files"].items():
            digest = entry["blake3"]
            content = (home / "vault" / "blobs" / digest[:2] / digest).read_bytes()
            hashes[name] = hashlib.sha256(content).hexdigest()
        found["/".join((manifest["kind"], manifest["run_id"], manifest["name"]))] = hashes
    return found


def listed(home: Path) -> dict[str, Any]:
    """The ledger's rows of checkpoints, by their path."""
    with contextlib.closing(sqlite3.connect(home / "ledger.sqlite")) as database:
        rows = database.execute(
            "SELECT path, size_bytes, public, listed, expires_at, user_metadata FROM checkpoints"
        ).fetchall()
    names = ("size_bytes", "public", "listed", "expires_at", "user_metadata")
    return {path: dict(zip(names, values, strict=True)) for path, *values in sorted(rows)}


def continued(
    home: Path, waiting: list[str], requests: list[list[Any]], scratch: Path
) -> tuple[list[Any], list[list[Any]], dict[str, dict[str, str]]]:
    """Results of the waiting requests and of the new ones, and the checkpoints afterwards."""
    copy = scratch / f"{home.name}-continued"
    shutil.copytree(home, copy)
    with serving(copy) as service:
        waited = [service.result(each) for each in waiting]
        results = []
        for route, body in requests:
            result = service.result(service.post(route, **body)["request_id"])
            assert "error" not in result, result
            results.append([route, body, result])
    return waited, results, checkpoints(copy)


def processor() -> str:
    """The processor's model: kernels may differ between two with the same instructions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = ("model name", "cpu family", "model\t")
    found = [line.split(":")[1].strip() for line in lines if line.startswith(names)]
    return " / ".join(dict.fromkeys(found))


def main(directory: Path) -> None:
    """Make the homes and what is expected of them."""
    directory.mkdir(parents=True, exist_ok=True)
    identity = pyrage.x25519.Identity.generate()
    homes: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        requests = make_stopped(scratch / "stopped", [str(identity.to_public())])
        waiting, more = make_killed(scratch / "killed")
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w:xz", preset=9) as tar:
            for home in ("stopped", "killed"):
                for path in sorted((scratch / home).iterdir()):
                    if path.name != "models":  # written again by any release
                        tar.add(path, f"{home}/{path.name}")
        for home, ids, sent in (("stopped", [], requests), ("killed", waiting, more)):
            before, rows = checkpoints(scratch / home), listed(scratch / home)
            waited, results, after = continued(scratch / home, ids, sent, scratch)
            with contextlib.closing(sqlite3.connect(scratch / home / "ledger.sqlite")) as database:
                query = "SELECT environment FROM runs WHERE environment IS NOT NULL LIMIT 1"
                (environment,) = database.execute(query).fetchone()
            homes[home] = {
                "environment": json.loads(environment),
                "listed": rows,
                "checkpoints": before,
                "waiting": [list(each) for each in zip(ids, waited, strict=True)],
                "continued": results,
                "checkpoints_after": after,
            }
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    expected = {
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "processor": processor(),
        "age_identity": str(identity),
        "made_at": time.strftime("%Y-%m-%d"),
        "homes": homes,
    }
    (directory / "homes.tar.xz").write_bytes(archive.getvalue())
    (directory / "expected.json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
