"""Two models in one service, with the unmodified official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import tinker
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.models.gptj import GPTJConfig
from transformers.models.llama import LlamaConfig
from transformers.models.qwen3 import Qwen3Config
from typer.testing import CliRunner

from everstep.cli.app import app
from everstep.engine.models.pico import write_pico
from tests.conftest import Service
from tests.scenario import connect, train

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SIZE: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 257,
    "bos_token_id": 256,
    "pad_token_id": 258,
}
UNSERVABLE = "tiny-gptj"
MODELS: dict[str, PretrainedConfig] = {
    "tiny-qwen": Qwen3Config(**SIZE, head_dim=8),
    "tiny-llama": LlamaConfig(**SIZE),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("models")
    write_pico(root / "pico")
    tokenizer = AutoTokenizer.from_pretrained(root / "pico")
    for seed, (name, config) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    unservable = GPTJConfig(vocab_size=259, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
    AutoModelForCausalLM.from_config(unservable).save_pretrained(root / UNSERVABLE)
    sources = [f"{name}={root / name}" for name in (UNSERVABLE, *MODELS)]
    served = Service(root / "home", *sources, "absent=/nowhere")
    yield served
    served.stop()


@pytest.fixture(scope="module")
def client(served: Service) -> Any:
    return connect(tinker, served.url)


@pytest.fixture(scope="module")
def runs(client: Any) -> dict[str, Any]:
    return {
        name: client.create_lora_training_client(name, rank=4, seed=1).result() for name in MODELS
    }


def test_both_models_are_offered(client: Any) -> None:
    offered = client.get_server_capabilities().supported_models
    assert {(m.model_name, m.max_context_length) for m in offered} == {(n, 256) for n in MODELS}


def test_both_models_train_side_by_side_and_resume_with_their_optimizer(
    client: Any, runs: dict[str, Any]
) -> None:
    before: dict[str, list[Any]] = {name: [] for name in MODELS}
    for step in range(2):  # alternately
        for name, run in runs.items():
            before[name] += train(tinker, run, 1, shift=step)
    assert before["tiny-qwen"] != before["tiny-llama"]
    for name, run in runs.items():
        assert run.get_info().model_data.model_name == name
        assert train(tinker, run, 1)[0][0] < before[name][0][0], "it learns"
        path = run.save_state("half").result().path
        warm = train(tinker, run, 2)
        resumed = client.create_training_client_from_state_with_optimizer(path).result()
        assert resumed.get_info().model_data.model_name == name
        assert train(tinker, resumed, 2) == warm
        cold = client.create_training_client_from_state(path).result()
        assert train(tinker, cold, 2) != warm


def test_both_models_sample_with_their_own_adapters(client: Any, runs: dict[str, Any]) -> None:
    prompt = tinker.types.ModelInput.from_ints([7, 14, 21])
    params = tinker.types.SamplingParams(max_tokens=8, seed=3)
    seen = {}
    for name, run in runs.items():
        sampler = run.save_weights_and_get_sampling_client().result()
        tuned = sampler.compute_logprobs(prompt).result()
        base = client.create_sampling_client(base_model=name).result()
        assert base.compute_logprobs(prompt).result() != tuned
        sampled = sampler.sample(prompt, 2, params).result().sequences
        assert [len(each.tokens) for each in sampled] <= [8, 8]
        seen[name] = (tuned, [each.tokens for each in sampled])
        path = run.save_weights_for_sampler("s").result().path
        named = client.create_sampling_client(model_path=path).result()
        assert named.get_base_model() == name
        assert named.compute_logprobs(prompt).result() == tuned
    assert seen["tiny-qwen"][0] != seen["tiny-llama"][0]


def test_checkpoint_is_not_loaded_into_a_run_of_another_model(
    client: Any, runs: dict[str, Any]
) -> None:
    path = runs["tiny-qwen"].save_state("qwen").result().path
    text = "base_model is tiny-qwen but target model base_model is tiny-llama"
    with pytest.raises(tinker.RequestFailedError, match=text):
        runs["tiny-llama"].load_state(path).result()
    train(tinker, runs["tiny-llama"], 1)


def test_unknown_model_is_refused_with_the_served_ones(client: Any) -> None:
    text = "'tiny-gpt' is not served here. Served: tiny-llama, tiny-qwen"
    with pytest.raises(tinker.RequestFailedError, match=text) as caught:
        client.create_lora_training_client("tiny-gpt").result()
    assert caught.value.category == tinker.types.RequestErrorCategory.User
    with pytest.raises(tinker.BadRequestError, match=text):
        client.create_sampling_client(base_model="tiny-gpt").result()


def test_model_that_can_not_be_served_stops_no_other_and_says_why(
    client: Any, served: Service
) -> None:
    reasons = {UNSERVABLE: "attention of its own", "absent": "/nowhere"}
    for name, why in reasons.items():
        text = f"Model '{name}' is not served here: it can't be loaded from .*{why}"
        with pytest.raises(tinker.RequestFailedError, match=text):
            client.create_lora_training_client(name).result()
        with pytest.raises(tinker.BadRequestError, match=text):
            client.create_sampling_client(base_model=name).result()
        assert name in served.log.read_text()
    refused = httpx.get(f"{served.url}/api/v1/everstep/info").json()["refused_models"]
    assert set(refused) == {UNSERVABLE, "absent"}
    assert not any("\n" in reason for reason in refused.values())
    result = CliRunner().invoke(app, ["doctor", "--base-url", served.url, "--json"])
    findings = [each["found"] for each in json.loads(result.stdout)["checks"]]
    assert any(each.startswith(f"{UNSERVABLE} can't be loaded") for each in findings), findings
