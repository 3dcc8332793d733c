"""``everstep train`` goes on exactly, wherever it was stopped; ``everstep sample`` samples."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

import everstep
from tests.cli.remote import KEY, refused, said, told
from tests.conftest import Service
from tests.promises.test_exactness import hashes
from tests.scenario import MODEL, connect

pytestmark = pytest.mark.slow
OPTIONS = ("--epochs", "2", "--batch-size", "4", "--rank", "4", "--save-every", "2")
STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "count.jsonl"
    lines = (
        {"prompt": f"count from {n}: ", "completion": " ".join(str(n + k) for k in range(4))}
        for n in range(11)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Training:
    """``everstep train`` as a process of its own."""

    def __init__(self, url: str, home: Path, data: Path, name: str, directory: Path) -> None:
        words = [sys.executable, "-m", "everstep.cli", "train", str(data), "--name", name, *OPTIONS]
        words += ["--resume", "--output", str(directory), "--home", str(home), "--json"]
        environment = {**os.environ, "TINKER_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
        environment.pop("TINKER_BASE_URL", None)
        if url:
            environment["TINKER_BASE_URL"] = url
        self.process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.said: list[str] = []

    def steps(self) -> Iterator[int]:
        """The steps that it makes, as it tells of them."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line.rstrip())
            if found := re.search(r"step (\d+)/\d+, loss", line):
                yield int(found[1])

    def signal_after(self, count: int, number: signal.Signals) -> int:
        """Send a signal after so many steps; returns the exit code."""
        for done, _ in enumerate(self.steps(), 1):
            if done == count:
                self.process.send_signal(number)
        return self._ended()

    def result(self) -> Any:
        """What it tells when it is through."""
        list(self.steps())
        assert self.process.stdout is not None
        content = self.process.stdout.read()
        assert self._ended() == 0, self.said
        return json.loads(content)

    def _ended(self) -> int:
        code = self.process.wait(120)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
        return code


def losses(directory: Path) -> list[Any]:
    lines = (directory / "losses.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


Start = Callable[..., Training]


@pytest.fixture
def start(service: Service, data: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts ``everstep train`` with a name, on the shared service or on a home of its own."""
    started: list[Training] = []

    def one(name: str, home: Path | None = None) -> Training:
        url = service.url if home is None else ""
        started.append(Training(url, home or service.home, data, name, tmp_path / name))
        return started[-1]

    yield one
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()


@pytest.fixture(scope="module")
def twin(service: Service, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that nothing happened to."""
    directory = tmp_path_factory.mktemp("twin")
    told = Training(service.url, service.home, data, "cli-twin", directory).result()
    assert told["step"] == told["steps"] == STEPS and told["resumed_from"] is None
    assert [line["step"] for line in losses(directory)] == [*range(1, STEPS + 1)]
    return hashes(service.home, told["tinker_path"]), losses(directory)


@pytest.mark.timeout(1200)
def test_killed_at_random_moments_it_ends_as_its_uninterrupted_twin(
    service: Service, start: Start, twin: Any, tmp_path: Path
) -> None:
    random = Random(5)
    for _ in range(3):
        if start("cli-killed").signal_after(random.randint(1, 3), signal.SIGKILL) == 0:
            break
    end = start("cli-killed").result()
    assert end["resumed_from"] is not None
    assert (hashes(service.home, end["tinker_path"]), losses(tmp_path / "cli-killed")) == twin
    assert (tmp_path / "cli-killed" / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_finishes_its_step_saves_and_goes_on_exactly(
    service: Service, start: Start, twin: Any, tmp_path: Path, number: signal.Signals
) -> None:
    name = f"cli-{number.name}"
    stopped = start(name)
    assert stopped.signal_after(3, number) == 128 + number
    made = len(losses(tmp_path / name))
    end = start(name).result()
    assert f".s{made}." in end["resumed_from"], "nothing was made twice"
    assert (hashes(service.home, end["tinker_path"]), losses(tmp_path / name)) == twin


@pytest.mark.timeout(1200)
def test_killed_with_the_service_that_it_started_it_goes_on_at_once(
    start: Start, twin: Any, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    assert start("killed", home).signal_after(3, signal.SIGKILL) == -signal.SIGKILL
    end = start("killed", home).result()
    assert ".s2." in end["resumed_from"]
    assert (hashes(home, end["tinker_path"]), losses(tmp_path / "killed")) == twin


@pytest.fixture(scope="module")
def trained(service: Service, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("trained")
    words = ("train", data, "--name", "cli-trained", *OPTIONS, "--output", directory)
    return told(service.url, *words)


def test_a_run_is_not_begun_twice_and_not_gone_on_with_otherwise(
    service: Service, data: Path, trained: Any, tmp_path: Path
) -> None:
    words = ["train", data, "--name", "cli-trained", "--output", tmp_path]
    code, text = refused(service.url, *words, *OPTIONS)
    assert code == 1 and "--resume" in text and f"step {STEPS}" in text
    again = told(service.url, *words, *OPTIONS, "--resume")
    assert (again["state"], again["tinker_path"]) == ("finished before", trained["tinker_path"])
    assert again["sampler_path"] == trained["sampler_path"]
    runs = told(service.url, "run", "list")["total"]
    other_rank = [*OPTIONS, "--resume", "--rank", 8]
    code, text = refused(service.url, *words, *other_rank)
    assert code == 1 and "rank is 4 there and 8 here. Go on with" in text
    code, text = refused(service.url, *words, "--resume", "--rank", 4, "--batch-size", 3)
    assert told(service.url, "run", "list")["total"] == runs, "no run is begun to be refused"
    assert code == 1 and "batch_size was 4 and is 3" in text
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text() + '{"prompt": "a", "completion": "b"}\n')
    words[1] = other
    code, text = refused(service.url, *words, *OPTIONS, "--resume")
    assert code == 1 and "data was" in text


def test_killed_before_it_saved_what_is_sampled_from_it_does_that_when_it_goes_on(
    service: Service, data: Path, trained: Any, tmp_path: Path
) -> None:
    told(service.url, "checkpoint", "delete", trained["sampler_path"], "--yes")
    words = ["train", data, "--name", "cli-trained", "--output", tmp_path, *OPTIONS, "--resume"]
    again = told(service.url, *words)
    trained["sampler_path"] = again["sampler_path"]
    assert again["state"] == "finished before"
    assert told(service.url, "checkpoint", "diff", trained["tinker_path"], again["sampler_path"])


def test_a_learning_rate_of_nothing_is_one(service: Service, data: Path, tmp_path: Path) -> None:
    words = ["train", data, "--name", "cli-still", "--output", tmp_path, *OPTIONS]
    assert told(service.url, *words, "--learning-rate", 0, "--epochs", 1, "--resume")
    first = told(service.url, "checkpoint", "list", "--name", "cli-still.*")["checkpoints"]
    a, b = (each["tinker_path"] for each in first[:2])
    assert told(service.url, "checkpoint", "diff", a, b)["same"]


def test_the_checkpoints_are_those_that_the_policy_keeps(service: Service, trained: Any) -> None:
    with connect(everstep, service.url) as client:
        found = client.create_rest_client().list_user_checkpoints(1000).result().checkpoints
    mine = [each for each in found if "/weights/cli-trained." in each.tinker_path]
    assert sorted(each.checkpoint_id.split(".s")[1].split(".")[0] for each in mine) == [
        "2",
        "4",
        "6",
    ]
    assert trained["tinker_path"] in {each.tinker_path for each in mine}


@pytest.mark.parametrize(
    ("content", "words", "code", "says"),
    [
        ('{"prompt": 1}\n', (), 1, ":1: "),
        ("", (), 1, "empty"),
        (None, (), 1, "can't be read"),
        ("ok", ("--name", "a b"), 2, "letters"),
        ("ok", ("--model", "nobody/knows"), 1, MODEL),
        ("ok", ("--batch-size", "0"), 2, ""),
    ],
)
def test_what_can_not_be_trained_is_told_in_one_line(
    service: Service,
    tmp_path: Path,
    content: str | None,
    words: tuple[str, ...],
    code: int,
    says: str,
) -> None:
    path = tmp_path / "wrong.jsonl"
    if content is not None:
        path.write_text('{"prompt": "a", "completion": "b"}\n' if content == "ok" else content)
    found, text = refused(service.url, "train", path, "--output", tmp_path / "out", *words)
    assert (found, says in text) == (code, True), text


def test_sampled_from_what_was_trained(service: Service, trained: Any) -> None:
    words = ("sample", "count from 3: ", "--max-tokens", 12, "--seed", 7)
    tuned = ("--from", trained["sampler_path"])
    several = told(service.url, *words, *tuned, "--num-samples", 2, "--temperature", 0.5)
    assert several["from"] == trained["sampler_path"] and len(several["samples"]) == 2
    assert all(len(each["tokens"]) == len(each["logprobs"]) for each in several["samples"])
    greedy = (*words, *tuned, "--temperature", 0)
    one = told(service.url, *greedy)["samples"]
    assert one == told(service.url, *greedy)["samples"]
    assert said(service.url, *greedy) == one[0]["text"] + "\n"
    base = told(service.url, *words, "--from", MODEL, "--temperature", 0)
    assert base["samples"] != one
    stopped = told(service.url, *greedy, "--stop", one[0]["text"][:1])["samples"][0]
    assert stopped["stop_reason"] == "stop" and len(stopped["tokens"]) == 1
    asked = told(service.url, *greedy, "--chat")
    assert asked["prompt_tokens"] > told(service.url, *greedy)["prompt_tokens"]
    piped = said(service.url, "sample", "-", *greedy[2:], answer="count from 3: ")
    assert piped == one[0]["text"] + "\n"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--from", "tinker://nobody/sampler_weights/x"), 3, "everstep run list"),
        (("--from", "nobody/knows"), 1, MODEL),
        (("--top-p", "2"), 2, ""),
    ],
)
def test_what_can_not_be_sampled_from_is_told(
    service: Service, words: tuple[str, ...], code: int, says: str
) -> None:
    found, text = refused(service.url, "sample", "x", *words)
    assert (found, says in text) == (code, True), text


def test_a_prompt_that_is_no_text_is_told(service: Service) -> None:
    for words, answer in ((("-",), b"\xff\xfe"), (("\udcff",), None)):
        code, text = refused(service.url, "sample", *words, "--from", MODEL, answer=answer)
        assert code == 2 and "not UTF-8 text" in text
