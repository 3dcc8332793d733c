"""Releases of the official SDK, each in a directory of its own, and programs that are run with one.

`make sdks` fills the directories. A release goes first on the path of a process and finds what it
depends on in the environment of the tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
VERSIONS = (Path(__file__).parent / "official_sdks.txt").read_text().split()
PROGRAM = Path(__file__).parent / "sdk_program.py"


def directory(name: str) -> Path:
    """Where a release of the SDK lies, or another thing that only its own test imports."""
    path = Path(sys.prefix) / "sdks" / name
    assert path.is_dir(), f"{path} is missing: run `make sdks`"
    return path


def environment(url: str, *names: str, **more: str) -> dict[str, str]:
    """A user's, with these directories first on the path, and a service in the hub's place."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TINKER_", "HF_"))}
    path = [str(directory(name)) for name in names] + [str(ROOT)]
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": "1",
        "HF_ENDPOINT": f"{url}/hub",
        **more,
    }


def run(version: str, url: str, home: Path, act: str, **arguments: Any) -> dict[str, Any]:
    """What an act of the program tells that runs with a release of the SDK.

    Args:
        version: the release.
        url: the service.
        home: where the process keeps what it fetched.
        act: which of the program's.
        **arguments: the act's.
    """
    command = [sys.executable, str(PROGRAM), url, act, json.dumps(arguments)]
    own = environment(url, version, HF_HOME=str(home))
    ended = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"tinker {version}: {act} failed\n{ended.stdout}{ended.stderr}"
    told: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    assert Path(told["file"]).is_relative_to(directory(version))
    return told
