"""Chunks, their metrics and custom losses, compared with the official SDK's code."""

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

from everstep.client._operations.chunking import combine, split
from everstep.client._operations.custom_loss import custom_loss, forward_data
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
    """A chunk's result with numbered outputs."""
    outputs = [{"logprobs": tensor([float(first + index)])} for index in range(count)]
    return types.ForwardBackwardOutput("ArrayRecord", outputs, metrics)


def theirs(results: list[types.ForwardBackwardOutput]) -> dict[str, float]:
    """Combine the same results with the official SDK."""
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


def test_chunks_are_bounded_by_count() -> None:
    data = [datum(1) for _ in range(7)]
    assert sizes(split(data, 3, 10**9)) == [3, 3, 1]
    assert sizes(split(data, 7, 10**9)) == [7]
    assert [d for chunk in split(data, 2, 10**9) for d in chunk] == data


def test_chunks_are_bounded_by_bytes_and_datums_stay_whole() -> None:
    one = 10 * 4 + 10 * 8  # tokens as int32, targets as int64
    data = [datum(10) for _ in range(5)]
    assert sizes(split(data, 99, one)) == [1] * 5
    assert sizes(split(data, 99, 2 * one)) == [2, 2, 1]
    assert sizes(split(data, 99, 2 * one - 1)) == [1] * 5
    assert sizes(split(data, 99, 1)) == [1] * 5
    assert sizes(split([datum(1), datum(1000), datum(1)], 99, 500)) == [1, 1, 1]


def test_media_and_sparse_tensors_count_with_their_size() -> None:
    picture = types.Datum(
        model_input=types.ModelInput(chunks=[types.ImageChunk(data=b"x" * 600, format="png")])
    )
    assert sizes(split([picture] * 4, 99, 1200)) == [2, 2]
    sparse = types.TensorData.from_torch_sparse(torch.eye(64))
    assert sparse.sparse_col_indices is not None
    small = types.Datum(model_input=types.ModelInput.empty(), loss_fn_inputs={"weights": sparse})
    size = 64 * 4 + (65 + 64) * 8  # dense it would be 16384
    assert sizes(split([small] * 4, 99, 2 * size)) == [2, 2]


def test_unsupported_chunk_is_rejected_first() -> None:
    pointer = types.ImageAssetPointerChunk(location="x", format="png")
    wrong = types.Datum(model_input=types.ModelInput(chunks=[pointer]))
    with pytest.raises(ValueError, match="image_asset_pointer is not supported"):
        split([wrong], 99, 10**9)


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 5), st.integers(1, 600))
def test_chunks_equal_those_of_the_official_sdk(
    lengths: list[int], max_datums: int, max_bytes: int
) -> None:
    assume(lengths)
    config = SimpleNamespace(
        fwdbwd_max_chunk_len=max_datums, fwdbwd_max_chunk_bytes_count=max_bytes
    )
    client: Any = SimpleNamespace(holder=SimpleNamespace(_client_config=config))
    chunks = official_training.TrainingClient._chunked_requests_generator(
        client, [their_datum(length) for length in lengths]
    )
    expected = [[d.model_input.length for d in chunk.data] for chunk in chunks]
    data = [datum(length) for length in lengths]
    found = split(data, max_datums, max_bytes)
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
def test_metric_is_reduced_as_its_name_says(reduction: str, expected: float) -> None:
    key = f"m:{reduction}"
    combined = combine([output(3, {key: 1.0}), output(1, {key: 5.0}, first=3)])
    assert combined.metrics == {key: expected}
    assert [o["logprobs"].tolist() for o in combined.loss_fn_outputs] == [
        [0.0],
        [1.0],
        [2.0],
        [3.0],
    ]


def test_unique_values_get_separate_keys() -> None:
    results = [output(1, {"m:unique": v}) for v in (7.0, 8.0, 7.0)]
    assert combine(results).metrics == {"m:unique": 7.0, "m:unique_1": 8.0, "m:unique_2": 7.0}


@st.composite
def chunk_results(draw: st.DrawFn) -> list[types.ForwardBackwardOutput]:
    keys = draw(st.lists(st.sampled_from(REDUCTIONS), unique=True))
    counts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    return [output(count, {f"a:{key}": draw(values) for key in keys}) for count in counts]


@given(chunk_results())
def test_combined_metrics_equal_those_of_the_official_sdk(
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
def test_metrics_missing_in_a_chunk_are_omitted(metrics: list[dict[str, float]]) -> None:
    results = [output(1, each) for each in metrics]
    assert combine(results).metrics.keys() == theirs(results).keys()


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "min", "max", "slack"])
def test_nan_in_any_chunk_makes_the_metric_nan(reduction: str, index: int) -> None:
    key = f"m:{reduction}"
    numbers = [1.0, 2.0, 3.0]
    numbers[index] = math.nan
    results = [output(1, {key: v}) for v in numbers]
    assert math.isnan(combine(results).metrics[key])
    assert math.isnan(theirs(results)[key])


def test_hash_metric_keeps_all_bits() -> None:
    results = [output(1, {"m:hash2": v}) for v in (2.0**63, 2.0**63, 3.0, -1.0)]
    assert combine(results).metrics["m:hash2"] == theirs(results)["m:hash2"] == 2


@pytest.mark.parametrize("name", ["loss", "a:b:sum", ""])
def test_metric_without_reduction_is_an_error_even_in_one_chunk(name: str) -> None:
    with pytest.raises(ValueError, match="name:reduction"):
        combine([output(1, {name: 1.0})])
    with pytest.raises(ValueError):
        theirs([output(1, {name: 1.0})])


def test_mean_is_defined_for_chunks_without_outputs() -> None:
    assert combine([output(0, {"m:mean": 2.0}), output(0, {"m:mean": 4.0})]).metrics["m:mean"] == 3


# Custom losses


def loss_of(data: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    loss = torch.stack([(row.exp() * (i + 1)).sum() for i, row in enumerate(logprobs)]).sum()
    return loss, {"mine:sum": 2.0}


def forward_of(rows: list[list[float]]) -> types.ForwardBackwardOutput:
    outputs = [{"logprobs": tensor(np.asarray(row, dtype=np.float32))} for row in rows]
    return types.ForwardBackwardOutput("ArrayRecord", outputs, {"loss:sum": 1.0})


@given(
    st.lists(st.lists(st.floats(-8, 0, width=32), min_size=1, max_size=6), min_size=1, max_size=4)
)
def test_weights_have_the_gradient_of_the_loss(rows: list[list[float]]) -> None:
    """-Σ w · logp has the same gradient with respect to the logprobs as the loss."""
    data = [datum(len(row), advantages=[1.0] * len(row)) for row in rows]
    weighted, metrics = custom_loss(data, forward_of(rows), loss_of)
    logprobs = [torch.tensor(row, requires_grad=True) for row in rows]
    loss = loss_of(data, logprobs)[0]
    expected = torch.autograd.grad(loss, logprobs)
    products = [
        (each.loss_fn_inputs["weights"].to_torch() * row).sum()
        for each, row in zip(weighted, logprobs, strict=True)
    ]
    surrogate = -torch.stack(products).sum()
    found = torch.autograd.grad(surrogate, logprobs)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert metrics == {"mine:sum": 2.0, "loss:sum": loss.item()}
    for each, original in zip(weighted, data, strict=True):
        assert each.loss_fn_inputs.keys() == {"target_tokens", "weights"}
        assert each.model_input == original.model_input


def test_weights_equal_those_of_the_official_sdk() -> None:
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


def test_unused_datum_gets_zero_weights() -> None:
    weighted, _ = custom_loss(
        [datum(2), datum(1)],
        forward_of([[-1.0, -1.0], [-1.0]]),
        lambda d, rows: (rows[0].sum(), {}),
    )
    assert weighted[0].loss_fn_inputs["weights"].tolist() == [-1.0, -1.0]
    assert weighted[1].loss_fn_inputs["weights"].tolist() == [0.0]


def test_parameters_of_the_caller_get_gradients() -> None:
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
def test_loss_that_is_no_scalar_of_the_logprobs_is_rejected(loss: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        custom_loss([datum(2)], forward_of([[-1.0, -1.0]]), loss)


def test_logprobs_that_do_not_match_the_data_are_rejected() -> None:
    with pytest.raises(ValueError, match="1 outputs for 2 datums"):
        custom_loss([datum(1), datum(1)], forward_of([[-1.0]]), loss_of)
    empty = types.ForwardBackwardOutput("ArrayRecord", [{}], {})
    with pytest.raises(ValueError, match="no logprobs"):
        custom_loss([datum(1)], empty, loss_of)


def test_forward_pass_sends_targets_and_weights_only() -> None:
    data = [datum(2, advantages=[1.0, 2.0]), datum(3, weights=[1.0, 0.0, 1.0])]
    sent = forward_data(data)
    assert all(each.loss_fn_inputs.keys() == {"target_tokens", "weights"} for each in sent)
    assert sent[0].loss_fn_inputs["weights"].tolist() == [0.0, 0.0]
    assert sent[1].loss_fn_inputs["weights"].tolist() == [1.0, 0.0, 1.0]
    assert "advantages" in data[0].loss_fn_inputs
    with pytest.raises(ValueError, match="target_tokens"):
        forward_data([types.Datum(model_input=types.ModelInput.from_ints([1]))])
