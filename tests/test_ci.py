"""What bounds CI: a time, and nothing that outlives it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BOUNDED = Path(__file__).parents[1] / ".ci" / "bounded.py"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it needs Linux")
LEAVES_ONE = "setsid sleep 1000 & echo left $!; exit 3"
HANGS = "import faulthandler, time; faulthandler.enable(); time.sleep(1000)"


def bounded(seconds: float, *command: str) -> subprocess.CompletedProcess[str]:
    """What came of a command, once no one holds its output any more."""
    return subprocess.run(
        [sys.executable, str(BOUNDED), str(seconds), *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_exit_code_is_the_command_s_and_what_it_left_behind_ends() -> None:
    done = bounded(60, "bash", "-c", LEAVES_ONE)
    assert done.returncode == 3
    left = int(done.stdout.split()[1])
    assert f"left behind, and ended now: {left} " in done.stdout
    assert not Path(f"/proc/{left}").exists()


def test_what_takes_too_long_is_given_up_and_says_where_it_was() -> None:
    done = bounded(1.5, "bash", "-c", f"{sys.executable} -c '{HANGS}' & wait")
    assert done.returncode == 124
    assert "not through after 0.025 minutes, and given up" in done.stdout
    assert "time.sleep(1000)" in done.stdout, "what it was doing"
    assert 'File "<string>", line 1 in <module>' in done.stderr, "its stack"


def test_a_signal_ends_it_with_all_that_it_started() -> None:
    command = [sys.executable, str(BOUNDED), "60", "bash", "-c", "sleep 1000 & echo $!; wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        started = int(process.stdout.readline())
        process.terminate()
        process.stdout.read()
    assert process.returncode != 0
    assert not Path(f"/proc/{started}").exists()
