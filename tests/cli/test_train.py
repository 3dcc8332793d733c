"""``everstep train`` resumes exactly, wherever it was stopped, and ``everstep sample``."""

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
from tests.cli.remote import KEY, failure, invoke, print_of, read_json
from tests.conftest import Service
from tests.promises.test_exactness import hashes
from tests.scenario import MODEL, connect

pytestmark = pytest.mark.slow
OPTIONS = ("--epochs", "2", "--batch-size", "4", "--rank", "4", "--save-every", "2")
STEPS = 6
CALLS = json.dumps(
    {
        "messages": [
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "content": "b",
                "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
            },
        ]
    }
)
LONG = "\n".join(
    json.dumps({"prompt": "x" * size, "completion": "y" * 30, "score": size})
    for size in (5, *range(30, 39))
)


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
        self.output: list[str] = []

    def steps(self) -> Iterator[int]:
        """Yield the steps that it reports."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.output.append(line.rstrip())
            if found := re.search(r"step (\d+)/\d+, loss", line):
                yield int(found[1])

    def signal_after(self, count: int, number: signal.Signals) -> int:
        """Send a signal after a number of steps. Returns the exit code."""
        for done, _ in enumerate(self.steps(), 1):
            if done == count:
                self.process.send_signal(number)
        return self._ended()

    def result(self) -> Any:
        """The JSON that it prints at its end."""
        list(self.steps())
        assert self.process.stdout is not None
        content = self.process.stdout.read()
        assert self._ended() == 0, self.output
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
    """Start ``everstep train`` with a name, on the shared service or on a home of its own."""
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
def uninterrupted(service: Service, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Hashes and losses of an uninterrupted run."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    report = Training(service.url, service.home, data, "cli-other", directory).result()
    assert report["step"] == report["steps"] == STEPS and report["resumed_from"] is None
    assert [line["step"] for line in losses(directory)] == [*range(1, STEPS + 1)]
    return hashes(service.home, report["tinker_path"]), losses(directory)


@pytest.mark.long(reason="a command and its service are killed and started again and again")
@pytest.mark.timeout(1200)
def test_run_killed_at_random_moments_equals_uninterrupted_run(
    service: Service, start: Start, uninterrupted: Any, tmp_path: Path
) -> None:
    random = Random(5)
    for _ in range(3):
        if start("cli-killed").signal_after(random.randint(1, 3), signal.SIGKILL) == 0:
            break
    end = start("cli-killed").result()
    assert end["resumed_from"] is not None
    assert (
        hashes(service.home, end["tinker_path"]),
        losses(tmp_path / "cli-killed"),
    ) == uninterrupted
    assert (tmp_path / "cli-killed" / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_run_saves_and_resumes_exactly(
    service: Service, start: Start, uninterrupted: Any, tmp_path: Path, number: signal.Signals
) -> None:
    name = f"cli-{number.name}"
    stopped = start(name)
    assert stopped.signal_after(3, number) == 128 + number
    made = len(losses(tmp_path / name))
    end = start(name).result()
    assert f".s{made}." in end["resumed_from"], "no step was repeated"
    assert (hashes(service.home, end["tinker_path"]), losses(tmp_path / name)) == uninterrupted


@pytest.mark.timeout(1200)
def test_run_killed_with_its_embedded_service_resumes_at_once(
    start: Start, uninterrupted: Any, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    assert start("killed", home).signal_after(3, signal.SIGKILL) == -signal.SIGKILL
    end = start("killed", home).result()
    assert ".s2." in end["resumed_from"]
    assert (hashes(home, end["tinker_path"]), losses(tmp_path / "killed")) == uninterrupted


@pytest.fixture(scope="module")
def trained(service: Service, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("trained")
    words = ("train", data, "--name", "cli-trained", *OPTIONS, "--output", directory)
    return read_json(service.url, *words)


def test_run_is_not_started_twice_or_resumed_with_other_settings(
    service: Service, data: Path, trained: Any, tmp_path: Path
) -> None:
    words = ["train", data, "--name", "cli-trained", "--output", tmp_path]
    code, text = failure(service.url, *words, *OPTIONS)
    assert code == 1 and "--resume" in text and f"step {STEPS}" in text
    again = read_json(service.url, *words, *OPTIONS, "--resume")
    assert (again["state"], again["tinker_path"]) == ("finished before", trained["tinker_path"])
    assert again["sampler_path"] == trained["sampler_path"]
    runs = read_json(service.url, "run", "list")["total"]
    other_rank = [*OPTIONS, "--resume", "--rank", 8]
    code, text = failure(service.url, *words, *other_rank)
    assert code == 1 and "rank is 4 there and 8 here. Resume with" in text
    code, text = failure(service.url, *words, "--resume", "--rank", 4, "--batch-size", 3)
    assert read_json(service.url, "run", "list")["total"] == runs, (
        "a refused command creates no run"
    )
    assert code == 1 and "batch_size was 4 and is 3" in text
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text() + '{"prompt": "a", "completion": "b"}\n')
    words[1] = other
    code, text = failure(service.url, *words, *OPTIONS, "--resume")
    assert code == 1 and "data was" in text


def test_run_killed_before_its_sampler_save_saves_it_on_resume(
    service: Service, data: Path, trained: Any, tmp_path: Path
) -> None:
    read_json(service.url, "checkpoint", "delete", trained["sampler_path"], "--yes")
    words = ["train", data, "--name", "cli-trained", "--output", tmp_path, *OPTIONS, "--resume"]
    again = read_json(service.url, *words)
    trained["sampler_path"] = again["sampler_path"]
    assert again["state"] == "finished before"
    assert read_json(
        service.url, "checkpoint", "diff", trained["tinker_path"], again["sampler_path"]
    )


def test_learning_rate_of_zero_is_accepted(service: Service, data: Path, tmp_path: Path) -> None:
    words = ["train", data, "--name", "cli-still", "--output", tmp_path, *OPTIONS]
    assert read_json(service.url, *words, "--learning-rate", 0, "--epochs", 1, "--resume")
    first = read_json(service.url, "checkpoint", "list", "--name", "cli-still.*")["checkpoints"]
    a, b = (each["tinker_path"] for each in first[:2])
    assert read_json(service.url, "checkpoint", "diff", a, b)["same"]


def test_policy_decides_which_checkpoints_are_kept(service: Service, trained: Any) -> None:
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
        (CALLS, (), 1, ":1: the chat template does not write 'tool_calls' of messages[1]"),
        (LONG, ("--max-length", "20", "--ignore", "score"), 1, "9 of 10 examples would be dropped"),
        ('{"prompt": "a", "completion": "b", "rejected": "c"}', (), 1, ":1: 'rejected' is of a"),
        ("ok", ("--name", "a b"), 2, "letters"),
        ("ok", ("--model", "nobody/knows"), 1, MODEL),
        ("ok", ("--batch-size", "0"), 2, ""),
    ],
)
def test_unusable_training_data_is_reported_in_one_line(
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
    runs = read_json(service.url, "run", "list")["total"]
    found, text = failure(service.url, "train", path, "--output", tmp_path / "out", *words)
    assert (found, says in text) == (code, True), text
    assert read_json(service.url, "run", "list")["total"] == runs, "no run was created"
    assert not (tmp_path / "out").exists()


def test_context_that_bounds_the_length_is_told(service: Service, tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    path.write_text(CALLS)
    done = invoke(service.url, "train", path, "--max-length", 9999)
    assert done.exit_code == 1
    assert "calls: --max-length is 2048, the context of the model" in done.stderr


def test_what_is_cut_dropped_and_ignored_is_told(service: Service, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_bytes("\ufeff".encode() + LONG.encode())
    words = ["train", path, "--name", "cli-long", "--output", tmp_path, "--max-length", 20]
    words += ["--rank", 4, "--max-dropped", 0.9, "--ignore", "score"]

    done = invoke(service.url, *words, "--json")

    said = done.stderr
    assert done.exit_code == 0, said
    assert json.loads(done.stdout)["examples"] == {"kept": 1, "cut": 1, "dropped": 9}
    assert "1 of 10 examples kept, as 1 sequence; 1 cut at 20 tokens" in said
    assert f"9 dropped: nothing learnt in their first 20 tokens ({path}:2, " in said
    assert "ignored fields: score (10)" in said


def test_sample_uses_trained_checkpoint(service: Service, trained: Any) -> None:
    words = ("sample", "count from 3: ", "--max-tokens", 12, "--seed", 7)
    tuned = ("--from", trained["sampler_path"])
    several = read_json(service.url, *words, *tuned, "--num-samples", 2, "--temperature", 0.5)
    assert several["from"] == trained["sampler_path"] and len(several["samples"]) == 2
    assert all(len(each["tokens"]) == len(each["logprobs"]) for each in several["samples"])
    greedy = (*words, *tuned, "--temperature", 0)
    one = read_json(service.url, *greedy)["samples"]
    assert one == read_json(service.url, *greedy)["samples"]
    assert print_of(service.url, *greedy) == one[0]["text"] + "\n"
    base = read_json(service.url, *words, "--from", MODEL, "--temperature", 0)
    assert base["samples"] != one
    stopped = read_json(service.url, *greedy, "--stop", one[0]["text"][:1])["samples"][0]
    assert stopped["stop_reason"] == "stop" and len(stopped["tokens"]) == 1
    asked = read_json(service.url, *greedy, "--chat")
    assert asked["prompt_tokens"] > read_json(service.url, *greedy)["prompt_tokens"]
    piped = print_of(service.url, "sample", "-", *greedy[2:], answer="count from 3: ")
    assert piped == one[0]["text"] + "\n"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--from", "tinker://nobody/sampler_weights/x"), 3, "everstep run list"),
        (("--from", "nobody/knows"), 1, MODEL),
        (("--top-p", "2"), 2, ""),
    ],
)
def test_unknown_sample_source_is_reported(
    service: Service, words: tuple[str, ...], code: int, says: str
) -> None:
    found, text = failure(service.url, "sample", "x", *words)
    assert (found, says in text) == (code, True), text


def test_prompt_that_is_not_utf8_is_reported(service: Service) -> None:
    for words, answer in ((("-",), b"\xff\xfe"), (("\udcff",), None)):
        code, text = failure(service.url, "sample", *words, "--from", MODEL, answer=answer)
        assert code == 2 and "not UTF-8 text" in text
