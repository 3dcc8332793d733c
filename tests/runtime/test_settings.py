"""Settings come from a file, the environment and flags; a wrong one is named with its source."""

from __future__ import annotations

from pathlib import Path

import pytest

from everstep.runtime import Settings
from everstep.runtime.settings import FILE_NAME


def write(home: Path, text: str) -> None:
    home.mkdir(exist_ok=True)
    (home / FILE_NAME).write_text(text)


def test_a_flag_wins_over_the_environment_and_that_over_the_file(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(home, "replay_seconds = 1\nidle_seconds = 1\npoll_seconds = 1.5\nload_first_only = true")
    monkeypatch.setenv("EVERSTEP_REPLAY_SECONDS", "2")
    monkeypatch.setenv("EVERSTEP_IDLE_SECONDS", "2")
    settings = Settings.load(home, ["replay_seconds=4", "replay_seconds=3"])
    assert settings == Settings(
        replay_seconds=3, idle_seconds=2, poll_seconds=1.5, load_first_only=True
    )
    assert settings.gap_seconds == Settings().gap_seconds


def test_a_home_that_does_not_exist_has_the_defaults(home: Path) -> None:
    assert Settings.load(home) == Settings()


def test_construction_does_not_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERSTEP_REPLAY_SECONDS", "2")
    assert Settings().replay_seconds == 30.0


def test_an_empty_variable_leaves_the_default(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERSTEP_THREADS", "")
    assert Settings.load(home).threads is None


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("threads=four", "setting threads=four (in --set threads=four): Input should be a valid"),
        ("threads=0", "greater than or equal to 1"),
        ("worker_attempts=0", "greater than or equal to 1"),
        ("replay_seconds=-1", "greater than or equal to 0"),
        ("replay_seconds=nan", "finite number"),
        ("load_first_only=perhaps", "valid boolean"),
        ("thread=4", "there is no setting 'thread' (in --set thread=4); there are threads"),
        ("threads", "'threads' is not NAME=VALUE"),
        ("most_samples=4", "is called 'max_inflight_samples' now"),
        ("abandoned_seconds=4", "is called 'orphan_ttl_seconds' now"),
    ],
)
def test_a_malformed_flag_is_named(home: Path, flag: str, text: str) -> None:
    with pytest.raises(ValueError) as raised:
        Settings.load(home, [flag])
    assert text in str(raised.value)


def test_a_malformed_variable_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERSTEP_IDLE_SECONDS", "soon")
    with pytest.raises(ValueError, match=r"idle_seconds=soon \(in the environment \(EVERSTEP_IDL"):
        Settings.load(home)
    monkeypatch.delenv("EVERSTEP_IDLE_SECONDS")
    monkeypatch.setenv("EVERSTEP_MOST_SAMPLES", "4")
    with pytest.raises(ValueError, match=r"EVERSTEP_MOST_SAMPLES\)\) is called 'max_inflight"):
        Settings.load(home)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("idle_seconds = 'soon'", "setting idle_seconds=soon (in {path}): Input should be a valid"),
        ("idle = 1", "there is no setting 'idle' (in {path})"),
        ("most_samples = 1", "setting 'most_samples' (in {path}) is called"),
        ("idle_seconds", "{path} can't be read: "),
    ],
)
def test_a_malformed_file_is_named(home: Path, text: str, found: str) -> None:
    write(home, text)
    with pytest.raises(ValueError) as raised:
        Settings.load(home)
    assert found.format(path=home / FILE_NAME) in str(raised.value)


def test_every_setting_stands_in_the_guide() -> None:
    guide = Path(__file__).parents[2] / "docs" / "guides" / "operations.md"
    section = guide.read_text().partition("## Settings")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(Settings.model_fields)
