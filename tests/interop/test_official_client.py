"""The newest official client, unmodified: every call, on a real service."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import tinker

from tests.conftest import Service
from tests.scenario import MODEL, connect, data, train

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def client(service: Service) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield connect(tinker, service.url)


@pytest.fixture
def run(client: Any) -> Any:
    return client.create_lora_training_client(MODEL, rank=8, seed=3).result()


def test_run_resumes_exactly_in_every_way(client: Any, run: Any) -> None:
    train(tinker, run, 2)
    path = run.save_state("s").result().path
    assert path == f"tinker://{run.model_id}/weights/s"
    warm = train(tinker, run, 2)
    resumed = client.create_training_client_from_state_with_optimizer(path).result()
    assert train(tinker, resumed, 2) == warm
    cold = train(tinker, client.create_training_client_from_state(path).result(), 2)
    assert cold != warm
    run.load_state_with_optimizer(path).result()
    assert train(tinker, run, 2) == warm
    run.load_state(path).result()
    assert train(tinker, run, 2) == cold


def test_every_loss_runs(run: Any) -> None:
    tokens = list(range(10, 26))
    inputs: Any = {
        "target_tokens": tokens[1:],
        "logprobs": [-2.0] * 15,
        "advantages": [1.0] * 15,
    }
    for loss in ("importance_sampling", "ppo", "cispo", "dro"):
        datum = tinker.Datum(
            model_input=tinker.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs=inputs,
        )
        output = run.forward_backward([datum], loss).result()
        assert len(output.loss_fn_outputs[0]["logprobs"].tolist()) == 15
        assert "loss:sum" in output.metrics


def test_pass_in_chunks_matches_a_whole_pass(client: Any) -> None:
    whole = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
    expected = whole.forward(data(tinker, 9), "cross_entropy").result()
    parts = [whole.forward([d], "cross_entropy").result() for d in data(tinker, 9)]
    for index, part in enumerate(parts):
        ours = part.loss_fn_outputs[0]["logprobs"].to_numpy()
        theirs = expected.loss_fn_outputs[index]["logprobs"].to_numpy()
        assert abs(ours - theirs).max() < 1e-4


def test_custom_loss_is_computed(run: Any) -> None:
    def loss(_data: Any, logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        return -sum(each.sum() for each in logprobs), {"seen": float(len(logprobs))}

    output = run.forward_backward_custom(data(tinker), loss).result()
    assert output.metrics["seen"] == 3.0
    run.optim_step(tinker.AdamParams(learning_rate=0.01)).result()


def test_samples_repeat_and_samplers_agree(client: Any, run: Any) -> None:
    train(tinker, run, 2)
    sampler = run.save_weights_and_get_sampling_client().result()
    prompt = tinker.ModelInput.from_ints([7, 14, 21, 28])
    params = tinker.SamplingParams(max_tokens=12, seed=4, temperature=0.8, top_k=20, top_p=0.9)
    first = sampler.sample(prompt, 3, params, include_prompt_logprobs=True).result()
    again = sampler.sample(prompt, 3, params, include_prompt_logprobs=True).result()
    assert [s.tokens for s in first.sequences] == [s.tokens for s in again.sequences]
    assert [s.logprobs for s in first.sequences] == [s.logprobs for s in again.sequences]
    assert first.prompt_logprobs[0] is None and len(first.prompt_logprobs) == 4
    assert sampler.compute_logprobs(prompt).result() == first.prompt_logprobs
    named = run.save_weights_for_sampler("n").result().path
    other = client.create_sampling_client(model_path=named).result()
    assert [s.tokens for s in other.sample(prompt, 3, params).result().sequences] == [
        s.tokens for s in first.sequences
    ]
    base = client.create_sampling_client(base_model=MODEL).result()
    assert len(base.sample(prompt, 1, params).result().sequences[0].tokens) <= 12


def test_sampled_logprobs_match_the_trainer(run: Any) -> None:
    train(tinker, run, 3)
    sampler = run.save_weights_and_get_sampling_client().result()
    prompt = [7, 14, 21, 28, 35]
    drawn = (
        sampler.sample(
            tinker.ModelInput.from_ints(prompt), 1, tinker.SamplingParams(max_tokens=20, seed=1)
        )
        .result()
        .sequences[0]
    )
    tokens = prompt + drawn.tokens
    inputs: Any = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs
    )
    logprobs = run.forward([datum], "cross_entropy").result().loss_fn_outputs[0]["logprobs"]
    trained = logprobs.tolist()[len(prompt) - 1 :]
    assert trained == pytest.approx(drawn.logprobs, abs=2e-5)


def test_rest_client_lists_and_deletes_checkpoints(client: Any, run: Any) -> None:
    path = run.save_state("rest", user_metadata={"epoch": "1"}).result().path
    rest = client.create_rest_client()
    info = rest.get_weights_info_by_tinker_path(path).result()
    assert (info.base_model, info.lora_rank, info.train_mlp) == (MODEL, 8, True)
    listed = rest.list_checkpoints(run.model_id).result().checkpoints
    assert [c.tinker_path for c in listed] == [path]
    assert listed[0].user_metadata == {"epoch": "1"}
    assert path in [c.tinker_path for c in rest.list_user_checkpoints().result().checkpoints]
    assert rest.get_training_run(run.model_id).result().last_checkpoint.tinker_path == path
    assert rest.list_training_runs(limit=1).result().cursor.total_count >= 1
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert rest.list_checkpoints(run.model_id).result().checkpoints == []
    with pytest.raises(tinker.RequestFailedError, match="does not exist"):
        run.load_state(path).result()
    train(tinker, run, 1)


def test_taken_name_is_refused_and_overwrite_replaces(run: Any) -> None:
    path = run.save_state("name").result().path
    with pytest.raises(tinker.RequestFailedError, match="already exists for model"):
        run.save_state("name").result()
    assert run.save_state("name", overwrite=True).result().path == path
    assert run.save_weights_for_sampler("name").result().path.endswith("/sampler_weights/name")


def test_sampler_checkpoint_has_no_optimizer(client: Any, run: Any) -> None:
    run.save_state("both").result()
    path = run.save_weights_for_sampler("both").result().path
    with pytest.raises(tinker.RequestFailedError, match="weights/both, which has it"):
        client.create_training_client_from_state_with_optimizer(path).result()
    client.create_training_client_from_state(path).result()
