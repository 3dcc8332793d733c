"""``everstep mirror``: a run of another service is copied completely and once."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

import everstep
from everstep.cli.app import app
from everstep.cli.mirror.copy import Source, directory_of
from everstep.vault import Vault
from everstep.wire.paths import parse_path
from tests.conformance.proxy import Answer, Call, Forward, Proxy, answer
from tests.conftest import Service
from tests.scenario import MODEL, connect, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The service that checkpoints are copied to."""
    running = Service(tmp_path_factory.mktemp("here") / "home")
    yield running
    running.stop()


@dataclass
class There:
    """A run of another service."""

    url: str
    home: Path
    training: Any

    @property
    def run(self) -> str:
        return str(self.training.model_id)


@pytest.fixture
def there(service: Service) -> There:
    client = connect(everstep, service.url)
    training = client.create_lora_training_client(MODEL, 4, 3).result()
    train(everstep, training, 2)
    training.save_state("one", user_metadata={"loss": "1"}).result()
    training.save_weights_for_sampler("one").result()
    return There(service.url, service.home, training)


def invoke(here: Service, url: str, run: str, *words: object) -> Result:
    env = {"EVERSTEP_HOME": str(here.home), "TERM": "dumb", "EVERSTEP_MIRROR_API_KEY": "tml-there"}
    command = ["mirror", "--from", url, "--run", run, "--json", *map(str, words)]
    return CliRunner().invoke(app, command, env=env)


def mirrored(here: Service, url: str, run: str, *words: object) -> dict[str, Any]:
    done = invoke(here, url, run, *words)
    assert done.exit_code == 0, done.output + done.stderr
    return dict(json.loads(done.stdout))


def manifest(home: Path, path: str) -> Any:
    parsed = parse_path(path)
    return Vault(home / "vault", writer=False).manifest(
        str(parsed.kind), parsed.run_id, parsed.name
    )


def listed(here: Service, run: str) -> list[str]:
    rest = connect(everstep, here.url).create_rest_client()
    return sorted(c.tinker_path for c in rest.list_checkpoints(run).result().checkpoints)


def test_mirrored_run_continues_exactly(here: Service, there: There) -> None:
    copied = mirrored(here, there.url, there.run)["copied"]
    assert len(copied) == 2
    runs = {parse_path(path).run_id for path in copied.values()}
    assert len(runs) == 1 and listed(here, *runs) == sorted(copied.values())
    for theirs, ours in copied.items():
        assert manifest(here.home, ours).files == manifest(there.home, theirs).files
        assert manifest(here.home, ours).parents == [theirs]
    ours = copied[f"tinker://{there.run}/weights/one"]
    assert manifest(here.home, ours).user_metadata == {"loss": "1"}

    client = connect(everstep, here.url)
    again = client.create_training_client_from_state_with_optimizer(ours).result()
    assert train(everstep, again, 2, shift=9) == train(everstep, there.training, 2, shift=9)


def test_second_mirror_copies_only_new_checkpoints(here: Service, there: There) -> None:
    first = mirrored(here, there.url, there.run)
    assert mirrored(here, there.url, there.run) == {
        "copied": {},
        "there": list(first["copied"].values()),
        "failed": {},
        "skipped": {},
    }
    train(everstep, there.training, 1)
    there.training.save_state("two").result()
    there.training.save_state("one", overwrite=True).result()
    second = mirrored(here, there.url, there.run)["copied"]
    assert {parse_path(path).checkpoint_id for path in second} == {"weights/one", "weights/two"}
    [run] = {parse_path(path).run_id for path in second.values()}
    assert len(listed(here, run)) == 3
    one = second[f"tinker://{there.run}/weights/one"]
    assert manifest(here.home, one).step == 3


async def plain(call: Call, forward: Forward) -> Answer:
    """A service with the protocol's routes only, and without archives."""
    if call.path.startswith("/everstep/") or "/archive" in call.path:
        return answer(404, detail="Not Found")
    return await forward(call)


def test_mirror_of_other_service_has_weights_only(here: Service, there: There) -> None:
    with Proxy(there.url, plain) as source:
        done = invoke(here, source.url, there.run)
        report = json.loads(done.stdout)
        theirs = f"tinker://{there.run}/weights/one"
        ours = report["copied"][theirs]
        # a checkpoint that the service does not offer is reported, and the others are copied
        assert set(report["failed"]) == {f"tinker://{there.run}/sampler_weights/one"}
        assert done.exit_code == 1
        assert invoke(here, source.url, there.run).stdout.count(ours) == 1
    name = "adapter_model.safetensors"
    copy = manifest(here.home, ours)
    assert copy.files[name] == manifest(there.home, theirs).files[name]
    assert copy.optimizer is None
    client = connect(everstep, here.url)
    train(everstep, client.create_training_client_from_state(ours).result(), 1)
    with pytest.raises(everstep.RequestFailedError, match="no optimizer state"):
        client.create_training_client_from_state_with_optimizer(ours).result()


def on_their_way(here: Service, url: str, run: str) -> Path:
    return directory_of(here.home, Source(url, None, run, None))


class Flipped:
    """A service that flips a bit of its archives and sends no hash of them."""

    def __init__(self, upstream: str) -> None:
        self.upstream, self.url = upstream, ""
        self.broken = True
        self._archives: list[str] = []

    async def __call__(self, call: Call, forward: Forward) -> Answer:
        if call.path.startswith("/flipped/"):
            archive = self._archives[int(call.path.rsplit("/", 1)[-1])]
            async with httpx.AsyncClient(follow_redirects=True) as client:
                content = bytearray((await client.get(archive)).content)
            content[len(content) // 2] ^= 1
            return Answer(200, bytes(content), "application/x-tar")
        if self.broken and call.path.endswith("/archive"):
            self._archives.append(f"{self.upstream}/api/v1{call.path}")
            url = f"{self.url}/api/v1/flipped/{len(self._archives) - 1}"
            return answer(200, url=url, expires="2999-01-01T00:00:00Z")
        return await forward(call)


def test_mirror_discards_and_reports_altered_download(here: Service, there: There) -> None:
    flipped = Flipped(there.url)
    with Proxy(there.url, flipped) as source:
        flipped.url = source.url
        done = invoke(here, source.url, there.run)
        failed = json.loads(done.stdout)["failed"]
        assert done.exit_code == 1 and len(failed) == 2
        assert all("not the one that the service saved" in why for why in failed.values())
        flipped.broken = False
        copied = mirrored(here, source.url, there.run)["copied"]
    for theirs, ours in copied.items():
        assert manifest(here.home, ours).files == manifest(there.home, theirs).files
    assert len(copied) == 2


def test_mirror_distinguishes_names_by_case(here: Service, there: There) -> None:
    train(everstep, there.training, 1)
    there.training.save_state("ONE").result()
    copied = mirrored(here, there.url, there.run)["copied"]
    steps = {parse_path(p).checkpoint_id: manifest(here.home, p).step for p in copied.values()}
    assert steps == {"weights/one": 2, "weights/ONE": 3, "sampler_weights/one": 2}


def test_mirror_keeps_checkpoints_deleted_in_the_source(here: Service, there: There) -> None:
    first = mirrored(here, there.url, there.run)["copied"]
    gone = f"tinker://{there.run}/weights/one"
    partial = on_their_way(here, there.url, there.run) / ".half.part"
    partial.mkdir()  # as of a checkpoint that was deleted during its download
    rest = connect(everstep, there.url).create_rest_client()
    rest.delete_checkpoint_from_tinker_path(gone).result()
    again = mirrored(here, there.url, there.run)
    assert again["there"] == [first[f"tinker://{there.run}/sampler_weights/one"]]
    assert not again["copied"] and not partial.exists()
    client = connect(everstep, here.url)
    client.create_training_client_from_state_with_optimizer(first[gone]).result()


def test_second_mirror_of_the_same_run_is_refused(here: Service, there: There) -> None:
    directory = on_their_way(here, there.url, there.run)
    directory.mkdir(parents=True)
    with open_directory(directory) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        done = invoke(here, there.url, there.run)
    assert done.exit_code == 1 and "Another 'everstep mirror'" in done.stderr
    assert len(mirrored(here, there.url, there.run)["copied"]) == 2


@contextmanager
def open_directory(directory: Path) -> Iterator[int]:
    handle = os.open(directory, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def test_follow_continues_when_the_source_is_back(here: Service, there: There) -> None:
    away = threading.Event()

    async def sometimes(call: Call, forward: Forward) -> Answer:
        if away.is_set():
            return answer(403, detail="closed for a moment")
        return await forward(call)

    with Proxy(there.url, sometimes) as source:
        following = command(here, source.url, there.run, "--follow", "--every", "0.2")
        assert following.stdout is not None
        assert len(json.loads(following.stdout.readline())["copied"]) == 2
        away.set()
        assert first(following, "failed") == {
            source.url: "the service refused: closed for a moment"
        }
        there.training.save_state("later").result()
        away.clear()
        assert list(first(following, "copied")) == [f"tinker://{there.run}/weights/later"]
        interrupt(following)


def command(here: Service, url: str, run: str, *words: str) -> subprocess.Popen[str]:
    whole = [sys.executable, "-m", "everstep.cli", "mirror", "--from", url]
    whole += ["--run", run, "--json", "--home", str(here.home), *words]
    env = {**os.environ, "TINKER_API_KEY": "tml-test"}
    return subprocess.Popen(whole, stdout=subprocess.PIPE, text=True, env=env)


def first(following: subprocess.Popen[str], field: str) -> dict[str, str]:
    """The first non-empty value of a field in the JSON lines."""
    assert following.stdout is not None
    return next(found for line in following.stdout if (found := json.loads(line)[field]))


def interrupt(following: subprocess.Popen[str]) -> None:
    """Stop it by Ctrl-C, which is not a failure."""
    following.send_signal(signal.SIGINT)
    assert following.wait(60) == 0
    assert following.stdout is not None
    following.stdout.close()


def test_follow_runs_until_it_is_stopped(here: Service, there: There) -> None:
    following = command(here, there.url, there.run, "--follow", "--every", "0.2")
    assert following.stdout is not None
    assert len(json.loads(following.stdout.readline())["copied"]) == 2
    there.training.save_state("later").result()
    assert list(first(following, "copied")) == [f"tinker://{there.run}/weights/later"]
    interrupt(following)


def test_killed_mirror_resumes_and_copies_nothing_twice(here: Service, there: There) -> None:
    for index in range(3):
        there.training.save_state(f"more-{index}").result()
    for moment in ("mirror", "download", "import"):
        doomed = command(here, there.url, there.run)
        while doomed.poll() is None and not begun(here.home, moment):
            time.sleep(0.01)  # the directory has no event to wait for
        doomed.kill()
        doomed.wait(60)
        assert doomed.stdout is not None
        doomed.stdout.close()
    done = mirrored(here, there.url, there.run)
    everything = [*done["copied"].values(), *done["there"]]
    assert len(set(everything)) == len(everything) == 5 and not done["failed"]
    [run] = {parse_path(path).run_id for path in everything}
    assert listed(here, run) == sorted(everything)
    assert list(on_their_way(here, there.url, there.run).iterdir()) == []
    vault = Vault(here.home / "vault", writer=False)
    for path in everything:
        for name in manifest(here.home, path).files:
            vault.read(manifest(here.home, path), name)


def begun(home: Path, moment: str) -> bool:
    """Whether a download has begun or is complete, or is being imported."""
    if moment == "import":
        return any((home / "imports").glob("*"))
    hidden = [path.name.startswith(".") for path in (home / "mirror").glob("*/*")]
    return any(hidden) if moment == "mirror" else not all(hidden)
