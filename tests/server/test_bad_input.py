"""Bad input: a clear error, nothing accepted is lost, the run stays usable. Real HTTP."""

from __future__ import annotations

import json
import socket
import uuid
from typing import Any

import httpx
import pytest
import tinker
import zstandard

import everstep
from tests.conftest import Service
from tests.scenario import MODEL, connect, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def http(service: Service) -> Any:
    with httpx.Client(base_url=f"{service.url}/api/v1", timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def client(service: Service) -> Any:
    return connect(everstep, service.url)


@pytest.fixture(scope="module")
def run(client: Any) -> Any:
    return client.create_lora_training_client(MODEL, rank=4, seed=1).result()


def datum(tokens: list[int], **inputs: Any) -> everstep.Datum:
    tensors = {
        name: everstep.TensorData(values, "int64" if name == "target_tokens" else "float32")
        if not isinstance(values, everstep.TensorData)
        else values
        for name, values in inputs.items()
    }
    return everstep.Datum(model_input=everstep.ModelInput.from_ints(tokens), loss_fn_inputs=tensors)


CASES: list[tuple[str, list[everstep.Datum], str, dict[str, Any] | None, str]] = [
    ("empty data", [], "cross_entropy", None, "data is empty"),
    ("no tokens", [datum([], target_tokens=[])], "cross_entropy", None, "no tokens"),
    ("token", [datum([1, 999], target_tokens=[1, 2])], "cross_entropy", None, "token id 999"),
    ("target", [datum([1, 2], target_tokens=[1, -3])], "cross_entropy", None, "token id -3"),
    ("shape", [datum([1, 2], target_tokens=[1])], "cross_entropy", None, "T = 2"),
    (
        "weights",
        [datum([1, 2], target_tokens=[1, 2], weights=[1.0])],
        "cross_entropy",
        None,
        "has shape",
    ),
    ("loss", [datum([1], target_tokens=[1])], "hinge", None, "not supported here"),
    (
        "no provenance",
        [datum([1], target_tokens=[1], advantages=[1.0])],
        "stable_reinforce",
        None,
        "no provenance",
    ),
    ("missing", [datum([1], target_tokens=[1])], "ppo", None, "'logprobs'] is missing"),
    (
        "nan",
        [datum([1], target_tokens=[1], logprobs=[0.0], advantages=[float("nan")])],
        "importance_sampling",
        None,
        "has to be finite",
    ),
    (
        "unknown input",
        [datum([1], target_tokens=[1], extra=[0.0])],
        "cross_entropy",
        None,
        "unknown to cross_entropy",
    ),
    (
        "config",
        [datum([1], target_tokens=[1])],
        "cross_entropy",
        {"beta": 1.0},
        "it takes nothing",
    ),
    ("long", [datum([1] * 3000, target_tokens=[1] * 3000)], "cross_entropy", None, "context"),
]


@pytest.mark.parametrize(("name", "data", "loss", "config", "text"), CASES, ids=lambda v: None)
def test_invalid_training_pass_fails_its_future_and_keeps_the_run_usable(
    client: Any, name: str, data: Any, loss: str, config: Any, text: str
) -> None:
    run = client.create_lora_training_client(MODEL, rank=4, seed=1).result()  # no moments yet
    before = run.forward([datum([1, 2], target_tokens=[2, 3])], "cross_entropy").result()
    with pytest.raises(everstep.RequestFailedError, match=text.replace("[", r"\[")) as caught:
        run.forward_backward(data, loss, config).result()
    assert caught.value.category == "user"
    run.optim_step(everstep.AdamParams(learning_rate=1.0)).result()  # no gradient was left
    after = run.forward([datum([1, 2], target_tokens=[2, 3])], "cross_entropy").result()
    assert before.metrics == after.metrics


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"base_model": "no/such"}, "not served here"),
        ({"base_model": MODEL, "rank": 0}, "must be positive"),
        ({"base_model": MODEL, "rank": 5000}, "at most"),
    ],
)
def test_invalid_run_creation_fails_its_future(
    client: Any, arguments: dict[str, Any], text: str
) -> None:
    with pytest.raises(everstep.RequestFailedError, match=text):
        client.create_lora_training_client(**arguments).result()


@pytest.mark.parametrize(
    "path",
    [
        "tinker://x/weights/../../etc",
        "tinker://x/weights/%2e%2e",
        "/etc/passwd",
        "tinker://x/nothing/y",
        "tinker://x/weights/absent",
        "",
    ],
)
def test_invalid_path_fails_the_load_and_keeps_the_run_unchanged(run: Any, path: str) -> None:
    for load in (run.load_state, run.load_state_with_optimizer):
        with pytest.raises(everstep.RequestFailedError):
            load(path).result()
    train(everstep, run, 1)


@pytest.mark.parametrize("name", ["../../x", "a/b", ".hidden", "", "x" * 200, "a b", "%2e"])
def test_invalid_name_fails_the_save_with_the_rule(run: Any, name: str) -> None:
    with pytest.raises(everstep.RequestFailedError, match="a name is one path segment"):
        run.save_state(name).result()


def test_checkpoint_of_another_shape_is_rejected_with_each_field(client: Any, run: Any) -> None:
    other = client.create_lora_training_client(MODEL, rank=16, seed=1, train_unembed=False).result()
    path = other.save_state("other").result().path
    with pytest.raises(everstep.RequestFailedError) as caught:
        run.load_state(path).result()
    assert "rank is 16 but target model rank is 4" in str(caught.value)
    assert "train_unembed is False but target model train_unembed is True" in str(caught.value)


@pytest.mark.parametrize(
    ("route", "body", "status"),
    [
        ("/optim_step", {"model_id": "nobody", "seq_id": 1}, 404),
        ("/optim_step", {"seq_id": 1}, 400),
        ("/get_info", {"model_id": "nobody"}, 404),
        ("/create_model", {"session_id": "none", "model_seq_id": 0, "base_model": MODEL}, 404),
        ("/asample", {"prompt": {"chunks": []}, "sampling_session_id": "x", "seq_id": 0}, 404),
        ("/retrieve_future", {"request_id": "none"}, 404),
        ("/weights_info", {"tinker_path": "tinker://x/weights/y"}, 404),
        ("/weights_info", {"tinker_path": "nonsense"}, 400),
    ],
)
def test_unattributable_request_is_rejected_with_a_json_body(
    http: Any, route: str, body: dict[str, Any], status: int
) -> None:
    answer = http.post(route, json=body)
    assert answer.status_code == status
    assert answer.json()["detail"]


TOO_LARGE = 10**20


@pytest.mark.parametrize(
    ("route", "params"),
    [
        ("/sessions", {"offset": TOO_LARGE}),
        ("/training_runs", {"offset": TOO_LARGE}),
        ("/checkpoints", {"offset": TOO_LARGE}),
        ("/audit", {"cursor": TOO_LARGE}),
        ("/audit", {"day": "9999-12-31"}),
    ],
)
def test_out_of_range_page_is_rejected(http: Any, route: str, params: Any) -> None:
    answer = http.get(route, params=params)
    assert (answer.status_code, *params) == (400, answer.json()["detail"].split(":")[0][6:])


def test_out_of_range_numbers_are_rejected(http: Any, client: Any, run: Any) -> None:
    sampler = client.create_sampling_client(base_model=MODEL).result().sampling_session_id
    bodies: list[dict[str, Any]] = [
        {"prev_cursor": TOO_LARGE},
        {"target": {"cloned_sampler_id": TOO_LARGE}},
        {"target": {"cloned_sampler_id": -1}},
    ]
    for more in bodies:
        target = {"sampling_session_id": sampler, **more.pop("target", {})}
        answer = http.post("/retrieve_futures", json={"target": target, "timeout": 0, **more})
        assert (answer.status_code, "equal to 0" in answer.text or "less than" in answer.text) == (
            400,
            True,
        )
    path = run.save_state("bounds").result().path
    for seconds in (0, 10**12, TOO_LARGE):
        body = {"tinker_path": path, "ttl_seconds": seconds}
        answer = http.post("/everstep/weights_access_tokens", json=body)
        assert (answer.status_code, "ttl_seconds" in answer.text) == (400, True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sdk", [everstep, tinker], ids=lambda sdk: sdk.__name__)
def test_body_of_100_mb_fails_its_future_and_keeps_the_run_usable(
    service: Service, sdk: Any
) -> None:
    run, reference = (
        connect(sdk, service.url).create_lora_training_client(MODEL, rank=4, seed=1).result()
        for _ in range(2)
    )
    train(sdk, run, 1)
    image = sdk.types.ImageChunk(data=bytes(100_000_000), format="png", expected_tokens=1)
    huge = sdk.types.Datum(
        model_input=sdk.types.ModelInput(chunks=[image]), loss_fn_inputs={"target_tokens": [1]}
    )
    with pytest.raises(sdk.RequestFailedError, match="larger than 67108864 bytes") as caught:
        run.forward_backward([huge], "cross_entropy").result()
    assert caught.value.category == "user"
    assert train(sdk, reference, 3)[1:] == train(sdk, run, 2, shift=1), (
        "nothing waits, nothing is left"
    )


@pytest.mark.parametrize(
    ("route", "head", "compress", "status"),
    [
        ("/forward_backward", b"", None, 413),
        ("/forward_backward", b"\x0a\x06nobody\x10\x01", zstandard.compress, 404),
        ("/optim_step", b"", None, 413),
    ],
)
def test_unattributable_body_over_the_limit_is_rejected(
    http: Any, route: str, head: bytes, compress: Any, status: int
) -> None:
    content = head + bytes(100_000_000)
    headers = {"content-type": "application/x-protobuf"}
    if compress:
        content, headers["content-encoding"] = compress(content), "zstd"
    answer = http.post(route, content=content, headers=headers)
    assert answer.status_code == status
    assert ("larger than" if status == 413 else "does not exist") in answer.json()["detail"]


@pytest.mark.parametrize(
    "head", [b"Content-Encoding: \0", b"Content-Length: -1", b"Content-Length: " + b"9" * 5000]
)
def test_malformed_http_is_answered_in_json(service: Service, head: bytes) -> None:
    address = httpx.URL(service.url)
    with socket.create_connection((address.host, address.port or 0), timeout=60) as connection:
        connection.sendall(
            b"POST /api/v1/create_session HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n"
        )
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    status, _, rest = answer.partition(b"\r\n")
    headers, _, body = rest.partition(b"\r\n\r\n")
    assert status == b"HTTP/1.1 400 Bad Request"
    assert b"content-length: %d" % len(body) in headers.lower()
    assert json.loads(body)["detail"]


def test_repeated_submit_is_one_operation(http: Any, run: Any) -> None:
    key = {"X-Idempotency-Key": uuid.uuid4().hex}
    sessions = {
        http.post("/create_session", json={}, headers=key).json()["session_id"] for _ in range(3)
    }
    assert len(sessions) == 1
    body = {"session_id": sessions.pop(), "model_seq_id": 0, "base_model": MODEL}
    answers = {http.post("/create_model", json=body).json()["request_id"] for _ in range(3)}
    assert len(answers) == 1
    other = {**body, "lora_config": {"rank": 2}}
    assert http.post("/create_model", json=other).status_code == 400
