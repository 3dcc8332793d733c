"""Arena: a save reads what it captured, whatever training does meanwhile, in bounded memory.

``late`` stands in for a GPU on the CPU: each copy to the host is made at the last moment that the
arena allows, when somebody waits for it. What it can't show is that CUDA's streams keep this order.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from everstep.engine import AdamParams, AdapterConfig, Capture, RunState, optim_step
from everstep.engine import arena as arena_module
from everstep.engine import spare as spare_module
from everstep.engine.arena import BUFFERS
from everstep.engine.run_state import AdapterLayout
from everstep.engine.spare import SEGMENT, SPARE, SpareMemory
from tests.devices import DEVICES, settings_of
from tests.engine.helpers import buffers, files
from tests.waiting import eventually

CPU = torch.device("cpu")
PARAMS = AdamParams(learning_rate=0.01, weight_decay=0.1, grad_clip_norm=0.5)


class LateCopy:
    """A copy that is made when the host or the device waits for it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._array: np.ndarray[Any, Any] | None = None
        self._lock = threading.Lock()

    def wait(self) -> np.ndarray[Any, Any]:
        with self._lock:
            if self._array is None:
                self._array = self._tensor.numpy().copy()
            return self._array

    def hold_device(self) -> None:
        self.wait()


class LateCopies:
    """Stands in for `CopyStream`. What is queued on this device is computed at once."""

    def mark(self) -> object:
        return object()

    def copy(self, tensor: torch.Tensor, after: object) -> LateCopy:
        return LateCopy(tensor)


@pytest.fixture(params=[*DEVICES, "late"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if request.param == "late":
        monkeypatch.setattr(arena_module, "copy_stream", lambda device: LateCopies())
        yield CPU
        return
    with settings_of(request.param):
        yield torch.device(request.param)


def new_state(width: int, device: torch.device = CPU) -> RunState:
    """A run with two modules, of 4 * 4 * width parameters and a few more."""
    widths = {"a": (width, width + 3), "b": (width + 1, width)}
    return RunState(AdapterLayout(AdapterConfig(rank=4, seed=1), widths, b"{}"), device)


def step(state: RunState, number: int, params: AdamParams = PARAMS) -> None:
    """Make one step with gradients that the number determines."""
    random = torch.Generator().manual_seed(number)
    grads = torch.empty(state.arena.size).normal_(0, 1, generator=random)
    on_device = grads.to(state.arena.buffers["grads"].device)
    state.arena.replace({"grads": on_device})  # as a training pass does
    optim_step(state, params)


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> int:
    """Cut buffers into segments of 48 numbers."""
    monkeypatch.setattr(arena_module, "SEGMENT", 48)
    return 48


def content(capture: Capture, *, once: bool = False) -> dict[str, bytes]:
    return {n: b"".join(map(bytes, each)) for n, each in capture.files(once=once).items()}


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("clipped", [True, False])
def test_step_in_segments_gives_the_bits_of_a_whole_step(
    small_segments: int, threads: int, clipped: bool, device: torch.device
) -> None:
    params = PARAMS if clipped else replace(PARAMS, grad_clip_norm=0.0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole, cut = new_state(61, device), new_state(61, device)
        assert len(cut.arena.segments) > 10
        for number in range(5):
            step(whole, number, params)
            capture = cut.capture(optimizer=True)
            step(cut, number, params)
            capture.release()
            assert buffers(cut) == buffers(whole)
    finally:
        torch.set_num_threads(before)


def test_step_in_segments_of_full_size_gives_the_bits_of_a_whole_step(device: torch.device) -> None:
    width = SEGMENT // 16 + 7
    whole, cut = new_state(width, device), new_state(width, device)
    assert len(cut.arena.segments) == 2
    for number in range(2):
        step(whole, number)
        capture = cut.capture(optimizer=True)
        step(cut, number)
        capture.release()
    for name in BUFFERS:
        assert torch.equal(whole.arena.buffers[name], cut.arena.buffers[name])


@pytest.mark.parametrize("once", [True, False])
def test_capture_is_unchanged_by_a_step_at_any_point_of_its_reading(
    small_segments: int, once: bool, device: torch.device
) -> None:
    for point in itertools.count():
        state = new_state(13, device)
        step(state, 0)
        state.arena.replace({"grads": torch.full((state.arena.size,), 3.0, device=device)})
        state.has_gradients = True
        expected, _ = files(state, optimizer=True)
        assert len(expected) == 4
        capture = state.capture(optimizer=True)
        found, chunks = dict.fromkeys(expected, b""), 0
        for name, each in capture.files(once=once).items():
            for chunk in each:
                found[name] += bytes(chunk)
                chunks += 1
                if chunks == point:
                    held = threading.Thread(target=step, args=(state, 1))
                    held.start()  # it may wait for this chunk, where that is read in place
                    if state.arena.copies is not None:
                        held.join()
        if point == 0:
            step(state, 1)
        elif point <= chunks:
            held.join()
        assert found == expected
        if not once:
            assert content(capture) == expected
        capture.release()
        assert not state.arena._pins
        if point > chunks:
            return


def test_captures_that_are_written_during_many_steps_are_exact(
    small_segments: int, device: torch.device
) -> None:
    state, reference = new_state(61, device), new_state(61, device)
    found: list[dict[str, bytes]] = []
    expected: list[dict[str, bytes]] = []

    def write(capture: Capture) -> None:
        found.append(content(capture, once=True))
        capture.release()

    for number in range(20):
        step(reference, number)
        expected.append(files(reference, optimizer=True)[0])
        step(state, number)
        capture = state.capture(optimizer=True)
        writer = threading.Thread(target=write, args=(capture,))
        writer.start()
        if number % 3 == 0:
            writer.join()
    eventually("everything is written", lambda: len(found) == 20)
    eventually("everything is released", lambda: not state.arena._pins)
    assert sorted(map(str, found)) == sorted(map(str, expected))
    assert buffers(state) == buffers(reference)


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Record the numbers in each block that is allocated."""
    counts: list[int] = []
    real = spare_module.allocate

    def allocate(count: int, device: torch.device) -> torch.Tensor:
        counts.append(count)
        return real(count, device)

    monkeypatch.setattr(spare_module, "allocate", allocate)
    yield counts


def test_later_saves_allocate_no_spare_memory(allocated: list[int]) -> None:
    state = new_state(SEGMENT // 8)
    state.arena.spare = SpareMemory(8 * 4 * SEGMENT)
    allocated.clear()
    for number in range(3):
        capture = state.capture(optimizer=True)
        capture.prepare()
        whole = allocated.count(SEGMENT)
        assert whole == 6
        step(state, number)
        content(capture, once=True)
        capture.release()
    assert allocated.count(SEGMENT) == whole, "three buffers of two segments and a rest, once"


def test_step_waits_until_spare_memory_is_enough(small_segments: int, device: torch.device) -> None:
    state = new_state(61, device)
    segments = len(state.arena.segments)
    state.arena.spare = SpareMemory(4 * small_segments * segments)  # one buffer of three
    assert state.arena.wait_for_spare(0)
    capture = state.capture(optimizer=True)
    assert not state.arena.wait_for_spare(0)
    chunks = (chunk for each in capture.files(once=True).values() for chunk in each)
    read = 0
    while not state.arena.wait_for_spare(0):
        next(chunks)
        read += 1
    assert read >= 2 * segments - 1, "one may be copied ahead"
    chunks.close()
    step(state, 1)
    assert state.arena.spare.free >= 0
    capture.release()
    assert state.arena.spare.free == 4 * small_segments * segments


def test_what_was_read_is_not_kept(small_segments: int, device: torch.device) -> None:
    state = new_state(61, device)
    limit = state.arena.spare.free
    capture = state.capture(optimizer=True)
    content(capture, once=True)
    step(state, 1)
    assert state.arena.spare.free == limit
    capture.release()


def test_segment_that_a_full_device_has_no_room_for_is_kept_on_the_host(
    small_segments: int, device: torch.device
) -> None:
    class Full(SpareMemory):
        def take(self, count: int) -> torch.Tensor:
            raise torch.OutOfMemoryError("no memory")

    state = new_state(61, device)
    state.arena.spare = Full()
    before = SPARE.free
    expected, _ = files(state, optimizer=True)
    capture = state.capture(optimizer=True)
    step(state, 1)
    assert SPARE.free < before
    assert content(capture) == expected
    capture.release()
    assert SPARE.free == before
