"""Filters and times, for any filter and any checkpoint."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.cli.common.errors import WrongUsage
from everstep.cli.common.filters import Filters, read_kind, read_span, read_time
from everstep.wire.paths import CheckpointKind, TinkerPath
from everstep.wire.types import Checkpoint

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
TIMES = st.integers(0, 10_000).map(lambda minutes: NOW - timedelta(minutes=minutes))
RUNS = st.sampled_from(["a:train:0", "a:train:1", "b:train:0"])
KINDS = st.sampled_from(list(CheckpointKind))
NAMES = st.sampled_from(["step-1", "step-10", "final", "a.b"])
SPANS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


@st.composite
def checkpoints(draw: st.DrawFn) -> Checkpoint:
    path = TinkerPath(draw(RUNS), draw(KINDS), draw(NAMES))
    return Checkpoint(
        checkpoint_id=path.checkpoint_id,
        checkpoint_type=str(path.kind),
        time=draw(TIMES),
        tinker_path=str(path),
    )


FILTERS = st.builds(
    Filters,
    run=st.none() | RUNS,
    kind=st.none() | KINDS,
    before=st.none() | TIMES,
    after=st.none() | TIMES,
    name=st.none() | st.sampled_from(["*", "step-*", "step-?", "final", "[!s]*"]),
)


@given(checkpoints(), FILTERS)
def test_filter_requires_all_its_conditions(checkpoint: Checkpoint, wanted: Filters) -> None:
    parts = [
        Filters(run=wanted.run),
        Filters(kind=wanted.kind),
        Filters(before=wanted.before),
        Filters(after=wanted.after),
        Filters(name=wanted.name),
    ]
    assert wanted.admit(checkpoint) == all(each.admit(checkpoint) for each in parts)


@given(checkpoints(), TIMES)
def test_before_and_after_partition_time(checkpoint: Checkpoint, time: datetime) -> None:
    assert Filters(before=time).admit(checkpoint) != Filters(after=time).admit(checkpoint)
    assert Filters(before=time).admit(checkpoint) == (checkpoint.time < time)


@given(checkpoints())
def test_empty_filter_admits_everything_and_exact_filter_its_checkpoint(
    checkpoint: Checkpoint,
) -> None:
    assert Filters().admit(checkpoint) and not Filters().given
    run, segment, name = checkpoint.tinker_path.removeprefix("tinker://").split("/")
    own = Filters.of(run, segment, name=name)
    assert own.admit(checkpoint) and own.given
    assert not Filters(run=run + "0").admit(checkpoint)


@given(st.integers(0, 10_000), st.sampled_from(list(SPANS)))
def test_age_is_subtracted_from_now(count: int, unit: str) -> None:
    assert read_time(f"{count}{unit}", NOW) == NOW - timedelta(seconds=count * SPANS[unit])
    assert read_span(f"{count}{unit}") == count * SPANS[unit]


@given(st.datetimes(min_value=datetime(2, 1, 1)), st.integers(-12, 12))
def test_time_without_zone_is_utc(naive: datetime, hours: int) -> None:
    assert read_time(naive.isoformat(), NOW) == naive.replace(tzinfo=UTC)
    aware = naive.replace(tzinfo=timezone(timedelta(hours=hours)))
    assert read_time(aware.isoformat(), NOW) == aware


@given(st.text(max_size=12))
def test_any_text_is_a_time_or_wrong_usage(text: str) -> None:
    try:
        assert read_time(text, NOW).tzinfo is not None
    except WrongUsage as error:
        assert "7d" in str(error) or "calendar" in str(error)


@given(st.text(max_size=12) | st.from_regex(r"[0-9]{1,9}[smhdw]?", fullmatch=True))
def test_any_text_is_a_span_or_wrong_usage(text: str) -> None:
    try:
        assert read_span(text) >= 0
    except WrongUsage as error:
        assert "7d" in str(error) or "longer" in str(error)


@pytest.mark.parametrize("kind", CheckpointKind)
def test_kind_has_two_names(kind: CheckpointKind) -> None:
    assert read_kind(str(kind)) is read_kind(kind.segment) is kind
    with pytest.raises(WrongUsage, match="training"):
        read_kind("checkpoint")
