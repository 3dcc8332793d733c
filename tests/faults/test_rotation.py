"""Rotation: the shares of commits make up all cases, and a soak runs all of them."""

from __future__ import annotations

import pytest

from tests.faults import rotation
from tests.faults.rotation import share_of_commit


def test_shares_of_commits_are_disjoint_and_complete(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rotation, "SOAK", False)
    chosen = []
    for commit in ("ab0", "ab1", "ab2", "ab3"):
        monkeypatch.setenv("EVERSTEP_COMMIT", commit)
        share = share_of_commit(range(21), 4, "cuts")
        assert len(share) >= 5
        assert f"EVERSTEP_COMMIT={commit}: cuts {share[0]}, {share[1]}," in capsys.readouterr().out
        chosen += share
    assert sorted(chosen) == list(range(21))


def test_share_is_the_checked_out_commits_and_stays_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rotation, "SOAK", False)
    monkeypatch.delenv("EVERSTEP_COMMIT", raising=False)
    share = share_of_commit(range(100), 10, "cuts")
    assert share == list(range(int(rotation.commit(), 16) % 10, 100, 10))


def test_printed_hash_repeats_the_share(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rotation, "SOAK", False)
    monkeypatch.setenv("EVERSTEP_COMMIT", "0123456789abcdef0123456789abcdef01234567")
    share = share_of_commit(range(100), 7, "cuts")
    monkeypatch.setenv("EVERSTEP_COMMIT", capsys.readouterr().out.partition(":")[0].split("=")[1])
    assert share_of_commit(range(100), 7, "cuts") == share


def test_soak_runs_all_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "SOAK", True)
    assert share_of_commit(range(20), 10, "cuts") == list(range(20))
