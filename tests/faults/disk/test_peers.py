"""Peers: the power cuts that Everstep survives lose checkpoints of other libraries."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from everstep.testing.crashfs import CrashFS, scratch
from everstep.testing.devices import why_not
from everstep.testing.lives import Lives
from everstep.testing.nursery import Nursery
from tests.faults.disk import peers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]
LOSE = [name for name in peers.SAVES if name != "carefully"]


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    loaded = ("torch", "safetensors.torch", "torch.distributed.checkpoint")
    with Nursery(loaded) as nursery:
        yield nursery


def violations(nursery: Nursery, peer: str, saves: int) -> list[str]:
    with CrashFS(scratch()) as disk:
        target = f"{peers.__name__}:live"
        lives = Lives(nursery, disk, target=target, check=peers.check)
        end = lives.until_paused(peer=peer, saves=saves)
        assert end.reached
        assert end.acknowledged == saves
        return [each.rule for each in end.violations]


@pytest.mark.parametrize("saves", [1, 2], ids=["first", "overwrite"])
@pytest.mark.parametrize("peer", LOSE)
def test_peer_loses_a_save_that_returned(nursery: Nursery, peer: str, saves: int) -> None:
    assert violations(nursery, peer, saves)


@pytest.mark.parametrize("saves", [1, 2], ids=["first", "overwrite"])
def test_careful_save_loses_nothing(nursery: Nursery, saves: int) -> None:
    assert violations(nursery, "carefully", saves) == []
