"""Device choice: what an accelerator draws is what the host draws, with any rows beside it.

The device's computation runs on CPU tensors here, and on a GPU in `test_device_exactness`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from everstep.engine import Model, SampleSpec
from everstep.engine.errors import InputError
from everstep.engine.sampling import batch, device_choice, token_choice
from everstep.engine.sampling.device_choice import Chosen, Rows
from everstep.engine.sampling.token_choice import stream
from tests.engine.helpers import prompt, random_adapter, sample_all

Array = np.ndarray[Any, Any]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0.7},
    {"temperature": 1e-30},
    {"temperature": 30.0},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 10**6},
    {"top_p": 0.8},
    {"top_p": 1e-9},
    {"top_p": 0.999999},
    {"top_k": 60, "top_p": 0.9, "temperature": 1.3},
]
ROUNDING = 1e-13
"""Distance of a number from a sum of up to 151,936 probabilities below which rounding decides."""


def logits_of(kind: str, rows: int, vocabulary: int) -> Array:
    """Return rows of logits with distinct or equal ones, or with tokens that are ruled out."""
    random = np.random.default_rng(vocabulary)
    logits = random.normal(0, 3, (rows, vocabulary)).astype(np.float32)
    if kind == "equal":
        logits = logits.round(0)  # with 0 and -0
    if kind == "ruled out":
        logits[random.random(logits.shape) < 0.9] = -np.inf
        logits[0, : vocabulary - 1] = -np.inf
        logits[:, -1] = 1.0
    return logits


def drawn(logits: Array, specs: list[SampleSpec], numbers: int = 0) -> list[Chosen]:
    """Draw a row for each spec. Row i draws from the stream i."""
    requests = [
        Rows(slice(row, row + 1), spec, [stream(numbers, row)]) for row, spec in enumerate(specs)
    ]
    return device_choice.draw(torch.from_numpy(logits), requests)


def distance(logits: Array, spec: SampleSpec, number: float) -> float:
    """Return how near rounding is to deciding a draw, by the definition."""
    scaled = (logits.astype(np.float64) - float(logits.max())) / spec.temperature
    restricted = 0 < spec.top_k < len(scaled) or spec.top_p < 1
    if restricted:
        scaled = np.sort(scaled)[::-1][: spec.top_k if spec.top_k > 0 else None]
    weights = np.exp(scaled)
    cumulated = np.cumsum(weights / weights.sum())
    near = 1.0
    if spec.top_p < 1:
        near = float(np.abs(cumulated - spec.top_p).min())
        cumulated = cumulated[: int(np.searchsorted(cumulated, spec.top_p)) + 1]
    return min(near, float(np.abs(cumulated - number * cumulated[-1]).min()))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["distinct", "equal", "ruled out"])
@pytest.mark.parametrize(("vocabulary", "rows"), [(97, 400), (4_097, 60), (151_936, 4)])
def test_device_draws_what_the_host_draws(
    vocabulary: int, rows: int, kind: str, settings: dict[str, Any]
) -> None:
    logits = logits_of(kind, rows, vocabulary)
    spec = SampleSpec(prompt(), topk_sample_logprobs=5, **settings)
    streams = [stream(3, row) for row in range(rows)]
    host = token_choice.draw(logits, spec, [stream(3, row) for row in range(rows)])
    request = Rows(slice(0, rows), spec, streams)
    (found,) = device_choice.draw(torch.from_numpy(logits), [request])
    assert found.largest.tolist() == logits.max(-1, keepdims=True).tolist()
    assert len(found.draws.tokens) == len(found.draws.logprobs) == len(found.draws.top) == rows
    other = [r for r in range(rows) if found.draws.tokens[r] != host.tokens[r]]
    for row in other:
        assert distance(logits[row], spec, stream(3, row).random()) < ROUNDING
    assert len(other) <= rows // 100
    same = [row for row in range(rows) if row not in other]
    ours, theirs = (np.array(each.logprobs)[same] for each in (found.draws, host))
    assert np.isfinite(ours).all()
    assert ours == pytest.approx(theirs, abs=1e-9)
    for (ids, top), (host_ids, host_top) in zip(found.draws.top, host.top, strict=True):
        assert (ids.dtype, top.dtype) == (host_ids.dtype, host_top.dtype)
        assert ids.tolist() == host_ids.tolist()
        assert top == pytest.approx(host_top, abs=1e-6)
    expected = [stream(3, row) for row in range(rows)]
    if spec.temperature:
        assert np.array([each.random() for each in expected]).any()  # one number of each is used
    assert [each.random() for each in streams] == [each.random() for each in expected]


def test_thousands_of_draws_from_one_row_are_the_hosts() -> None:
    logits = logits_of("distinct", 1, 5_003)
    every: list[dict[str, Any]] = [{}, {"top_p": 0.95}, {"top_k": 100, "temperature": 0.8}]
    for settings in every:
        spec = SampleSpec(prompt(), 3000, **settings)
        host, device = ([stream(5, index) for index in range(3000)] for _ in range(2))
        (found,) = device_choice.draw(torch.from_numpy(logits), [Rows(slice(0, 1), spec, device)])
        expected = token_choice.draw(logits, spec, host)
        assert len(set(found.draws.tokens)) > 50
        assert found.draws.tokens == expected.tokens
        assert found.draws.logprobs == pytest.approx(expected.logprobs, abs=1e-12)


def bits(chosen: Chosen) -> tuple[Any, ...]:
    top = [(ids.tobytes(), values.tobytes()) for ids, values in chosen.draws.top]
    return chosen.draws.tokens, np.array(chosen.draws.logprobs).tobytes(), top


@pytest.mark.parametrize("cells", [1, 3 * 1003, 1 << 23], ids=["one row", "a few rows", "all"])
def test_rows_beside_a_row_change_no_bit(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of("equal", 4 * len(SETTINGS), 1003)
    specs = [
        SampleSpec(prompt(), topk_sample_logprobs=k, **settings)
        for settings in SETTINGS
        for k in (0, 3, 0, 7)
    ]
    alone = []
    for row, spec in enumerate(specs):
        request = Rows(slice(row, row + 1), spec, [stream(0, row)])
        alone += device_choice.draw(torch.from_numpy(logits), [request])
    monkeypatch.setattr(device_choice, "_CELLS", cells)
    together = drawn(logits, specs)
    assert len(together) == len(specs)
    assert [bits(each) for each in together] == [bits(each) for each in alone]


def test_rows_of_unequal_top_k_do_not_change_one_another() -> None:
    logits = logits_of("distinct", 6, 501)
    specs = [SampleSpec(prompt(), top_k=k, top_p=0.99) for k in (1, 500, 7, 64, 3, 33)]
    found = drawn(logits, specs)
    for row, spec in enumerate(specs):
        request = Rows(slice(0, 1), spec, [stream(0, row)])
        (alone,) = device_choice.draw(torch.from_numpy(logits[row : row + 1]), [request])
        assert bits(found[row]) == bits(alone)


def test_sums_add_in_one_order_whatever_follows() -> None:
    weights = torch.rand(3, 1003, dtype=torch.float64)
    few = device_choice._sums(weights.clone())
    padded = torch.nn.functional.pad(weights, (0, 5000))
    assert torch.equal(device_choice._sums(padded)[-1], few[-1])
    assert torch.equal(device_choice._sums(weights[1:2])[-1], few[-1][1:2])


def test_number_behind_all_weights_takes_the_last_that_is_not_zero() -> None:
    weights = torch.tensor([[0.0, 0.5, 0.0, 0.25, 0.0, 0.0, 0.0]], dtype=torch.float64)
    targets = torch.tensor([[0.0, 0.5, 0.75, 9.0]], dtype=torch.float64)
    places, before = device_choice._search(device_choice._sums(weights), targets)
    assert places.tolist() == [[1, 3, 3, 3]]
    assert before.tolist() == [[0.0, 0.5, 0.5, 0.5]]
    targets[0, 0] = 1e-300
    places, _ = device_choice._search(device_choice._sums(weights), targets, reached=True)
    assert places.tolist() == [[1, 1, 3, 3]]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("settings", SETTINGS[:9], ids=str)
def test_rows_that_are_not_finite_are_known_by_their_largest(
    settings: dict[str, Any], value: float
) -> None:
    logits = logits_of("distinct", 3, 300)
    logits[1, 7] = value
    found = drawn(logits, [SampleSpec(prompt(), **settings)] * 3)
    assert [bool(np.isfinite(each.largest).all()) for each in found] == [True, False, True]


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the names of the operations that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


EXACT_IN_ANY_ORDER = {"amax", "argmax", "sort", "topk"}  # the last two of distinct integers
PER_ELEMENT = {
    *("add", "sub", "rsub", "mul", "div", "exp", "log", "minimum", "where", "masked_fill"),
    *("lt", "le", "gt", "ge", "bitwise_and", "bitwise_or", "bitwise_xor"),
    *("__lshift__", "__rshift__"),
}
MOVES = {
    *("_to_copy", "alias", "arange", "cat", "constant_pad_nd", "detach", "expand", "gather"),
    *("index_select", "lift_fresh", "new_empty", "scalar_tensor", "slice", "view", "zeros_like"),
}


@pytest.mark.parametrize("k", [0, 3])
def test_nothing_on_the_device_adds_in_an_order_of_its_own(
    k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_choice, "to_host", lambda tensor: np.zeros(tensor.shape))
    specs = [SampleSpec(prompt(), topk_sample_logprobs=k, **settings) for settings in SETTINGS]
    requests = [Rows(slice(row, row + 1), spec, [stream(0, 0)]) for row, spec in enumerate(specs)]
    # Reading a number from torch's meta device would raise, so nothing waits for it.
    logits = torch.empty(len(specs), 1003, device="meta")
    with Operations() as operations:
        device_choice.draw(logits, requests)
    assert {"exp", "topk", "sort", "gather"} <= operations.names
    assert operations.names <= EXACT_IN_ANY_ORDER | PER_ELEMENT | MOVES


# Requests of a batch whose device is taken for an accelerator


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Choose on the device. Returns the numbers of each copy to the host."""
    seen: list[int] = []

    def to_host(tensor: torch.Tensor) -> Array:
        seen.append(tensor.numel())
        return np.array(tensor.numpy())

    def no_logits(tensor: torch.Tensor) -> Array:
        raise AssertionError("logits are copied to the host")

    monkeypatch.setattr(device_choice, "is_accelerator", lambda device: True)
    monkeypatch.setattr(device_choice, "to_host", to_host)
    monkeypatch.setattr(batch, "to_host", no_logits)
    return seen


REQUESTS = [
    SampleSpec(prompt(5, 6, 7), 3, max_tokens=9, seed=1, topk_sample_logprobs=2),
    SampleSpec(prompt(9), max_tokens=7, temperature=0, use_eos=False),
    SampleSpec(prompt(*range(30)), 2, max_tokens=12, seed=4, top_p=0.9, stop_tokens=(1, 2, 3)),
    SampleSpec(prompt(1, 2), 4, max_tokens=12, seed=6, top_k=9, temperature=1.4),
    SampleSpec(prompt(1, 2, 3), max_tokens=0, prompt_logprobs=True),
]


def test_requests_have_the_hosts_tokens_and_stop_as_there(
    llama: Model, request: pytest.FixtureRequest
) -> None:
    used = random_adapter(llama, 4)
    jobs = [(spec, used if index % 2 else None) for index, spec in enumerate(REQUESTS)]
    host = sample_all(llama, jobs)
    seen = request.getfixturevalue("accelerator")
    device = sample_all(llama, jobs)
    assert seen
    for ours, theirs in zip(device, host, strict=True):
        for one, other in zip(ours.sequences, theirs.sequences, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            assert one.stop_reason == other.stop_reason
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-6)
            assert (one.topk is None) == (other.topk is None)
            if one.topk is not None and other.topk is not None:
                assert one.topk.token_ids.tolist() == other.topk.token_ids.tolist()


def test_a_token_brings_a_few_bytes_a_row_to_the_host(llama: Model, accelerator: list[int]) -> None:
    spec = SampleSpec(prompt(5, 6, 7), 3, max_tokens=6, seed=1, use_eos=False)
    sample_all(llama, [(spec, None), (replace(spec, topk_sample_logprobs=4), None)])
    # A row's largest logit, its tokens and their logprobs, and the likeliest tokens and theirs.
    first_prompt, second_prompt = 1 + 2 * 3, 1 + 2 * 3 + 2 * 4
    first, second = 3 * (1 + 2), 3 * (1 + 2 + 2 * 4)
    together = [first + second] * 4
    assert accelerator == [first_prompt, first, second_prompt, *together, second]


def test_diverged_logits_on_a_device_fail_their_own_request(
    llama: Model, accelerator: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = batch._fetch

    def broken(logits: torch.Tensor, requests: Any) -> Any:
        for each, rows in requests:
            if each.spec.seed == 13:
                logits[rows] = torch.nan
        return fetch(logits, requests)

    monkeypatch.setattr(batch, "_fetch", broken)
    good = SampleSpec(prompt(), 2, max_tokens=6, seed=1)
    bad = replace(good, seed=13)
    sampling = batch.SamplingBatch(llama)
    sampling.add("good", good, None)
    sampling.add("bad", bad, None)
    ended: dict[str, Any] = {}
    while sampling.busy:
        ended.update(sampling.step())
    assert isinstance(ended["bad"], InputError)
    assert len(ended["good"].sequences) == 2
