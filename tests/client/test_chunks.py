"""Chunks, their metrics, losses of one's own; the official SDK's own code on the other side."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tinker.lib import chunked_fwdbwd_helpers as official
from tinker.lib.public_interfaces import training_client as official_training

from everstep.client._chunks import combine, split
from everstep.client._custom_loss import custom_loss, forward_data
from everstep.wire import types

values = st.floats(width=32, allow_nan=False, allow_infinity=False)
REDUCTIONS = ("mean", "sum", "min", "max", "slack", "hash2", "unique")


def datum(length: int, **inputs: Any) -> types.Datum:
    tensors = {"target_tokens": list(range(length)), **inputs}
    return types.Datum(
        model_input=types.ModelInput.from_ints(list(range(length))), loss_fn_inputs=tensors
    )


def tensor(array: Any) -> types.TensorData:
    return types.TensorData.from_numpy(np.asarray(array))


def their_datum(length: int) -> tinker.Datum:
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(list(range(length))),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData(
                data=list(range(length)), dtype="int64", shape=[length]
            )
        },
    )


def output(count: int, metrics: dict[str, float], first: int = 0) -> types.ForwardBackwardOutput:
    """A chunk's result; its outputs are numbered."""
    outputs = [{"logprobs": tensor([float(first + index)])} for index in range(count)]
    return types.ForwardBackwardOutput("ArrayRecord", outputs, metrics)


def theirs(results: list[types.ForwardBackwardOutput]) -> dict[str, float]:
    """The official SDK's combination of the same results."""
    converted = [
        tinker.ForwardBackwardOutput(
            loss_fn_output_type=result.loss_fn_output_type,
            metrics=result.metrics,
            loss_fn_outputs=[{} for _ in result.loss_fn_outputs],
        )
        for result in results
    ]
    return official.combine_fwd_bwd_output_results(converted).metrics


# Splitting


def sizes(chunks: list[list[types.Datum]]) -> list[int]:
    return [len(chunk) for chunk in chunks]


def test_chunks_end_at_the_count() -> None:
    data = [datum(1) for _ in range(7)]
    assert sizes(split(data, 3, 10**9)) == [3, 3, 1]
    assert sizes(split(data, 7, 10**9)) == [7]
    assert [d for chunk in split(data, 2, 10**9) for d in chunk] == data


def test_chunks_end_at_the_bytes_and_a_datum_is_never_cut() -> None:
    one = 10 * 4 + 10 * 8  # tokens as int32, targets as int64
    data = [datum(10) for _ in range(5)]
    assert sizes(split(data, 99, one)) == [1] * 5
    assert sizes(split(data, 99, 2 * one)) == [2, 2, 1]
    assert sizes(split(data, 99, 2 * one - 1)) == [1] * 5
    assert sizes(split(data, 99, 1)) == [1] * 5
    assert sizes(split([datum(1), datum(1000), datum(1)], 99, 500)) == [1, 1, 1]


def test_media_and_sparse_tensors_have_their_own_sizes() -> None:
    picture = types.Datum(
        model_input=types.ModelInput(chunks=[types.ImageChunk(data=b"x" * 600, format="png")])
    )
    assert sizes(split([picture] * 4, 99, 1200)) == [2, 2]
    sparse = types.TensorData.from_torch_sparse(torch.eye(64))
    assert sparse.sparse_col_indices is not None
    small = types.Datum(model_input=types.ModelInput.empty(), loss_fn_inputs={"weights": sparse})
    size = 64 * 4 + (65 + 64) * 8  # filled out it would be 16384
    assert sizes(split([small] * 4, 99, 2 * size)) == [2, 2]


def test_what_cant_be_trained_on_is_told_before_it_takes_a_place() -> None:
    pointer = types.ImageAssetPointerChunk(location="x", format="png")
    wrong = types.Datum(model_input=types.ModelInput(chunks=[pointer]))
    with pytest.raises(ValueError, match="image_asset_pointer can't be trained on"):
        split([wrong], 99, 10**9)


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 5), st.integers(1, 600))
def test_chunks_are_those_of_the_official_sdk(lengths: list[int], most: int, limit: int) -> None:
    assume(lengths)
    config = SimpleNamespace(fwdbwd_max_chunk_len=most, fwdbwd_max_chunk_bytes_count=limit)
    client: Any = SimpleNamespace(holder=SimpleNamespace(_client_config=config))
    chunks = official_training.TrainingClient._chunked_requests_generator(
        client, [their_datum(length) for length in lengths]
    )
    expected = [[d.model_input.length for d in chunk.data] for chunk in chunks]
    data = [datum(length) for length in lengths]
    found = split(data, most, limit)
    assert [[d.model_input.length for d in chunk] for chunk in found] == expected


# Combination


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("mean", (1.0 * 3 + 5.0 * 1) / 4),
        ("sum", 6.0),
        ("min", 1.0),
        ("max", 5.0),
        ("slack", 5.0 - 2.0),
        ("hash2", 6),
    ],
)
def test_a_metric_is_reduced_by_its_name(reduction: str, expected: float) -> None:
    key = f"m:{reduction}"
    combined = combine([output(3, {key: 1.0}), output(1, {key: 5.0}, first=3)])
    assert combined.metrics == {key: expected}
    assert [o["logprobs"].tolist() for o in combined.loss_fn_outputs] == [
        [0.0],
        [1.0],
        [2.0],
        [3.0],
    ]


def test_unique_values_get_keys_of_their_own() -> None:
    results = [output(1, {"m:unique": v}) for v in (7.0, 8.0, 7.0)]
    assert combine(results).metrics == {"m:unique": 7.0, "m:unique_1": 8.0, "m:unique_2": 7.0}


@st.composite
def chunk_results(draw: st.DrawFn) -> list[types.ForwardBackwardOutput]:
    keys = draw(st.lists(st.sampled_from(REDUCTIONS), unique=True))
    counts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    return [output(count, {f"a:{key}": draw(values) for key in keys}) for count in counts]


@given(chunk_results())
def test_combinations_are_those_of_the_official_sdk(
    results: list[types.ForwardBackwardOutput],
) -> None:
    found, expected = combine(results).metrics, theirs(results)
    assert found.keys() == expected.keys()
    scale = max((abs(v) for r in results for v in r.metrics.values()), default=0.0)
    for key, value in expected.items():
        if ":hash2" in key:
            assert found[key] == value, key
        else:
            assert found[key] == pytest.approx(value, rel=1e-9, abs=1e-12 * scale), key


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["a:sum", "b:max", "c:mean", "d:nobody", "e:min"]), values, max_size=5
        ),
        min_size=1,
        max_size=4,
    )
)
def test_metrics_that_only_some_chunks_have_are_left_out(metrics: list[dict[str, float]]) -> None:
    results = [output(1, each) for each in metrics]
    assert combine(results).metrics.keys() == theirs(results).keys()


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "min", "max", "slack"])
def test_nan_spoils_a_metric_wherever_it_stands(reduction: str, place: int) -> None:
    key = f"m:{reduction}"
    numbers = [1.0, 2.0, 3.0]
    numbers[place] = math.nan
    results = [output(1, {key: v}) for v in numbers]
    assert math.isnan(combine(results).metrics[key])
    assert math.isnan(theirs(results)[key])


def test_a_hash_keeps_all_its_bits() -> None:
    results = [output(1, {"m:hash2": v}) for v in (2.0**63, 2.0**63, 3.0, -1.0)]
    assert combine(results).metrics["m:hash2"] == theirs(results)["m:hash2"] == 2


@pytest.mark.parametrize("name", ["loss", "a:b:sum", ""])
def test_a_metric_without_a_reduction_is_an_error_even_of_one_chunk(name: str) -> None:
    with pytest.raises(ValueError, match="name:reduction"):
        combine([output(1, {name: 1.0})])
    with pytest.raises(ValueError):
        theirs([output(1, {name: 1.0})])


def test_chunks_without_outputs_have_a_mean() -> None:
    assert combine([output(0, {"m:mean": 2.0}), output(0, {"m:mean": 4.0})]).metrics["m:mean"] == 3


# Losses of one's own


def loss_of(data: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    loss = sum((row.exp() * (index + 1)).sum() for index, row in enumerate(logprobs))
    return loss, {"mine:sum": 2.0}


def forward_of(rows: list[list[float]]) -> types.ForwardBackwardOutput:
    outputs = [{"logprobs": tensor(np.asarray(row, dtype=np.float32))} for row in rows]
    return types.ForwardBackwardOutput("ArrayRecord", outputs, {"loss:sum": 1.0})


@given(
    st.lists(st.lists(st.floats(-8, 0, width=32), min_size=1, max_size=6), min_size=1, max_size=4)
)
def test_the_weights_have_the_gradient_of_the_loss(rows: list[list[float]]) -> None:
    """-Σ w · logp has, by the logprobs, the gradient that the loss has."""
    data = [datum(len(row), advantages=[1.0] * len(row)) for row in rows]
    weighted, metrics = custom_loss(data, forward_of(rows), loss_of)
    logprobs = [torch.tensor(row, requires_grad=True) for row in rows]
    loss = loss_of(data, logprobs)[0]
    expected = torch.autograd.grad(loss, logprobs)
    surrogate = -sum(
        (each.loss_fn_inputs["weights"].to_torch() * row).sum()
        for each, row in zip(weighted, logprobs, strict=True)
    )
    found = torch.autograd.grad(surrogate, logprobs)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert metrics == {"mine:sum": 2.0, "loss:sum": loss.item()}
    for each, original in zip(weighted, data, strict=True):
        assert each.loss_fn_inputs.keys() == {"target_tokens", "weights"}
        assert each.model_input == original.model_input


def test_the_weights_are_those_of_the_official_sdk() -> None:
    rows = [[-0.5, -1.0], [-2.0]]
    weighted, metrics = custom_loss([datum(2), datum(1)], forward_of(rows), loss_of)
    data = [their_datum(len(row)) for row in rows]
    outputs = [
        {"logprobs": tinker.TensorData(data=row, dtype="float32", shape=[len(row)])} for row in rows
    ]
    result = official_training.TrainingClient._compute_custom_loss(
        data,
        loss_of,
        tinker.ForwardBackwardOutput(
            loss_fn_output_type="ArrayRecord", metrics={}, loss_fn_outputs=outputs
        ),
    )
    assert metrics["loss:sum"] == result.loss_sum
    for ours, other in zip(weighted, result.data, strict=True):
        assert ours.loss_fn_inputs["weights"].tolist() == other.loss_fn_inputs["weights"].tolist()


def test_a_datum_that_the_loss_leaves_out_gets_zeros() -> None:
    weighted, _ = custom_loss(
        [datum(2), datum(1)],
        forward_of([[-1.0, -1.0], [-1.0]]),
        lambda d, rows: (rows[0].sum(), {}),
    )
    assert weighted[0].loss_fn_inputs["weights"].tolist() == [-1.0, -1.0]
    assert weighted[1].loss_fn_inputs["weights"].tolist() == [0.0]


def test_parameters_of_the_callers_own_get_their_gradient() -> None:
    temperature = torch.tensor(2.0, requires_grad=True)
    custom_loss([datum(1)], forward_of([[-3.0]]), lambda d, rows: (temperature * rows[0].sum(), {}))
    assert temperature.grad is not None and temperature.grad.item() == -3.0


OTHER = torch.tensor(1.0, requires_grad=True)
WRONG_LOSSES: list[tuple[Any, str]] = [
    (lambda d, rows: (1.0, {}), "scalar tensor"),
    (lambda d, rows: (torch.tensor(1.0), {}), "scalar tensor"),
    (lambda d, rows: (rows[0], {}), "scalar tensor"),
    (lambda d, rows: (rows[0].detach().sum(), {}), "scalar tensor"),
    (lambda d, rows: (OTHER * 2, {}), "doesn't depend on any"),
]


@pytest.mark.parametrize(("loss", "text"), WRONG_LOSSES, ids=lambda v: None)
def test_a_loss_that_is_none_is_told(loss: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        custom_loss([datum(2)], forward_of([[-1.0, -1.0]]), loss)


def test_logprobs_that_are_not_of_the_data_are_told() -> None:
    with pytest.raises(ValueError, match="1 outputs for 2 datums"):
        custom_loss([datum(1), datum(1)], forward_of([[-1.0]]), loss_of)
    empty = types.ForwardBackwardOutput("ArrayRecord", [{}], {})
    with pytest.raises(ValueError, match="no logprobs"):
        custom_loss([datum(1)], empty, loss_of)


def test_the_forward_pass_gets_targets_and_weights_only() -> None:
    data = [datum(2, advantages=[1.0, 2.0]), datum(3, weights=[1.0, 0.0, 1.0])]
    sent = forward_data(data)
    assert all(each.loss_fn_inputs.keys() == {"target_tokens", "weights"} for each in sent)
    assert sent[0].loss_fn_inputs["weights"].tolist() == [0.0, 0.0]
    assert sent[1].loss_fn_inputs["weights"].tolist() == [1.0, 0.0, 1.0]
    assert "advantages" in data[0].loss_fn_inputs
    with pytest.raises(ValueError, match="target_tokens"):
        forward_data([types.Datum(model_input=types.ModelInput.from_ints([1]))])
