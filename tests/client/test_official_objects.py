"""Objects of the official SDK's classes through our client: the same requests as its own client."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import tinker
import torch

import everstep
from everstep.wire import types
from everstep.wire.base import convert
from everstep.wire.messages.optimizers import to_optim_params, to_optimizer_config
from everstep.wire.messages.tensors import to_tensor
from tests.client.fake_service import GIVE_UP_SECONDS, MODEL
from tests.client.test_same_requests import drive, requests_of, sample, train

pytestmark = pytest.mark.filterwarnings("ignore")
T = GIVE_UP_SECONDS
MIXED = SimpleNamespace(types=tinker.types, ServiceClient=everstep.ServiceClient)
"""Our client with the official SDK's types."""


def further(sdk: Any, service: Any) -> list[Any]:
    """Use the objects that the scripts for both SDKs leave out."""
    kinds = sdk.types
    run = service.create_lora_training_client(MODEL, optimizer=kinds.AdamOptimizerConfig()).result(
        T
    )
    spans = kinds.Datum(
        model_input=kinds.ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={"target_tokens": np.array([1, 2, 3]), "weights": np.ones(3)},
    ).with_provenance(
        [
            kinds.PromptProvenanceSpan(sequence_id="a", length=1),
            kinds.SampledProvenanceSpan(sequence_id="a", length=2),
        ],
        [kinds.SampledProvenanceSpan(sequence_id="a", length=3)],
    )
    picture = kinds.Datum(
        model_input=kinds.ModelInput(
            chunks=[
                kinds.EncodedTextChunk(tokens=[1, 2]),
                kinds.ImageChunk(data=b"image", format="png", expected_tokens=3),
            ]
        ),
        loss_fn_inputs={"target_tokens": [1, 2, 3, 4, 5]},
    )
    run.forward_backward([spans, picture], "cross_entropy").result(T)
    run.optim_step(kinds.DimuonParams(learning_rate=0.5)).result(T)
    run.optim_step(adam_params=kinds.AdamParams(learning_rate=0.5, eps=1e-6)).result(T)
    sampler = service.create_sampling_client(base_model=MODEL).result(T)
    scored = kinds.TensorData(data=[1, 2, 3, 4], dtype="int64", shape=[2, 2])
    sampler.sample(
        prompt=kinds.ModelInput.from_ints([1, 2, 3]),
        num_samples=1,
        sampling_params=kinds.SamplingParams(stop=[3, 4], top_p=0.5),
        include_prompt_logprobs=True,
        target_prompt_logprobs=scored,
    ).result(T)
    return []


@pytest.mark.parametrize("script", [train, sample, further], ids=lambda each: each.__name__)
def test_official_objects_give_the_requests_of_the_official_client(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TINKER_TAGS", raising=False)
    monkeypatch.delenv("TINKER_PROJECT_ID", raising=False)
    _, mixed = drive(MIXED, script)
    _, official = drive(tinker, script)
    for polls in (False, True):
        found = requests_of(mixed, polls=polls)
        assert found and found == requests_of(official, polls=polls)


def test_sparse_tensors_keep_their_form() -> None:
    targets = torch.zeros(9, 8, dtype=torch.int64)
    targets[range(9), 3] = 7
    given = tinker.TensorData.from_torch_sparse(targets)
    assert given.sparse_col_indices is not None
    read = to_tensor(given)
    assert read.sparse_col_indices == given.sparse_col_indices == [3] * 9
    assert read.to_torch().equal(targets)


def test_custom_loss_gets_the_callers_own_data(run: Any) -> None:
    tensor = tinker.TensorData(data=[2, 3], dtype="int64", shape=[2])
    tokens = tinker.ModelInput.from_ints([1, 2])
    given = [tinker.Datum(model_input=tokens, loss_fn_inputs={"target_tokens": tensor})]
    seen: list[Any] = []

    def loss(rows: Any, logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        seen.append(rows)
        return logprobs[0].sum(), {}

    run.forward_backward_custom(given, loss).result(T)
    assert seen == [given] and seen[0] is given


class Named(NamedTuple):
    max_tokens: int
    seed: int | None = None


@dataclass
class Data:
    max_tokens: int
    stop: list[str] | None = None
    later: int | None = None


@pytest.mark.parametrize(
    "value", [Named(3), Data(3), SimpleNamespace(max_tokens=3), {"max_tokens": 3}], ids=repr
)
def test_object_of_any_class_is_read_by_its_fields(value: Any) -> None:
    assert convert(types.SamplingParams, value, "p") == types.SamplingParams(max_tokens=3)


@pytest.mark.parametrize("value", [None, 3, "text", [1], object(), len, torch.ones(2), Named])
def test_object_without_any_field_is_refused(value: Any) -> None:
    for model in (types.SamplingParams, types.ModelInput, types.Datum):
        with pytest.raises(TypeError, match=f"p has to be a {model.__name__}; got "):
            convert(model, value, "p")
    with pytest.raises(TypeError, match="optim_step takes AdamParams; got "):
        to_optim_params(value)
    with pytest.raises((TypeError, ValueError)):
        to_tensor(object())


def test_unknown_field_with_a_value_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="later: there is no such field"):
        convert(types.SamplingParams, Data(3, later=1), "sampling_params")
    with pytest.raises(ValueError, match="sparsity"):
        to_tensor(SimpleNamespace(data=[1], dtype="int64", shape=[1], sparsity=2))
    with pytest.raises(ValueError, match="warmup: there is no such field"):
        to_optim_params(SimpleNamespace(learning_rate=1.0, warmup=3))
    with pytest.raises(ValueError, match=r"loss_fn_inputs|weights"):
        convert(types.Datum, {"model_input": {"chunks": []}, "weights": [1]}, "data[0]")


def test_optimizers_are_read_by_their_type() -> None:
    assert to_optimizer_config(None) == types.AdamOptimizerConfig()
    chosen = to_optimizer_config(tinker.DimuonOptimizerConfig())
    assert chosen == types.DimuonOptimizerConfig()
    step = to_optim_params(tinker.DimuonParams(learning_rate=0.5, beta1=0.1))
    assert step == types.DimuonParams(learning_rate=0.5, beta1=0.1)
    kept = to_optim_params(SimpleNamespace(type="mine", depth=3))
    assert kept.model_dump() == {"type": "mine", "depth": 3}


def test_arrays_and_tensors_are_read_as_tokens() -> None:
    expected = types.ModelInput.from_ints([1, 2])
    given: list[Any] = [np.array([1, 2]), torch.tensor([1, 2]), (1, 2), [np.int64(1), 2]]
    for tokens in given:
        assert types.ModelInput.from_ints(tokens) == expected
    assert types.EncodedTextChunk(tokens=np.array([1, 2])).tokens == [1, 2]


def test_error_names_the_example_and_its_class(run: Any) -> None:
    bad = SimpleNamespace(model_input=SimpleNamespace(chunks=[SimpleNamespace(tokens=["x"])]))
    with pytest.raises(ValueError, match=r"data\[1\] \(types.SimpleNamespace\).*tokens"):
        run.forward_backward([types.Datum(model_input=types.ModelInput.empty()), bad], "dro")
