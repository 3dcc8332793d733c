"""Retention: deletes by policy, and never deletes the only intact checkpoint."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.vault import Manifest
from everstep.vault.retention import Policy, metric_of, to_delete
from tests.profiles import example_count
from tests.vault.checkpoints import draft

NOW = datetime(2026, 6, 1, tzinfo=UTC)


def checkpoint(
    name: str,
    *,
    age: float = 0,
    loss: str | None = None,
    kind: str = "training",
    run: str = "a:train:0",
    expires: float | None = None,
) -> Manifest:
    return draft(name, {}, kind=kind, run=run).model_copy(
        update={
            "created_at": NOW - timedelta(hours=age),
            "user_metadata": {"loss": loss} if loss is not None else None,
            "expires_at": None if expires is None else NOW + timedelta(hours=expires),
        }
    )


def deleted(manifests: list[Manifest], policy: Policy, bad: frozenset[str] = frozenset()) -> str:
    gone = to_delete(manifests, policy, now=NOW, good=lambda m: m.name not in bad)
    return "".join(each.name for each in gone)


AGED = [checkpoint(name, age=age) for name, age in zip("abcde", (5, 4, 3, 2, 1), strict=True)]
SCORED = [
    checkpoint(name, age=age, loss=loss)
    for name, age, loss in [("a", 5, "1.0"), ("b", 4, "0.5"), ("c", 3, None), ("d", 2, "nan")]
] + [checkpoint("e", age=1, loss="0.5"), checkpoint("f", age=0, loss="2e0")]


def test_last_checkpoints_are_kept() -> None:
    assert deleted(AGED, Policy(keep_last=2)) == "abc"
    assert deleted(AGED, Policy(keep_last=9)) == ""


def test_best_checkpoints_are_kept_and_of_equals_the_newer() -> None:
    assert deleted(SCORED, Policy(keep_best=1, metric="loss")) == "abcdf"
    assert deleted(SCORED, Policy(keep_best=2, metric="loss")) == "acdf"
    assert deleted(SCORED, Policy(keep_best=2, metric="loss", mode="max")) == "bcde"
    assert deleted(SCORED, Policy(keep_last=1, keep_best=1, metric="loss")) == "abcd"


def test_checkpoints_younger_than_the_ttl_are_kept() -> None:
    assert deleted(AGED, Policy(ttl=timedelta(hours=3))) == "abc"
    assert deleted(AGED, Policy(keep_last=3, ttl=timedelta(hours=1.5))) == "ab"


def test_only_intact_checkpoint_is_never_deleted() -> None:
    assert deleted(AGED, Policy(keep_last=2), frozenset("de")) == "ab"
    assert deleted(AGED, Policy(keep_last=1), frozenset("bcde")) == "bcd"
    assert deleted(AGED, Policy(keep_last=1), frozenset("abcde")) == ""
    assert deleted(AGED, Policy(ttl=timedelta(minutes=1))) == "abcd"


def test_expired_checkpoints_and_snapshots_are_not_counted() -> None:
    found = [*AGED, checkpoint("x", expires=-1), checkpoint("s", kind="snapshot")]
    assert deleted(found, Policy(keep_last=1)) == "abcd"


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "low", "", None])
def test_non_finite_or_missing_number_is_no_metric(text: str | None) -> None:
    assert metric_of(checkpoint("x", loss=text), "loss") is None


@pytest.mark.parametrize(
    "fields", [{}, {"keep_last": -1}, {"keep_best": 1}, {"keep_last": 1, "keep_best": -1}]
)
def test_invalid_policy_is_rejected(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="keep"):
        Policy(**fields)


groups = st.lists(
    st.tuples(
        st.sampled_from(["a:train:0", "b:train:0"]),
        st.sampled_from(["training", "sampler", "snapshot"]),
        st.integers(0, 50),
        st.sampled_from([None, "nan", "1", "2", "3.5", "-1e3"]),
        st.booleans(),
        st.sampled_from([None, -1.0, 0.0, 9.0]),
    ),
    max_size=12,
)
policies = st.builds(
    lambda last, best, mode, hours: (
        Policy(last, best, "loss", mode, hours and timedelta(hours=hours))
        if last or best or hours
        else Policy(keep_last=1)
    ),
    st.integers(0, 4),
    st.integers(0, 4),
    st.sampled_from(["min", "max"]),
    st.one_of(st.none(), st.integers(1, 60)),
)


@example_count(300)
@given(groups, policies)
def test_any_policy_keeps_its_invariants(drawn: list[tuple[Any, ...]], policy: Policy) -> None:
    manifests = [
        checkpoint(f"n{index}", run=run, kind=kind, age=age, loss=loss, expires=expires)
        for index, (run, kind, age, loss, _, expires) in enumerate(drawn)
    ]
    good = {f"n{index}" for index, row in enumerate(drawn) if row[4]}
    gone = to_delete(manifests, policy, now=NOW, good=lambda m: m.name in good)
    names = {each.name for each in gone}
    assert len(names) == len(gone)
    assert [each.created_at for each in gone] == sorted(each.created_at for each in gone)
    for key in {(m.run_id, m.kind) for m in manifests}:
        group = [m for m in manifests if (m.run_id, m.kind) == key]
        live = [m for m in group if m.expires_at is None or m.expires_at > NOW]
        kept = [m for m in live if m.name not in names]
        if key[1] == "snapshot":
            assert kept == live
            continue
        assert [m for m in group if m not in live and m in gone] == []
        if any(m.name in good for m in live):  # an intact one is kept if there was one
            assert any(m.name in good for m in kept)
        else:
            assert kept == live
        newest = sorted((m.created_at for m in live), reverse=True)[: policy.keep_last]
        assert sorted((m.created_at for m in kept), reverse=True)[: len(newest)] == newest
        assert len(kept) >= min(len(live), policy.keep_last)
        scores = [s for m in live if (s := metric_of(m, "loss")) is not None]
        best = sorted(scores, reverse=policy.mode == "max")[: policy.keep_best]
        left = [s for m in kept if (s := metric_of(m, "loss")) is not None]
        if policy.metric is not None:
            assert sorted(left, reverse=policy.mode == "max")[: len(best)] == best
        if policy.ttl is not None:
            assert [m for m in gone if NOW - m.created_at < policy.ttl] == []
        again = to_delete(kept, policy, now=NOW, good=lambda m: m.name in good)
        assert again == []  # a second application deletes nothing
