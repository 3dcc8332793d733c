"""One script through the official SDK and ours: the service receives the same requests."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import tinker

import everstep
from tests.client.fake_service import GIVE_UP_SECONDS, MODEL, FakeService

pytestmark = pytest.mark.filterwarnings("ignore")
T = GIVE_UP_SECONDS
BACKGROUND = ("/telemetry", "/session_heartbeat")
FLAGS = ("/client/config", "/client/dynamic_config")
POLL = "/retrieve_future"
POLL_HEADERS = ("accept", "x-tinker-request-type", "x-tinker-request-iteration")
ROUNDTRIP = "x-tinker-create-promise-roundtrip-time"
VERSIONS = re.compile(r"^\d+\.\d+\.\d+\S*$")


def data(sdk: Any, count: int) -> list[Any]:
    return [
        sdk.types.Datum(
            model_input=sdk.types.ModelInput.from_ints([index, 1, 2]),
            loss_fn_inputs={"target_tokens": [1, 2, index], "weights": [1.0, 0.5, 0.0]},
        )
        for index in range(count)
    ]


def custom(rows: Any, logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
    return sum((row * row).sum() for row in logprobs), {"mine:sum": 1.0}


def train(sdk: Any, service: Any) -> list[Any]:
    types = sdk.types
    run = service.create_lora_training_client(
        MODEL, rank=8, seed=3, train_unembed=False, user_metadata={"a": "b"}
    ).result(T)
    passed = run.forward_backward(data(sdk, 3), "cross_entropy").result(T)
    step = run.optim_step(types.AdamParams(learning_rate=0.1, weight_decay=0.01)).result(T)
    ppo = types.Datum(
        model_input=types.ModelInput.from_ints([1, 2]),
        loss_fn_inputs={
            "target_tokens": [2, 3],
            "logprobs": [-1.0, -1.0],
            "advantages": [1.0, -1.0],
        },
    )
    config = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}
    run.forward_backward([ppo], "ppo", config).result(T)
    forward = run.forward(data(sdk, 1), "cross_entropy").result(T)
    own = run.forward_backward_custom(data(sdk, 3), custom).result(T)
    run.optim_step(types.AdamParams(learning_rate=1e-4)).result(T)
    return [
        passed.metrics,
        step.metrics,
        forward.loss_fn_outputs[0]["logprobs"].tolist(),
        own.metrics,
        run.get_info().model_id,
    ]


def save(sdk: Any, service: Any) -> list[Any]:
    run = service.create_lora_training_client(MODEL).result(T)
    paths = [
        run.save_state("a").result(T).path,
        run.save_state("a", ttl_seconds=3600, overwrite=True, user_metadata={"k": "v"})
        .result(T)
        .path,
        run.save_weights_for_sampler("s", ttl_seconds=7200).result(T).path,
    ]
    run.load_state(paths[0]).result(T)
    run.load_state_with_optimizer(paths[0], weights_access_token="t").result(T)
    cold = service.create_training_client_from_state(paths[0], user_metadata={"x": "y"}).result(T)
    warm = service.create_training_client_from_state_with_optimizer(paths[0]).result(T)
    return [*paths, cold.model_id, warm.model_id]


def sample(sdk: Any, service: Any) -> list[Any]:
    types = sdk.types
    run = service.create_lora_training_client(MODEL).result(T)
    prompt = types.ModelInput.from_ints([1, 2, 3])
    samplers = [
        run.save_weights_and_get_sampling_client().result(T),
        service.create_sampling_client(base_model=MODEL).result(T),
        service.create_sampling_client(model_path="tinker://r/sampler_weights/s").result(T),
        run.create_sampling_client("tinker://r/sampler_weights/s").result(T),
    ]
    params = types.SamplingParams(max_tokens=3, seed=1, stop=["x"], temperature=0.5, top_k=3)
    seen = []
    for sampler in samplers:
        sampled = sampler.sample(prompt, 2, params, include_prompt_logprobs=True).result(T)
        seen += [sequence.tokens for sequence in sampled.sequences]
        seen += [sampler.compute_logprobs(prompt).result(T), sampler.get_base_model()]
    samplers[0].sample(prompt, 1, types.SamplingParams(), topk_prompt_logprobs=2).result(T)
    return seen


def rest(sdk: Any, service: Any) -> list[Any]:
    service.create_lora_training_client(MODEL).result(T)
    client = service.create_rest_client()
    path = "tinker://session-0:train:0/weights/a"
    client.list_checkpoints("session-0:train:0").result(T)
    client.list_user_checkpoints(limit=7, offset=3).result(T)
    client.publish_checkpoint_from_tinker_path(path).result(T)
    client.unpublish_checkpoint_from_tinker_path(path).result(T)
    client.set_checkpoint_ttl_from_tinker_path(path, 3600).result(T)
    client.set_checkpoint_ttl_from_tinker_path(path, None).result(T)
    client.delete_checkpoint_from_tinker_path(path).result(T)
    client.delete_checkpoint("session-0:train:0", "weights/b").result(T)
    info = client.get_weights_info_by_tinker_path(path).result(T)
    models = client.get_server_capabilities().result(T)
    return [info.base_model, [model.model_name for model in models.supported_models]]


def drive(sdk: Any, script: Any) -> tuple[list[Any], FakeService]:
    """Run a script. Returns its results and the service that it ran against."""
    with FakeService() as fake, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fake.config = {"fwdbwd_max_chunk_len": 2}
        service = sdk.ServiceClient(
            base_url=fake.url, api_key="tml-test", user_metadata={"m": "n"}, display_name="d"
        )
        seen = script(sdk, service)
        service.close("success").result(T)
    return seen, fake


def requests_of(fake: FakeService, *, polls: bool) -> list[tuple[Any, ...]]:
    """Return the requests in order, without background requests and versions.

    Polls are compared separately, because those of several chunks run in parallel, in no order. The
    flags count once, because the official SDK fetches them again for its REST client.
    """
    found = []
    for request in fake.requests:
        if request.path in BACKGROUND or polls is not (request.path == POLL):
            continue
        body = _without_versions(request.body)
        headers = [request.headers.get(name) for name in POLL_HEADERS] if polls else []
        timed = polls and float(request.headers.get(ROUNDTRIP, "-1")) >= 0
        seen = (request.method, request.path, request.query, body, headers, timed)
        if request.path not in FLAGS or seen not in found:
            found.append(seen)
    return sorted(found, key=repr) if polls else found


def _without_versions(body: Any) -> Any:
    if isinstance(body, dict):
        return {
            key: "version" if key == "sdk_version" and VERSIONS.match(value) else value
            for key, value in body.items()
        }
    return body


@pytest.mark.parametrize("script", [train, save, sample, rest], ids=lambda script: script.__name__)
def test_requests_equal_those_of_the_official_sdk(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TINKER_TAGS", raising=False)
    monkeypatch.delenv("TINKER_PROJECT_ID", raising=False)
    seen, fake = drive(everstep, script)
    expected, official = drive(tinker, script)
    assert _rounded(seen) == _rounded(expected)
    for polls in (False, True):
        assert requests_of(fake, polls=polls) == requests_of(official, polls=polls)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
