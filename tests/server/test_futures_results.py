"""Futures over HTTP: results in every form, long polls, and futures after a restart."""

from __future__ import annotations

import math
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from everstep.engine import Model
from everstep.server.json_results import SampleResult, TrainingPassResult, json_result
from everstep.server.routes import futures as routes_futures
from everstep.wire.codecs.proto import (
    PROTOBUF,
    decode_forward_backward_output,
    decode_sample_response,
    encode_forward_backward_output,
    encode_sample_response,
)
from everstep.wire.messages.outputs import SampleOutput, SequenceOutput, Stop
from tests.runtime.local import Local, batch
from tests.scenario import MODEL

SAMPLE: dict[str, Any] = {
    "prompt": {"chunks": [{"tokens": [5, 6, 7]}]},
    "num_samples": 2,
    "sampling_params": {"max_tokens": 4, "seed": 3},
    "prompt_logprobs": True,
    "topk_prompt_logprobs": 2,
    "topk_sample_logprobs": 2,
    "target_prompt_logprobs": {"data": [6, -1], "dtype": "int64", "shape": [2, 1]},
    "prompt_alt_tokens_k": 2,
}


def sampled(service: Local, seq_id: int = 0) -> str:
    """Return the future of a sample with every option."""
    sampler = service.post(
        "create_sampling_session",
        session_id=service.session(),
        sampling_session_seq_id=0,
        base_model=MODEL,
    )["sampling_session_id"]
    future = service.post("asample", sampling_session_id=sampler, seq_id=seq_id, **SAMPLE)
    assert len(set(future["sample_sequence_ids"])) == SAMPLE["num_samples"]
    return str(future["request_id"])


@pytest.mark.parametrize("accept", ["application/json", "*/*"])
def test_pass_result_is_equal_in_json_and_protobuf(home: Path, pico: Model, accept: str) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        future = service.send(run, "forward_backward", forward_backward_input=batch(count=3))
        result = service.poll(future, accept=accept)
        assert result.headers["content-type"] == "application/json"
        content = result.json()
        for header in (PROTOBUF, f"{PROTOBUF}, application/json"):  # newer SDKs, and before them
            answer = service.poll(future, accept=header)
            assert answer.headers["content-type"] == PROTOBUF
            output = decode_forward_backward_output(answer.content)
            assert content["metrics"] == output.metrics
            rows = [{n: t.to_dict() for n, t in row.items()} for row in output.loss_fn_outputs]
            assert content["loss_fn_outputs"] == rows
            assert content["loss_fn_output_type"] == output.loss_fn_output_type
        TypeAdapter(TrainingPassResult).validate_python(content, strict=True)
        assert [len(row["logprobs"]["data"]) for row in content["loss_fn_outputs"]] == [19, 24, 29]


def test_sample_result_is_equal_in_json_and_protobuf(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        future = sampled(service)
        content = service.result(future)
        SampleResult.model_validate(content)
        answer = service.poll(future, accept=PROTOBUF)
        assert answer.headers["content-type"] == PROTOBUF
        response = decode_sample_response(answer.content)
        assert content["type"] == "sample"
        assert len(content["sequences"]) == SAMPLE["num_samples"]
        pairs = zip(content["sequences"], response.sequences, strict=True)
        for ours, theirs in pairs:
            assert ours["tokens"] == theirs.tokens
            assert ours["logprobs"] == theirs.logprobs
            assert ours["stop_reason"] == theirs.stop_reason
            top = [[tuple(cell) for cell in row] for row in ours["topk_logprobs"]]
            assert top == theirs.topk_logprobs
        assert content["prompt_logprobs"] == response.prompt_logprobs
        assert content["prompt_logprobs"][0] is None
        assert [row is None for row in content["topk_prompt_logprobs"]] == [True, False, False]
        assert response.target_prompt_logprobs is not None
        assert content["target_prompt_logprobs"] == response.target_prompt_logprobs.to_dict()
        assert content["prompt_alt_tokens"]["tokens"]["shape"] == [2, 2]


def test_nan_and_infinity_are_valid_json() -> None:
    odd = np.array([math.nan, math.inf, -math.inf, 1.0], dtype=np.float32)
    body = encode_forward_backward_output([{"logprobs": odd}], {"loss:sum": math.nan})
    content = json_result("forward_backward", body)
    assert content["loss_fn_outputs"][0]["logprobs"]["data"] == ["NaN", "Infinity", "-Infinity", 1]
    assert content["metrics"] == {"loss:sum": "NaN"}
    tokens = np.array([1], dtype=np.int32)
    sequence = SequenceOutput(tokens, np.array([-math.inf], dtype=np.float32), Stop.LENGTH)
    sample = json_result("sample", encode_sample_response(SampleOutput([sequence])))
    assert sample["sequences"][0]["logprobs"] == ["-Infinity"]
    assert TypeAdapter(list[float]).validate_python(["NaN", "-Infinity"])[1] == -math.inf


def test_large_result_is_announced_by_its_size_if_allowed(
    home: Path, pico: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        future = service.send(run, "forward_backward", forward_backward_input=batch())
        whole = service.poll(future, accept=PROTOBUF, allow_metadata_only=True)
        assert whole.headers["content-type"] == PROTOBUF, "a small one comes at once"
        monkeypatch.setattr(routes_futures, "MAX_INLINE_BYTES", len(whole.content) - 1)
        for accept in (PROTOBUF, "application/json"):
            assert service.poll(future, accept=accept, allow_metadata_only=True).json() == {
                "status": "complete_metadata",
                "response_payload_size": len(whole.content),
            }
        for body in ({"allow_metadata_only": False}, {}):
            assert service.poll(future, accept=PROTOBUF, **body).content == whole.content
        failed = service.send(run, "optim_step", adam_params={"beta1": 2.0})
        answer = service.poll(failed, accept=PROTOBUF, allow_metadata_only=True).json()
        assert answer["category"] == "user", "a failure is never reduced to its size"


def test_poll_returns_408_until_a_later_one_returns_the_result(home: Path, pico: Model) -> None:
    with Local(home, pico, poll_seconds=0.02) as service:
        run = service.new_run()
        second = service.send(run, "optim_step", 2, adam_params={})  # the first one is to come
        answer = service.poll(second, accept=PROTOBUF, allow_metadata_only=True)
        assert answer.status_code == 408
        assert answer.json() == {
            "type": "try_again",
            "request_id": second,
            "queue_state": "active",
        }
        service.send(run, "forward_backward", 1, forward_backward_input=batch())
        assert service.result(second)["metrics"]["optimizer_step"] == 1.0


def test_poll_returns_as_soon_as_the_result_exists(home: Path, pico: Model) -> None:
    with Local(home, pico, poll_seconds=3600.0) as service:  # no poll ends by itself
        run, reference = service.new_run(), service.new_run()
        assert service.train(run, 0) == service.train(reference, 0)


@pytest.mark.parametrize("request_id", ["none", "", "é\u0000'; --", "0" * 32])
def test_unknown_request_id_is_rejected_at_once(home: Path, pico: Model, request_id: str) -> None:
    with Local(home, pico, poll_seconds=3600.0) as service:
        for _ in range(2):
            answer = service.poll(request_id)
            assert answer.status_code == 404
            assert answer.json() == {
                "detail": f"There is no future {request_id} here: this service has not accepted "
                "it, or it was deleted with its run or session."
            }


def test_damaged_result_fails_every_poll(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        future = service.send(service.new_run(), "optim_step", adam_params={})
        service.result(future)
    with sqlite3.connect(home / "ledger.sqlite") as database:
        database.execute("UPDATE operations SET result = x'7b7d' WHERE request_id = ?", [future])
    with service.after(poll_seconds=0.05) as service:
        for _ in range(2):
            failed = service.poll(future).json()
            assert (failed["category"], "is damaged" in failed["error"]) == ("server", True)


def test_results_and_failures_are_equal_after_a_restart(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        futures = [*service.step(run, 0), service.send(run, "save_weights", path="a")]
        futures += [service.send(run, "save_weights", path="../a"), sampled(service)]
        before = [forms(service, each) for each in futures]
    with service.after(poll_seconds=3600.0) as service:
        assert [forms(service, each) for each in futures] == before
        assert "error" in service.result(futures[3])
        assert service.finished == [], "nothing is executed for it"


def test_pending_operation_resolves_after_a_restart(home: Path, pico: Model) -> None:
    with Local(home, pico, shutdown_seconds=0.01) as service:
        run, reference = service.new_run(), service.new_run()
        expected = service.train(reference, 0)
        sample = service.result(sampled(service))
        service.steps.close()  # until it ends
        waiting = [*service.step(run, 0), sampled(service, seq_id=1)]
    with service.after() as service:
        results = [service.result(each) for each in waiting]
        assert results == [*expected, sample], "the request names its seed"
        assert len(sample["sequences"]) == SAMPLE["num_samples"]


def forms(service: Local, request_id: str) -> list[Any]:
    """Return a result in the form of every kind of client."""
    service.result(request_id)
    answers = [service.poll(request_id, accept=each) for each in ("application/json", PROTOBUF)]
    return [(each.status_code, each.headers["content-type"], each.content) for each in answers]
