"""Releases of the official SDK, each in a directory of its own and in a helper process of its own.

`make sdks` fills the directories. A helper has a release first on its path, and finds the release's
dependencies in the environment of the tests. It imports the release once a session, and forks a
child for every program.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests import helpers

ROOT = Path(__file__).parents[2]
VERSIONS = (Path(__file__).parent / "official_sdks.txt").read_text().split()


def directory(name: str) -> Path:
    """Where a release of the SDK is installed, or a package that only its own test imports."""
    path = Path(sys.prefix) / "sdks" / name
    assert path.is_dir(), f"{path} is missing: run `make sdks`"
    return path


def environment(url: str, *names: str, **more: str) -> dict[str, str]:
    """Return a user's environment, with directories first on the path.

    Args:
        url: the service, which also stands in for the hub.
        *names: directories, as `directory` takes them.
        **more: further variables.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TINKER_", "HF_"))}
    path = [str(directory(name)) for name in names] + [str(ROOT)]
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": "1",
        "HF_ENDPOINT": f"{url}/hub",
        **more,
    }


class Helper:
    """A process that has imported a release of the SDK.

    Args:
        environment: of the process.
        *modules: modules to import.
    """

    def __init__(self, environment: Mapping[str, str], *modules: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.interop.helper", *modules],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        helpers.KEPT.add(self._process.pid)
        self._lock = threading.Lock()

    def run(
        self,
        target: str,
        *,
        argv: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
        **arguments: Any,
    ) -> tuple[int, str]:
        """Call a function in a child of the helper.

        Args:
            target: ``module:function``.
            argv: the child's `sys.argv`.
            environment: added to the child's environment.
            **arguments: the function's, as JSON.

        Returns:
            The child's exit code and output. The last line is the function's result as JSON.
        """
        order = {
            "target": target,
            "arguments": arguments,
            "environment": dict(environment or {}),
            "argv": list(argv),
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        assert answer, "the helper process ended"
        ended = json.loads(answer)
        return int(ended["code"]), str(ended["output"])

    def close(self) -> None:
        """End the process."""
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()
        helpers.KEPT.discard(self._process.pid)


class Releases:
    """The helpers of a session, one a release. Each starts when it is first used.

    Args:
        url: the service that stands in for the hub.
        home: directory for files that the processes fetch.
    """

    def __init__(self, url: str, home: Path) -> None:
        self._url = url
        self._home = home
        self._helpers: dict[str, Helper] = {}

    def helper(self, version: str) -> Helper:
        """Return the helper of a release."""
        if version not in self._helpers:
            own = environment(self._url, version, HF_HOME=str(self._home / version))
            self._helpers[version] = Helper(own, "tinker", "tests.scenario")
        return self._helpers[version]

    def run(self, version: str, target: str, **arguments: Any) -> dict[str, Any]:
        """Call a function with a release of the SDK. Returns its result."""
        code, output = self.helper(version).run(target, **arguments)
        assert code == 0, f"tinker {version}: {target} failed\n{output}"
        result: dict[str, Any] = json.loads(output.splitlines()[-1])
        assert Path(result["file"]).is_relative_to(directory(version))
        return result

    def command_line(self, url: str, *arguments: str) -> tuple[int, str]:
        """Run the newest release's command line. Returns its exit code and output."""
        return self.helper(VERSIONS[-1]).run(
            "tinker.cli.__main__:main",
            argv=("tinker", *arguments),
            environment={"TINKER_BASE_URL": url, "TINKER_API_KEY": "tml-test"},
        )

    def close(self) -> None:
        """End all helpers."""
        for helper in self._helpers.values():
            helper.close()
