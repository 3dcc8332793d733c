"""Logprobs of the OpenAI API: one entry a token in every array, as evaluation harnesses count."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from everstep.durable_files import replace_file
from everstep.engine import Model
from everstep.server.openai.detokenize import Scored
from everstep.server.openai.responses import ChatForm, TextForm
from everstep.worker.protocol.tokenizer_files import write_tokenizer
from tests.runtime.local import Local
from tests.scenario import MODEL
from tests.server import odd_tokenizers

PROMPT = [69, 118, 101, 114, 121]
CONTEXT = 2
"""Number of the prompt's tokens that a harness scores nothing of."""
INVALID_RUN = [3 + byte for byte in (0x6F, 0x84, 0xDF, 0x9A, 0xD7, 0x74)]


def serve(home: Path, model: Model) -> Local:
    local = Local(home, model)
    local.__enter__()
    write_tokenizer(home, MODEL, model.tokenizer, model.info.source)
    return local


@pytest.fixture(scope="module")
def ending(tmp_path_factory: pytest.TempPathFactory, pico: Model) -> Iterator[Local]:
    """A service whose model ends with its first token, whichever that is."""
    model = copy.copy(pico)
    model.info = replace(pico.info, eos_token_ids=tuple(range(pico.info.vocab_size)))
    local = serve(tmp_path_factory.mktemp("ending"), model)
    yield local
    local.__exit__()


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory, pico: Model) -> Iterator[Local]:
    """A service that decodes with a byte-fallback tokenizer."""
    home = tmp_path_factory.mktemp("bytes")
    local = serve(home, pico)
    (decoder,) = (home / "tokenizers").glob("*.json")
    replace_file(decoder, odd_tokenizers.byte_fallback().to_str().encode())
    yield local
    local.__exit__()


def complete(local: Local, **asked: Any) -> Any:
    """Return the only choice of a text completion."""
    body = {"model": MODEL, "prompt": PROMPT, "seed": 1, "logprobs": 1, **asked}
    answer = local.http.post("http://test/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    return choice


def stream(local: Local, path: str = "completions", **asked: Any) -> list[Any]:
    """Return the choices of a stream's parts."""
    body = {"model": MODEL, "seed": 1, "stream": True, **asked}
    answer = local.http.post(f"http://test/v1/{path}", json=body)
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line)["choices"][0] for line in lines[:-1]]


def likelihood(choice: Any) -> tuple[float, bool]:
    """Read a choice as lm-evaluation-harness does (``LocalCompletionsAPI.parse_logprobs``)."""
    logprobs = choice["logprobs"]["token_logprobs"][CONTEXT:-1]
    tops = choice["logprobs"]["top_logprobs"][CONTEXT:-1]
    greedy = all(own == max(top.values()) for own, top in zip(logprobs, tops, strict=True))
    return sum(logprobs), greedy


def check_arrays(logprobs: Any, text: str, count: int) -> None:
    lengths = {name: len(values) for name, values in logprobs.items()}
    assert set(lengths) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert set(lengths.values()) == {count}
    assert "".join(logprobs["tokens"]) == text
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert text[offset:].startswith(token)


def test_end_token_has_an_entry_without_text(ending: Local) -> None:
    choice = complete(ending, echo=True, max_tokens=1)
    check_arrays(choice["logprobs"], choice["text"], len(PROMPT) + 1)
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"]["tokens"][-1] == ""
    assert choice["logprobs"]["token_logprobs"][-1] < 0


def test_harness_reads_the_likelihood_of_all_tokens(ending: Local) -> None:
    scored = complete(ending, echo=True, max_tokens=0)["logprobs"]["token_logprobs"]
    total, greedy = likelihood(complete(ending, echo=True, max_tokens=1))
    assert total == sum(scored[CONTEXT:])
    assert not greedy


def test_greedy_continuation_is_read_as_greedy(byte_fallback: Local) -> None:
    """The likeliest token must not share its key with another one of the same text."""
    chosen = complete(byte_fallback, max_tokens=1, temperature=0)["logprobs"]
    (top,) = chosen["top_logprobs"]
    assert chosen["token_logprobs"] == [max(top.values())]


def test_streamed_end_token_has_an_entry(ending: Local) -> None:
    parts = stream(ending, prompt=PROMPT, max_tokens=4, logprobs=0)
    logprobs = [part["logprobs"] for part in parts if part["logprobs"]]
    assert [each["tokens"] for each in logprobs] == [[""]]


def test_chat_has_an_entry_for_the_end_token(ending: Local) -> None:
    asked = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 2}
    body = {"model": MODEL, "seed": 1, **asked}
    answer = ending.http.post("http://test/v1/chat/completions", json=body).json()
    (choice,) = answer["choices"]
    (entry,) = choice["logprobs"]["content"]
    assert (entry["token"], entry["bytes"], len(entry["top_logprobs"])) == ("", [], 2)
    assert answer["usage"]["completion_tokens"] == 1
    parts = stream(ending, "chat/completions", **asked)
    streamed = [each for part in parts if part["logprobs"] for each in part["logprobs"]["content"]]
    assert streamed == [entry]


@pytest.mark.parametrize("streamed", [False, True])
def test_invalid_bytes_are_replaced(byte_fallback: Local, streamed: bool) -> None:
    asked: dict[str, Any] = {"prompt": INVALID_RUN, "echo": True, "logprobs": 1, "max_tokens": 1}
    if streamed:
        (choice, _) = stream(byte_fallback, **asked)
    else:
        choice = complete(byte_fallback, **asked)
    check_arrays(choice["logprobs"], choice["text"], len(INVALID_RUN) + 1)
    assert choice["text"].startswith("\N{REPLACEMENT CHARACTER}" * 6)


@pytest.mark.parametrize("stop", [[], ["e"], ["\N{REPLACEMENT CHARACTER}"]])
def test_streamed_arrays_join_to_the_whole_ones(byte_fallback: Local, stop: list[str]) -> None:
    asked: dict[str, Any] = {"prompt": INVALID_RUN, "logprobs": 3, "max_tokens": 24, "stop": stop}
    whole = complete(byte_fallback, **asked)
    parts = stream(byte_fallback, **asked)
    scored = [part for part in parts if part["logprobs"]]
    joined = {
        name: [each for part in scored for each in part["logprobs"][name]]
        for name in whole["logprobs"]
    }
    assert joined == whole["logprobs"]
    assert "".join(part["text"] for part in parts) == whole["text"]
    for part in scored:
        assert len({len(values) for values in part["logprobs"].values()}) == 1
    check_arrays(whole["logprobs"], whole["text"], len(joined["tokens"]))


def test_tokens_of_equal_text_keep_their_logprobs_apart() -> None:
    score = Scored(7, "a", 0, -3.0, ((8, "a", -1.0), (9, "a", -2.0), (7, "a", -3.0)))
    top = TextForm("x", MODEL).piece("a", [score])["logprobs"]["top_logprobs"][0]
    assert top == {"a": -3.0, "token_id:8": -1.0, "token_id:9": -2.0}


@pytest.mark.parametrize("form", [TextForm, ChatForm])
def test_impossible_token_has_a_finite_logprob(form: Any) -> None:
    score = Scored(7, "a", 0, -float("inf"), ((8, "b", -float("inf")),))
    text = json.dumps(form("x", MODEL).piece("a", [score]), allow_nan=False)
    assert text.count("-9999.0") >= 2
