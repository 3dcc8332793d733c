"""Huge pages: large blocks move into them, and keep what they hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from everstep.engine.kernels import huge_pages
from everstep.engine.models.frozen_product import FrozenProduct

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MAPPINGS = Path("/proc/self/smaps_rollup")


def huge_bytes() -> int:
    """Return how much of the process lies in huge pages."""
    line = next(line for line in _MAPPINGS.read_text().splitlines() if "AnonHugePages" in line)
    return int(line.split()[1]) << 10


def needs_huge_pages() -> None:
    if not _SETTING.exists() or "[never]" in _SETTING.read_text():
        pytest.skip("this system has no huge pages")
    block = torch.ones(8 << 20)
    before = huge_bytes()
    huge_pages.collapse(block.data_ptr(), block.nbytes)
    if huge_bytes() <= before:
        pytest.skip("this system moves no memory into huge pages")


def test_the_packed_copy_of_a_large_weight_lies_in_huge_pages() -> None:
    needs_huge_pages()
    product = FrozenProduct(torch.randn(8192, 512))
    if not product.uses_onednn:
        pytest.skip("this processor's products are torch's")
    x = torch.randn(4, 512)
    expected = product(x)
    before = huge_bytes()
    product.pack()
    assert huge_bytes() - before >= product.weight.nbytes // 2
    assert torch.equal(product(x), expected)


def test_small_blocks_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(huge_pages, "_madvise", lambda *call: asked.append(call))
    huge_pages.collapse(4096, huge_pages.MIN_BYTES - 1)
    assert asked == []
    huge_pages.collapse(4097, huge_pages.MIN_BYTES)
    ((begin, nbytes, _),) = asked
    assert begin == 8192
    assert begin + nbytes <= 4097 + huge_pages.MIN_BYTES


def test_a_system_without_madvise_has_small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_madvise", None)
    block = torch.ones(huge_pages.MIN_BYTES)
    huge_pages.advise(block.data_ptr(), block.nbytes)
    huge_pages.collapse(block.data_ptr(), block.nbytes)
    assert bool((block == 1).all())
