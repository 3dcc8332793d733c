"""CI's wrapper bounds the run's time, and ends every process that the run started."""

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
    """Run a command under the wrapper until nobody holds its output open."""
    return subprocess.run(
        [sys.executable, str(BOUNDED), str(seconds), *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_exit_code_is_the_commands_and_leftover_processes_end() -> None:
    done = bounded(60, "bash", "-c", LEAVES_ONE)
    assert done.returncode == 3
    left = int(done.stdout.split()[1])
    assert f"left behind, killed: {left} " in done.stdout
    assert not Path(f"/proc/{left}").exists()


def test_command_over_its_time_ends_and_prints_its_stacks() -> None:
    done = bounded(1.5, "bash", "-c", f"{sys.executable} -c '{HANGS}' & wait")
    assert done.returncode == 124
    assert "not finished after 0.025 minutes, killed" in done.stdout
    assert "time.sleep(1000)" in done.stdout, "the processes that were running"
    assert 'File "<string>", line 1 in <module>' in done.stderr, "its stack"


def test_signal_ends_the_command_and_its_processes() -> None:
    command = [sys.executable, str(BOUNDED), "60", "bash", "-c", "sleep 1000 & echo $!; wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        started = int(process.stdout.readline())
        process.terminate()
        process.stdout.read()
    assert process.returncode != 0
    assert not Path(f"/proc/{started}").exists()
