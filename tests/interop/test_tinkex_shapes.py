"""Requests as Tinkex 0.4 (Elixir) sends them, and responses that it can read.

The shapes follow its source: JSON with every field and explicit nulls (except in ``asample``,
``forward`` and ``optim_step``), no ``type`` where its structs have none, and sequence ids that it
reserves and never sends. `read_future` accepts what its poll loop does; anything else ends the
Elixir process that polls.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.conftest import Service
from tests.scenario import MODEL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
HEADERS = {
    "accept": "application/json",
    "user-agent": "AsyncTinkex/Elixir 0.4.0",
    "accept-encoding": "gzip",
    "x-api-key": "tml-tinkex",
    "x-stainless-package-version": "0.4.0",
    "x-stainless-runtime": "BEAM",
}
ADAM = {"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12}
TOKENS = [(7 * i) % 250 for i in range(20)]


class Tinkex:
    """A service client with one training client; counts sequence ids as Tinkex does."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=f"{url}/api/v1", headers=HEADERS, timeout=60)
        session = self.post(
            "create_session",
            tags=["tinkex-elixir"],
            user_metadata=None,
            sdk_version="0.4.0",
            project_id=None,
            type="create_session",
        )
        self.session_id = session["session_id"]
        lora = {
            "rank": 4,
            "seed": 7,
            "train_unembed": True,
            "train_mlp": True,
            "train_attn": True,
        }
        created = self.post(
            "create_model",
            session_id=self.session_id,
            model_seq_id=0,
            base_model=MODEL,
            user_metadata=None,
            lora_config=lora,
            type="create_model",
        )
        # It reads this field of the immediate response and doesn't wait for the future.
        self.model_id: str = created["model_id"]
        self.counter = 1
        self.samplers = 0

    def post(self, path: str, /, **body: Any) -> Any:
        answer = self.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def get(self, path: str) -> Any:
        answer = self.http.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def reserve_id(self) -> int:
        self.counter += 1
        return self.counter - 1

    def send(self, path: str, /, **body: Any) -> str:
        future = self.post(path, model_id=self.model_id, seq_id=self.reserve_id(), **body)
        return str(future["request_id"])

    def read_future(self, request_id: str) -> tuple[str, Any]:
        """Poll as Tinkex does; returns ``ok`` and the result, or ``error`` and the response."""
        allow_metadata = True
        while True:
            body = {"request_id": request_id, "allow_metadata_only": allow_metadata}
            answer = self.http.post("retrieve_future", json=body)
            content = answer.json()
            if answer.status_code == 408 or content.get("type") == "try_again":
                continue
            if answer.status_code != 200:
                return "error", content
            if content.get("status") == "complete_metadata":
                allow_metadata = False
                continue
            known = "loss_fn_output_type" in content or "type" in content
            assert known and "status" not in content, f"Tinkex has no clause that matches {content}"
            return "ok", content

    def do(self, path: str, /, **body: Any) -> Any:
        outcome, content = self.read_future(self.send(path, **body))
        assert outcome == "ok", content
        return content

    def step(self, shift: int = 0) -> Any:
        result = self.do("forward_backward", forward_backward_input=batch(shift))
        self.do("optim_step", adam_params=ADAM)
        return result["metrics"]["loss:sum"], result["loss_fn_outputs"]


def batch(shift: int = 0, weights: list[float] | None = None) -> dict[str, Any]:
    tokens = [(token + shift) % 250 for token in TOKENS]
    n = len(tokens) - 1
    datum = {
        "model_input": {"chunks": [{"tokens": tokens[:-1], "type": "encoded_text"}]},
        "loss_fn_inputs": {
            "target_tokens": {"data": tokens[1:], "dtype": "int64", "shape": None},
            "weights": {"data": weights or [1.0] * n, "dtype": "float32", "shape": [n]},
        },
    }
    return {"data": [datum], "loss_fn": "cross_entropy", "loss_fn_config": None}


@pytest.fixture
def tinkex(service: Service) -> Iterator[Tinkex]:
    client = Tinkex(service.url)
    yield client
    client.http.close()


@pytest.fixture
def reference(service: Service) -> Iterator[Tinkex]:
    client = Tinkex(service.url)
    yield client
    client.http.close()


def test_model_info_and_capabilities(tinkex: Tinkex) -> None:
    assert tinkex.model_id == f"{tinkex.session_id}:train:0"
    info = tinkex.post("get_info", model_id=tinkex.model_id, type="get_info")
    assert info["model_data"]["model_name"] == MODEL
    assert {"model_id", "is_lora", "lora_rank", "model_name"} <= set(info)
    names = [
        each["model_name"] for each in tinkex.get("get_server_capabilities")["supported_models"]
    ]
    assert MODEL in names
    assert tinkex.get("healthz")["status"] == "ok"
    assert tinkex.post("session_heartbeat", session_id=tinkex.session_id, type="session_heartbeat")


def test_training_returns_json(tinkex: Tinkex) -> None:
    result = tinkex.do("forward_backward", forward_backward_input=batch())
    assert set(result) == {"loss_fn_output_type", "loss_fn_outputs", "metrics"}
    logprobs = result["loss_fn_outputs"][0]["logprobs"]
    assert (logprobs["dtype"], logprobs["shape"]) == ("float32", [19])
    assert result["metrics"]["loss:sum"] == pytest.approx(-sum(logprobs["data"]), rel=1e-5)
    forward = tinkex.do("forward", forward_input=batch())
    assert forward["loss_fn_outputs"] == result["loss_fn_outputs"]
    assert tinkex.do("optim_step", adam_params=ADAM)["metrics"]["optimizer_step"] == 1.0
    outcome, refusal = tinkex.read_future(
        tinkex.send("optim_step", adam_params={**ADAM, "weight_decay": None})
    )
    assert outcome != "ok" and "weight_decay: a number is required" in str(refusal)


@pytest.mark.parametrize("optimizer", [True, False, None])
def test_load_restores_the_optimizer_only_on_request(
    tinkex: Tinkex, reference: Tinkex, optimizer: bool | None
) -> None:
    tinkex.step()
    saved = tinkex.do("save_weights", path="a", ttl_seconds=None, type="save_weights")
    assert saved == {"path": f"tinker://{tinkex.model_id}/weights/a", "type": "save_weights"}
    expected = [tinkex.step(1), tinkex.step(2)]
    # Releases before 0.2 leave the field out, which means weights only (seed ADR).
    asked = {} if optimizer is None else {"optimizer": optimizer}
    loaded = reference.do("load_weights", path=saved["path"], type="load_weights", **asked)
    assert loaded["path"] == saved["path"]
    seen = [reference.step(1), reference.step(2)]
    assert seen[0] == expected[0]
    assert (seen[1] == expected[1]) == bool(optimizer)


def test_named_and_unnamed_samplers_agree(tinkex: Tinkex) -> None:
    tinkex.step()
    named = tinkex.do(
        "save_weights_for_sampler",
        path="s",
        sampling_session_seq_id=None,
        ttl_seconds=None,
        type="save_weights_for_sampler",
    )
    assert named["path"].endswith("/sampler_weights/s")
    unnamed = tinkex.do(
        "save_weights_for_sampler",
        path=None,
        sampling_session_seq_id=0,
        ttl_seconds=None,
        type="save_weights_for_sampler",
    )
    session = tinkex.post(
        "create_sampling_session",
        session_id=tinkex.session_id,
        sampling_session_seq_id=5,
        base_model=None,
        model_path=named["path"],
        type="create_sampling_session",
    )
    results = [
        sample(tinkex, each["sampling_session_id"], n) for n, each in enumerate((unnamed, session))
    ]
    assert results[0]["sequences"] == results[1]["sequences"]
    sampler = quote(session["sampling_session_id"], safe="")  # it escapes the colons
    assert tinkex.get(f"samplers/{sampler}")["base_model"] == MODEL


def sample(tinkex: Tinkex, sampler: str, seq_id: int) -> Any:
    future = tinkex.post(
        "asample",
        sampling_session_id=sampler,
        seq_id=seq_id,
        prompt={"chunks": [{"tokens": [5, 6, 7], "type": "encoded_text"}]},
        sampling_params={
            "max_tokens": 5,
            "seed": 1,
            "temperature": 1.0,
            "top_k": -1,
            "top_p": 1.0,
        },
        num_samples=2,
        topk_prompt_logprobs=0,
        type="sample",
    )
    outcome, result = tinkex.read_future(future["request_id"])
    assert outcome == "ok", result
    assert result["type"] == "sample"
    assert {"tokens", "logprobs", "stop_reason"} <= set(result["sequences"][0])
    return result


def test_sample_accepts_nulls(tinkex: Tinkex) -> None:
    """Earlier releases sent every field of a sample, set or not."""
    session = tinkex.post(
        "create_sampling_session",
        session_id=tinkex.session_id,
        sampling_session_seq_id=0,
        base_model=MODEL,
        model_path=None,
        type="create_sampling_session",
    )
    future = tinkex.post(
        "asample",
        sampling_session_id=session["sampling_session_id"],
        seq_id=0,
        base_model=None,
        model_path=None,
        prompt={"chunks": [{"tokens": [5, 6, 7], "type": "encoded_text"}]},
        sampling_params={
            "max_tokens": 3,
            "seed": None,
            "stop": None,
            "temperature": 1.0,
            "top_k": -1,
            "top_p": 1.0,
        },
        num_samples=1,
        prompt_logprobs=None,
        topk_prompt_logprobs=0,
        type="sample",
    )
    assert tinkex.read_future(future["request_id"])[0] == "ok"


def test_failed_operation_has_a_readable_error(tinkex: Tinkex) -> None:
    request_id = tinkex.send("load_weights", path="tinker://x/weights/y", optimizer=True)
    outcome, error = tinkex.read_future(request_id)
    assert outcome == "error"
    assert "tinker://x/weights/y" in error["message"]
    assert error["category"] == "user"
    tinkex.step()


def test_refusal_has_its_text_in_message(tinkex: Tinkex) -> None:
    answer = tinkex.http.post("get_info", json={"model_id": "nobody", "type": "get_info"})
    assert answer.status_code == 404
    assert "nobody does not exist" in answer.json()["message"]


def test_id_reserved_by_a_sampling_client_does_not_block_training(
    tinkex: Tinkex, reference: Tinkex
) -> None:
    """`TrainingClient.create_sampling_client_async` reserves ids of its run and sends none."""
    for client in (tinkex, reference):
        client.step()
    path = tinkex.do("save_weights_for_sampler", path="s", type="save_weights_for_sampler")["path"]
    tinkex.post(
        "create_sampling_session",
        session_id=tinkex.session_id,
        sampling_session_seq_id=tinkex.reserve_id(),
        model_path=path,
        type="create_sampling_session",
    )
    assert tinkex.step(1) == reference.step(1)
    assert tinkex.step(2) == reference.step(2)


def test_chunks_that_are_never_sent_do_not_block_training(
    tinkex: Tinkex, reference: Tinkex
) -> None:
    """After an error it sends no further chunk of a pass, although it reserved their ids."""
    for client in (tinkex, reference):
        client.step()
    bad = {**batch(), "loss_fn": "no such loss"}
    outcome, _ = tinkex.read_future(tinkex.send("forward_backward", forward_backward_input=bad))
    assert outcome == "error"
    for _ in range(3):
        tinkex.reserve_id()
    assert tinkex.step(1) == reference.step(1)
    tinkex.reserve_id()
    unreadable = {"data": [{"model_input": 1}], "loss_fn": "cross_entropy"}
    sent = tinkex.send("forward_backward", forward_backward_input=unreadable)
    assert tinkex.read_future(sent)[0] == "error"
    # A chunk that arrives late is refused and changes nothing.
    late = tinkex.post(
        "forward_backward",
        model_id=tinkex.model_id,
        seq_id=tinkex.counter - 2,
        forward_backward_input=batch(9),
    )
    outcome, error = tinkex.read_future(late["request_id"])
    assert (outcome, "is not executed any more" in error["message"]) == ("error", True)
    assert tinkex.step(2) == reference.step(2)


def test_backward_of_a_custom_loss_may_arrive_after_later_operations(
    tinkex: Tinkex, reference: Tinkex
) -> None:
    """Its ids are reserved with the forward's, and the loss is computed while others are sent."""
    weights = [0.5] * 19
    forward = tinkex.send("forward", forward_input=batch())
    backward = tinkex.reserve_id()
    step = tinkex.send("optim_step", adam_params=ADAM)
    assert tinkex.read_future(forward)[0] == "ok"
    late = tinkex.post(
        "forward_backward",
        model_id=tinkex.model_id,
        seq_id=backward,
        forward_backward_input=batch(0, weights),
    )
    assert tinkex.read_future(late["request_id"])[0] == "ok"
    stepped = tinkex.read_future(step)[1]
    reference.do("forward_backward", forward_backward_input=batch(0, weights))
    assert stepped == reference.do("optim_step", adam_params=ADAM)
    assert stepped["metrics"]["grad_norm"] > 0


def test_checkpoints_are_listed_until_deleted(tinkex: Tinkex) -> None:
    tinkex.step()
    path = tinkex.do("save_weights", path="gone", ttl_seconds=None, type="save_weights")["path"]
    run = tinkex.get(f"training_runs/{tinkex.model_id}")
    assert run["training_run_id"] == tinkex.model_id
    assert run["corrupted"] is False
    assert tinkex.get("training_runs?limit=20&offset=0")["cursor"]["total_count"] >= 1
    listed = tinkex.get(f"training_runs/{tinkex.model_id}/checkpoints")["checkpoints"]
    assert [each["tinker_path"] for each in listed] == [path]
    assert re.fullmatch(r"weights/gone", listed[0]["checkpoint_id"])
    assert tinkex.get("checkpoints?limit=50&offset=0")["checkpoints"]
    info = tinkex.post("weights_info", tinker_path=path)
    assert (info["base_model"], info["is_lora"], info["lora_rank"]) == (MODEL, True, 4)
    # `{kind}/{name}` as two segments, the run's colons as they are.
    url = f"training_runs/{tinkex.model_id}/checkpoints/weights/gone"
    assert tinkex.http.put(f"{url}/ttl", json={"ttl_seconds": 7200}).status_code == 204
    assert tinkex.get(f"training_runs/{tinkex.model_id}/checkpoints")["checkpoints"][0][
        "expires_at"
    ]
    archive = tinkex.http.get(f"{url}/archive", headers={"accept": "application/gzip"})
    assert (archive.status_code, ":" in tinkex.model_id) == (302, True)
    assert tinkex.http.get(archive.headers["location"]).status_code == 200
    assert tinkex.http.delete(url).status_code == 204
    assert tinkex.http.delete(url).status_code == 204, "a retry whose first response was lost"
    assert tinkex.get(f"training_runs/{tinkex.model_id}/checkpoints")["checkpoints"] == []


def test_external_checkpoints_are_not_listed_to_old_releases(tinkex: Tinkex) -> None:
    tinkex.step()
    saved = tinkex.do("save_weights", path="a", type="save_weights")["path"]
    external = tinkex.do("save_weights_external", path="a", type="save_weights_external")["path"]
    run = f"training_runs/{tinkex.model_id}"
    listed = [tinkex.get(path)["checkpoints"] for path in (f"{run}/checkpoints", "checkpoints")]
    for checkpoints in listed:
        assert {each["checkpoint_type"] for each in checkpoints} <= {"training", "sampler"}
        assert saved in [each["tinker_path"] for each in checkpoints]
    newer = {"user-agent": "AsyncTinker/Python 0.38.0", "x-stainless-package-version": "0.38.0"}
    listed_to_newer = tinkex.http.get(f"{run}/checkpoints", headers=newer).json()["checkpoints"]
    assert {each["tinker_path"] for each in listed_to_newer} == {saved, external}


def test_unloaded_run_loads_again(tinkex: Tinkex, reference: Tinkex) -> None:
    assert tinkex.step() == reference.step()
    future = tinkex.post("unload_model", model_id=tinkex.model_id, type="unload_model")
    outcome, result = tinkex.read_future(future["request_id"])
    assert (outcome, result["type"]) == ("ok", "unload_model")
    assert tinkex.step(1) == reference.step(1)


def test_telemetry_is_accepted(tinkex: Tinkex) -> None:
    event = {"event": "GENERIC_EVENT", "event_name": "x", "severity": "INFO", "event_data": None}
    sent = {"events": [event], "platform": "beam", "sdk_version": "0.4.0"}
    answer = tinkex.post("telemetry", **sent, session_id=tinkex.session_id)
    assert answer["status"] == "accepted"
