"""Transfers: no pass waits for its device once a micro-batch.

The device is torch's ``meta``, which computes shapes alone. Whatever would read a number from it
raises, as `item`, `nonzero`, `cpu` and `bool` do, so a pass that ends has waited for nothing but
for what the tests stand in for. Nothing here was run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from everstep.engine import (
    AdamParams,
    AdapterConfig,
    Model,
    SampleSpec,
    SamplingBatch,
    forward_backward,
    load_model,
    numerics,
    optimizer,
    training_pass,
    transfer,
)
from everstep.engine.kernels import head
from everstep.engine.losses.specs import LOSSES
from everstep.engine.models.decoder import ModuleDecoder
from everstep.engine.models.frozen_product import product_of
from everstep.engine.models.lora import LoraProjection
from everstep.engine.run_state import Adapter
from everstep.engine.sampling import device_choice
from everstep.engine.transfer import MAX_QUEUED, PIECE, QueueBound, download, fill, upload
from everstep.wire.codecs.proto import SampleOutput
from everstep.wire.messages.passes import Example
from tests.engine.helpers import backward, buffers, examples, finish, trained

META = torch.device("meta")
Array = np.ndarray[Any, Any]


def on_meta(directory: Path) -> Model:
    """Load a model, and move it to a device that nothing can be read from."""
    model = load_model("m", str(directory), device="cpu")
    model.module.to("meta")
    model.device = META
    return model


@pytest.fixture(scope="module")
def distant(directories: dict[str, Path]) -> Model:
    return on_meta(directories["llama"])


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of what was copied to the host: zeros in its place."""
    seen: list[torch.Size] = []

    def to_host(tensor: torch.Tensor) -> Array:
        seen.append(tensor.shape)
        return torch.zeros(tensor.shape, dtype=tensor.dtype).numpy()

    monkeypatch.setattr(transfer, "to_host", to_host)
    monkeypatch.setattr(training_pass, "is_finite", lambda gradients: True)  # once a pass
    return seen


def inputs_of(loss_fn: str, length: int) -> dict[str, Array]:
    """All inputs of a loss, the first half of them 0."""
    spec = LOSSES[loss_fn]
    numbers = np.where(np.arange(length) < length // 2, 0, 0.5).astype(np.float32)
    found: dict[str, Array] = {each.name: numbers for each in (*spec.inputs, *spec.optional)}
    found["target_tokens"] = np.arange(length)
    if spec.recorded:
        found["sampling_logprobs"] = -numbers
        found["sampled_sequences"] = np.where(numbers > 0, 0, -1)
    return found


def run(model: Model, loss_fn: str, count: int, *, backward: bool = True) -> Any:
    state = model.new_run(AdapterConfig(rank=4, seed=1))
    lengths = [9 + index % 5 for index in range(count)]
    data = [Example(np.arange(length), inputs_of(loss_fn, length)) for length in lengths]
    return finish(forward_backward(model, state, data, loss_fn, {}, backward=backward))


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_pass_copies_its_results_at_once_whatever_its_micro_batches(
    loss_fn: str, distant: Model, copies: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numerics, "TOKENS_PER_MICRO_BATCH", 20)
    result = run(distant, loss_fn, 2)
    assert [each["logprobs"].shape for each in result.outputs] == [(9,), (10,)]
    few = len(copies)
    assert few == 2, "one of float32, one of float64"
    assert len(run(distant, loss_fn, 8).outputs) == 8
    assert len(copies) == 2 * few


def test_no_family_waits_for_its_device(
    family: str, directories: dict[str, Path], copies: list[torch.Size]
) -> None:
    model = on_meta(directories[family])
    run(model, "cross_entropy", 2)
    run(model, "cross_entropy", 2, backward=False)
    assert len(copies) == 4


@pytest.mark.parametrize("adapted", [False, True])
def test_token_waits_for_its_device_once(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch, *, adapted: bool
) -> None:
    model = on_meta(directories["llama"])
    model.decoder = ModuleDecoder(model)
    for module in model.module.modules():
        if isinstance(module, LoraProjection):
            module.product = product_of(module.base)
    seen: list[torch.Size] = []
    random = np.random.default_rng(1)

    def to_host(tensor: torch.Tensor) -> Array:
        seen.append(tensor.shape)
        return random.integers(model.info.vocab_size, size=tensor.shape).astype(np.float64)

    monkeypatch.setattr(device_choice, "to_host", to_host)
    used = None
    if adapted:
        layout = model.layout(AdapterConfig(rank=4))
        tensors = {n: torch.empty(shape, device=META) for n, shape in layout.shapes.items()}
        used = Adapter(layout, layout.weights(tensors), tensors)
    batch = SamplingBatch(model)
    stop = tuple(range(model.info.vocab_size // 3))  # sequences end one after another
    spec = SampleSpec(np.arange(5), 3, max_tokens=6, stop_tokens=stop, use_eos=False, seed=1)
    batch.add("it", spec, used)
    finished = []
    while batch.busy:
        finished += batch.step()
    ((_, output),) = finished
    assert isinstance(output, SampleOutput), output
    longest = max(len(each.tokens) for each in output.sequences)
    assert len({len(each.tokens) for each in output.sequences}) > 1
    rows = [sum(len(each.tokens) > drawn for each in output.sequences) for drawn in range(longest)]
    # A row's largest logit, its token and its logprob; three tokens of the prompt's row.
    assert seen == [(1 + 2 * 3,), *((3 * each,) for each in rows[1:])]


def test_reading_from_the_device_would_raise() -> None:
    tensor = torch.zeros(3, device=META)
    for read in (tensor.sum().item, tensor.nonzero, tensor.cpu):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()


def test_optimizer_step_reads_nothing_but_the_norm() -> None:
    four = {name: torch.zeros(8, device=META) for name in ("params", "exp_avg", "exp_avg_sq")}
    numbers = {**four, "grads": torch.zeros(8, device=META)}
    optimizer._apply(numbers, AdamParams(grad_clip_norm=1.0), 3, torch.zeros((), device=META))


# On a CPU, where numbers can be compared


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the numbers that Python reads from tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += func.overloadpacket.__name__ == "_local_scalar_dense"
        return func(*args, **(kwargs or {}))


def test_no_number_is_read_for_each_micro_batch(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for tokens in (2048, 1):
        monkeypatch.setattr(numerics, "TOKENS_PER_MICRO_BATCH", tokens)
        state = trained(llama)
        with Reads() as reads:
            backward(llama, state, examples(1, (9, 9, 9, 9)))
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("loss_fn", [name for name in LOSSES if LOSSES[name].silent_where])
def test_rows_that_the_host_knows_have_all_gradients(
    loss_fn: str, llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradients() -> bytes:
        state = trained(llama)
        data = [Example(np.arange(12), inputs_of(loss_fn, 12)) for _ in range(3)]
        finish(forward_backward(llama, state, data, loss_fn, {}, backward=True))
        return buffers(state)["grads"]

    expected, known = gradients(), []
    monkeypatch.setattr(training_pass, "is_accelerator", lambda device: True)
    wanted = head._wanted

    def record(gradient: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        assert rows is not None and not gradient[_others(rows, len(gradient))].any()
        known.append(len(rows))
        return wanted(gradient, rows)

    monkeypatch.setattr(head, "_wanted", record)
    assert gradients() == expected
    assert known[-1] == 18  # half of the tokens


def _others(rows: torch.Tensor, count: int) -> list[int]:
    return sorted(set(range(count)) - set(rows.tolist()))


def test_results_of_a_device_keep_their_order_and_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "is_accelerator", lambda device: True)
    tensors = [torch.rand(2, 3), torch.rand((), dtype=torch.float64), torch.rand(0), torch.rand(4)]
    found = download(tensors)
    for tensor, array in zip(tensors, found, strict=True):
        assert array.dtype == tensor.numpy().dtype
        assert np.array_equal(array, tensor.numpy())


def test_upload_to_cuda_is_pinned_and_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Pinned:
        def to(self, device: torch.device, *, non_blocking: bool) -> None:
            calls.append((device, non_blocking))

    monkeypatch.setattr(transfer, "_pinned_copy", lambda array: Pinned())
    upload(np.arange(3), torch.device("cuda", 1))
    assert calls == [(torch.device("cuda", 1), True)]


def test_buffer_is_filled_in_bounded_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[int] = []

    def pinned_copy(array: Array) -> torch.Tensor:
        pieces.append(array.size)
        return torch.from_numpy(array)

    monkeypatch.setattr(transfer, "_pinned_copy", pinned_copy)
    monkeypatch.setattr(transfer, "PIECE", 5)
    numbers = np.arange(17, dtype=np.float32)
    buffer = torch.full((17,), -1.0)
    transfer._fill_in_pieces(buffer, [numbers[:12].reshape(3, 4), numbers[12:]])
    assert np.array_equal(buffer.numpy(), numbers)
    assert pieces == [5, 5, 2, 5]


@pytest.mark.cuda
def test_arrays_reach_cuda_and_come_back() -> None:
    device = torch.device("cuda")
    arrays = [np.random.default_rng(n).random((300, 1000), np.float32) for n in range(9)]
    buffer = torch.empty(sum(each.size for each in arrays), device=device)
    transfer.fill(buffer, arrays)
    copies = transfer.CopyStream(device)
    expected = np.concatenate([each.ravel() for each in arrays])
    assert np.array_equal(copies.copy(buffer, copies.mark()).wait(), expected)
    assert np.array_equal(transfer.to_host(buffer), expected)
    assert np.array_equal(upload(arrays[0], device).cpu().numpy(), arrays[0])


class Events:
    """Stands in for CUDA's events and streams."""

    def __init__(self) -> None:
        self.recorded: list[int] = []
        self.waited: list[int] = []

    def event(self) -> Any:
        events = self

        class Event:
            def record(self, stream: Any) -> None:
                self.number = len(events.recorded)
                events.recorded.append(self.number)

            def synchronize(self) -> None:
                events.waited.append(self.number)

        return Event()


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[Events]:
    found = Events()
    monkeypatch.setattr(torch.cuda, "Event", found.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    yield found


def test_work_that_is_queued_is_bounded(events: Events) -> None:
    queue = QueueBound(torch.device("cuda"))
    for number in range(5):
        queue.mark()
        assert events.waited == list(range(max(0, number + 1 - MAX_QUEUED)))
    assert events.recorded == [0, 1, 2, 3, 4]


def test_copy_to_the_host_begins_after_a_mark_and_is_marked(
    events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    class Stream:
        def wait_event(self, event: Any) -> None:
            calls.append(("waits for", event.number))

    class Pinned:
        def copy_(self, tensor: torch.Tensor, *, non_blocking: bool) -> None:
            calls.append(("copies", non_blocking, len(events.recorded)))

        def numpy(self) -> str:
            return "array"

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(transfer, "_pinned_like", lambda tensor: Pinned())
    copies = transfer.CopyStream(torch.device("cuda"))
    mark = copies.mark()
    copy = copies.copy(torch.empty(3), mark)
    assert calls == [("waits for", 0), ("copies", True, 1)]
    assert (events.recorded, events.waited) == ([0, 1], []), "the host does not wait"
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    copy.hold_device()
    assert (calls[2:], events.waited) == ([("waits for", 1)], [])
    assert str(copy.wait()) == "array"
    assert events.waited == [1]


def test_a_cpu_has_no_events(events: Events) -> None:
    queue = QueueBound(torch.device("cpu"))
    for _ in range(5):
        queue.mark()
    assert events.recorded == []


@pytest.mark.parametrize("sizes", [(5, 7), (PIECE + 3, 1, 2 * PIECE), (0, 3 * PIECE, 0, 9)])
def test_buffer_is_filled_with_the_arrays_in_order(sizes: tuple[int, ...]) -> None:
    arrays = [np.random.default_rng(n).standard_normal(n, np.float32) for n in sizes]
    for array in arrays:
        array.flags.writeable = False  # as a mapped file
    buffer = torch.full((sum(sizes),), 7.0)
    fill(buffer, arrays)
    assert buffer.numpy().tobytes() == np.concatenate(arrays).tobytes()
