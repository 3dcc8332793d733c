"""P3 and P4 at every failpoint: the process is killed there, and no client notices.

The list of failpoints is the registry's, so a new one is covered without a change here. Every
commit kills a one-process service at all of them, and real processes at a tenth of them, which
the commit's hash chooses. `make soak` kills real processes at all of them.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyrage
import pytest
import tinker

import everstep
import everstep.server.app
import everstep.worker.commands
from everstep import failpoints
from everstep.failpoints import Failpoint
from everstep.testing.nursery import Nursery
from everstep.vault import Vault
from everstep.wire.paths import CheckpointKind, parse_path
from tests.conftest import Service
from tests.faults import test_deletions, test_imports
from tests.faults.cycle import IDENTITY, Looper, Setbacks, uninterrupted
from tests.faults.keeper import Keeper
from tests.faults.one_process import LOADED, OneProcessKeeper
from tests.faults.rotation import SOAK, share_of_commit

BY_HAND = ("runtime.import.", "runtime.deletion.", "ledger.compaction.")
"""`test_imports` kills imports, `test_deletions` deletions of runs, and
``tests/ledger/test_compaction.py`` compactions; a looper makes none."""
POINTS = [name for name in failpoints.registered() if not name.startswith(BY_HAND)]
STEPS = {
    "accept": "runtime.accept.",
    "execute": "runtime.execute.",
    "snapshot": "runtime.snapshot.",
    "save": "runtime.save.",
    "load": "runtime.load.",
    "delete": "runtime.delete.",
    "collect": "vault.collect.",
    "recover": "runtime.recover.",
}
"""Every step of the service, and the prefix of its failpoints."""
SETTINGS = {"replay_seconds": 0.2, "collect_interval_seconds": 0.5}
COUNTS = (1, 3, 8) if SOAK else (1,)
MAX_ROUNDS = 4
SEEDS = {everstep: 11, tinker: 12}
Arming = Callable[[int], Mapping[str, str]]


class Sweep:
    """Kills a service at failpoints, one after the other, while clients go round.

    Args:
        points: the failpoints, each with the n-th call at which it kills.
        directory: where a failpoint that fired leaves its mark.
    """

    def __init__(self, points: Sequence[tuple[str, int]], directory: Path) -> None:
        self.points = points
        self._directory = directory
        self._armed: tuple[str, int] | None = None

    def mark(self, point: tuple[str, int]) -> Path:
        """The file that exists once a failpoint has fired."""
        directory = self._directory / f"fired-{point[1]}"
        directory.mkdir(exist_ok=True)
        return directory / point[0]

    def arming(self, start: int) -> dict[str, str]:
        """Return a start's environment: it arms the first failpoint that has not fired."""
        left = [point for point in self.points if not self.mark(point).exists()]
        self._armed = left[0] if start > 0 and left else None
        if self._armed is None:
            return {}
        name, count = self._armed
        return {
            failpoints.VARIABLE: f"{name}=kill@{count}",
            failpoints.ONCE_VARIABLE: str(self.mark(self._armed).parent),
        }

    def run(self, keeper: Keeper, loopers: Mapping[Any, Looper]) -> dict[Any, list[Any]]:
        """Have every failpoint fire; returns what the clients observed, a list a round."""
        seen: dict[Any, list[Any]] = {sdk: [] for sdk in loopers}
        with ThreadPoolExecutor(len(loopers)) as pool:
            for point in self.points:
                for _ in range(MAX_ROUNDS):
                    if self.mark(point).exists():
                        break
                    if self._armed != point:
                        keeper.kill()  # this process was armed with another; the next is with this
                    rounds = {sdk: pool.submit(each.round) for sdk, each in loopers.items()}
                    if point[0].startswith("runtime.recover"):
                        setbacks = Setbacks(keeper, loopers.values())
                        pending = rounds.values()
                        while not self.mark(point).exists() and wait(pending, 0.1).not_done:
                            setbacks.next()
                    for sdk, numbers in rounds.items():
                        seen[sdk].append(numbers.result())
                assert self.mark(point).exists(), f"{point} wasn't reached in {MAX_ROUNDS} rounds"
        return seen

    def check(self, keeper: Keeper, url: str) -> None:
        """Sweep, then compare everything with what a service gives that isn't killed.

        Args:
            keeper: of the service that is killed; it was given `arming`.
            url: the other service.
        """
        with keeper:
            loopers = {sdk: Looper(sdk, keeper.url, seed) for sdk, seed in SEEDS.items()}
            seen = self.run(keeper, loopers)
            for looper in loopers.values():
                check_all_listed_load(keeper.home, looper.listed())
                check_lineage(keeper.home, looper)
                looper.close()
        assert all(seen.values())
        for sdk, seed in SEEDS.items():
            assert seen[sdk] == uninterrupted(sdk, url, seed, len(seen[sdk]))


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield stack.enter_context(Nursery(LOADED))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.long(reason="a start of the service and a round of two clients for 30 failpoints")
def test_service_killed_at_every_failpoint_loses_nothing(tmp_path: Path, nursery: Nursery) -> None:
    sweep = Sweep([(name, count) for count in COUNTS for name in POINTS], tmp_path)
    keeper = OneProcessKeeper(nursery, tmp_path / "home", SETTINGS, sweep.arming)
    # One thread for both: another number of them may change the last bits.
    with OneProcessKeeper(nursery, tmp_path / "calm", {}, lambda start: {}) as calm:
        sweep.check(keeper, calm.url)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.long(reason="starts of real services and workers, one or two a failpoint")
def test_processes_killed_at_the_commits_failpoints_lose_nothing(
    tmp_path: Path, service: Service
) -> None:
    points = share_of_commit(POINTS, 10, "failpoints")
    sweep = Sweep([(name, count) for count in COUNTS for name in points], tmp_path)
    settings = [f"{name}={value}" for name, value in SETTINGS.items()]
    sweep.check(Keeper(tmp_path / "home", *settings, environment=sweep.arming), service.url)


def check_all_listed_load(home: Path, paths: list[str], *, external: bool = True) -> None:
    """Check that listed checkpoints can be read and hash to what their manifests say.

    Args:
        home: the service's home directory.
        paths: the checkpoints that it lists.
        external: whether encrypted ones are among them, each with an unencrypted counterpart.
    """
    vault = Vault(home / "vault", writer=False)
    found = {}
    for path in paths:
        parsed = parse_path(path)
        manifest = vault.manifest(str(parsed.kind), parsed.run_id, parsed.name)
        found[path] = {name: bytes(vault.read(manifest, name)) for name in manifest.files}
    sealed = {path: files for path, files in found.items() if "/sealed" in path}
    assert found and bool(sealed) == external
    for path, files in sealed.items():
        opened = {n.removesuffix(".age"): pyrage.decrypt(d, [IDENTITY]) for n, d in files.items()}
        assert opened == found[path.replace("/sealed", "/plain")]


def check_lineage(home: Path, looper: Looper) -> None:
    """Check that every checkpoint names the parent that it has without any kill."""
    vault = Vault(home / "vault", writer=False)
    saved = f"tinker://{looper.run.model_id}/weights/s"
    for path in looper.listed():
        at = parse_path(path)
        number = int("".join(filter(str.isdigit, at.name)) or 0)  # of the round
        if path in looper.copies:
            expected = [saved + str(number)]
        elif at.kind == CheckpointKind.TRAINING:
            expected = [saved + str(number - 1)] if number else []
        else:
            expected = [saved + str(number)]
        assert vault.manifest(str(at.kind), at.run_id, at.name).parents == expected, path


def test_registry_has_failpoints_of_every_room() -> None:
    rooms = {name.split(".")[0] for name in failpoints.registered()}
    assert rooms >= {"ledger", "vault", "runtime", "worker"}
    assert all(failpoints.registered().values()), "each has a meaning"


@pytest.mark.parametrize("step", STEPS)
def test_every_step_has_failpoints(step: str) -> None:
    assert any(name.startswith(STEPS[step]) for name in POINTS)


def test_registry_has_every_failpoint_of_the_sources() -> None:
    """A failpoint in a module that is not imported here would never be tested."""
    sources = Path(everstep.__file__).parent
    made = re.compile(r"= Failpoint\(\s*\"([a-z_.]+)\"")
    found = {
        name
        for path in sources.rglob("*.py")
        if path.name != "failpoints.py"
        for name in made.findall(path.read_text(encoding="utf-8"))
    }
    known = {name for name in failpoints.registered() if not name.startswith("tests.")}
    assert found == known
    assert {name for name in known if name.startswith(BY_HAND)} == {
        *test_imports.POINTS,
        *test_deletions.POINTS,
        "ledger.compaction.copied",
        "ledger.compaction.moved",
    }


@pytest.mark.parametrize("text", ["a", "a=explode", "a=kill@x", "a=error:ENOTHING", "=kill@"])
def test_invalid_arming_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=failpoints.VARIABLE):
        failpoints.parse(text)


def test_failpoint_fires_at_its_nth_call_and_only_if_armed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(failpoints.ONCE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(failpoints, "_registry", {})
    monkeypatch.setattr(failpoints, "_armings", {})
    unarmed, armed = Failpoint("tests.unarmed", "here"), Failpoint("tests.armed", "here")
    failpoints.arm("tests.armed=error:ENOSPC@2;tests.later=error:EIO")
    later = Failpoint("tests.later", "created after it was armed")
    for _ in range(3):
        unarmed()
    armed()
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match=r"tests\.armed") as caught:
        armed()
    assert caught.value.errno == errno.ENOSPC
    armed()
    with pytest.raises(OSError, match=r"tests\.later"):
        later()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tests.armed", "tests.later"]
