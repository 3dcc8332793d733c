"""Requests as Tinkex 0.4 (Elixir) sends them, and answers as it can read them.

Its shapes are those of its source: JSON with every field and explicit nulls (or with the nulls of
``asample``, ``forward`` and ``optim_step`` dropped), no ``type`` where its structs have none, ids
that it takes and never sends. `read_future` is what its poll loop understands; anything else ends
the Elixir process that waits.
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
    """One of its service clients, with one training client: ids are counted as it does."""

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
        # It reads this field of the immediate answer, waits for nothing, and goes on.
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

    def take(self) -> int:
        self.counter += 1
        return self.counter - 1

    def send(self, path: str, /, **body: Any) -> str:
        future = self.post(path, model_id=self.model_id, seq_id=self.take(), **body)
        return str(future["request_id"])

    def read_future(self, request_id: str) -> tuple[str, Any]:
        """Its poll loop: ``ok`` and a result, or ``error`` and what it makes of the answer."""
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
            assert known and "status" not in content, f"no clause of its takes {content}"
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
def twin(service: Service) -> Iterator[Tinkex]:
    client = Tinkex(service.url)
    yield client
    client.http.close()


def test_what_a_model_is(tinkex: Tinkex) -> None:
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


def test_training_in_json(tinkex: Tinkex) -> None:
    result = tinkex.do("forward_backward", forward_backward_input=batch())
    assert set(result) == {"loss_fn_output_type", "loss_fn_outputs", "metrics"}
    logprobs = result["loss_fn_outputs"][0]["logprobs"]
    assert (logprobs["dtype"], logprobs["shape"]) == ("float32", [19])
    assert result["metrics"]["loss:sum"] == pytest.approx(-sum(logprobs["data"]), rel=1e-5)
    forward = tinkex.do("forward", forward_input=batch())
    assert forward["loss_fn_outputs"] == result["loss_fn_outputs"]
    assert tinkex.do("optim_step", adam_params=ADAM)["metrics"]["optimizer_step"] == 1.0
    assert tinkex.do("optim_step", adam_params={**ADAM, "weight_decay": None})


@pytest.mark.parametrize("optimizer", [True, False, None])
def test_saving_and_loading(tinkex: Tinkex, twin: Tinkex, optimizer: bool | None) -> None:
    tinkex.step()
    saved = tinkex.do("save_weights", path="a", ttl_seconds=None, type="save_weights")
    assert saved == {"path": f"tinker://{tinkex.model_id}/weights/a", "type": "save_weights"}
    expected = [tinkex.step(1), tinkex.step(2)]
    # Releases before 0.2 leave the field out, which means weights only (seed ADR).
    asked = {} if optimizer is None else {"optimizer": optimizer}
    loaded = twin.do("load_weights", path=saved["path"], type="load_weights", **asked)
    assert loaded["path"] == saved["path"]
    seen = [twin.step(1), twin.step(2)]
    assert seen[0] == expected[0]
    assert (seen[1] == expected[1]) == bool(optimizer)


def test_sampling(tinkex: Tinkex) -> None:
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


def test_nulls_in_a_sample(tinkex: Tinkex) -> None:
    """Earlier releases sent each field of a sample, set or not."""
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


def test_a_failure_is_one_that_it_can_read_whoever_is_at_fault(tinkex: Tinkex) -> None:
    request_id = tinkex.send("load_weights", path="tinker://x/weights/y", optimizer=True)
    outcome, error = tinkex.read_future(request_id)
    assert outcome == "error"
    assert "tinker://x/weights/y" in error["message"]
    assert error["category"] == "user"
    tinkex.step()


def test_a_refusal_has_its_text_where_it_looks_for_it(tinkex: Tinkex) -> None:
    answer = tinkex.http.post("get_info", json={"model_id": "nobody", "type": "get_info"})
    assert answer.status_code == 404
    assert "nobody does not exist" in answer.json()["message"]


def test_an_id_that_a_sampling_client_took_does_not_hold_training_up(
    tinkex: Tinkex, twin: Tinkex
) -> None:
    """`TrainingClient.create_sampling_client_async` counts on its run's ids, and sends none."""
    for client in (tinkex, twin):
        client.step()
    path = tinkex.do("save_weights_for_sampler", path="s", type="save_weights_for_sampler")["path"]
    tinkex.post(
        "create_sampling_session",
        session_id=tinkex.session_id,
        sampling_session_seq_id=tinkex.take(),
        model_path=path,
        type="create_sampling_session",
    )
    assert tinkex.step(1) == twin.step(1)
    assert tinkex.step(2) == twin.step(2)


def test_chunks_that_were_given_up_do_not_hold_training_up(tinkex: Tinkex, twin: Tinkex) -> None:
    """After an error it sends no further chunk of a pass, but all their ids are taken."""
    for client in (tinkex, twin):
        client.step()
    bad = {**batch(), "loss_fn": "no such loss"}
    outcome, _ = tinkex.read_future(tinkex.send("forward_backward", forward_backward_input=bad))
    assert outcome == "error"
    for _ in range(3):
        tinkex.take()
    assert tinkex.step(1) == twin.step(1)
    tinkex.take()
    unreadable = {"data": [{"model_input": 1}], "loss_fn": "cross_entropy"}
    sent = tinkex.send("forward_backward", forward_backward_input=unreadable)
    assert tinkex.read_future(sent)[0] == "error"
    # One that comes late all the same says so, and changes nothing.
    late = tinkex.post(
        "forward_backward",
        model_id=tinkex.model_id,
        seq_id=tinkex.counter - 2,
        forward_backward_input=batch(9),
    )
    outcome, error = tinkex.read_future(late["request_id"])
    assert (outcome, "is not executed any more" in error["message"]) == ("error", True)
    assert tinkex.step(2) == twin.step(2)


def test_the_backward_of_a_custom_loss_may_come_after_what_follows_it(
    tinkex: Tinkex, twin: Tinkex
) -> None:
    """Its ids are taken with the forward's; the loss is computed while others are sent."""
    weights = [0.5] * 19
    forward = tinkex.send("forward", forward_input=batch())
    backward = tinkex.take()
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
    twin.do("forward_backward", forward_backward_input=batch(0, weights))
    assert stepped == twin.do("optim_step", adam_params=ADAM)
    assert stepped["metrics"]["grad_norm"] > 0


def test_lists_and_deletions(tinkex: Tinkex) -> None:
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
    assert tinkex.http.delete(url).status_code == 204, "a retry whose first answer was lost"
    assert tinkex.get(f"training_runs/{tinkex.model_id}/checkpoints")["checkpoints"] == []


def test_external_checkpoints_are_not_listed_to_it(tinkex: Tinkex) -> None:
    tinkex.step()
    saved = tinkex.do("save_weights", path="a", type="save_weights")["path"]
    external = tinkex.do("save_weights_external", path="a", type="save_weights_external")["path"]
    run = f"training_runs/{tinkex.model_id}"
    listed = [tinkex.get(path)["checkpoints"] for path in (f"{run}/checkpoints", "checkpoints")]
    for checkpoints in listed:
        assert {each["checkpoint_type"] for each in checkpoints} <= {"training", "sampler"}
        assert saved in [each["tinker_path"] for each in checkpoints]
    newer = {"user-agent": "AsyncTinker/Python 0.38.0", "x-stainless-package-version": "0.38.0"}
    told = tinkex.http.get(f"{run}/checkpoints", headers=newer).json()["checkpoints"]
    assert {each["tinker_path"] for each in told} == {saved, external}


def test_unloading(tinkex: Tinkex, twin: Tinkex) -> None:
    assert tinkex.step() == twin.step()
    future = tinkex.post("unload_model", model_id=tinkex.model_id, type="unload_model")
    outcome, result = tinkex.read_future(future["request_id"])
    assert (outcome, result["type"]) == ("ok", "unload_model")
    assert tinkex.step(1) == twin.step(1)


def test_telemetry(tinkex: Tinkex) -> None:
    event = {"event": "GENERIC_EVENT", "event_name": "x", "severity": "INFO", "event_data": None}
    sent = {"events": [event], "platform": "beam", "sdk_version": "0.4.0"}
    answer = tinkex.post("telemetry", **sent, session_id=tinkex.session_id)
    assert answer["status"] == "accepted"
