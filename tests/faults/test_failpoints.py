"""P3 and P4 at every failpoint: the process is killed there, and no client notices.

The list of failpoints is the registry's, so that a new one is covered by itself.
"""

from __future__ import annotations

import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pyrage
import pytest
import tinker

import everstep
import everstep.runtime.commands
import everstep.server
from everstep import failpoints
from everstep.vault import Vault
from everstep.wire.paths import CheckpointKind, parse_path
from tests.conftest import Service
from tests.faults import test_imports
from tests.faults.cycle import IDENTITY, Looper, Setbacks, uninterrupted
from tests.faults.keeper import Keeper

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
BY_HAND = ("runtime.import.",)
"""Imports are made by hand; `test_imports` kills them."""
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
"""Every step of the service, and how the failpoints in it are called."""
SETTINGS = ("replay_seconds=0.2", "collect_interval_seconds=0.5")
SHARDS = 2
COUNTS = (1, 3, 8) if os.environ.get("EVERSTEP_SOAK") else (1,)
MOST_ROUNDS = 4
SEEDS = {everstep: 11, tinker: 12}


@pytest.mark.parametrize("shard", range(SHARDS))
def test_killed_at_every_failpoint_no_client_notices(
    shard: int, tmp_path: Path, service: Service
) -> None:
    points = [(name, count) for count in COUNTS for name in POINTS[shard::SHARDS]]
    seen = {sdk: [] for sdk in SEEDS}  # type: ignore[var-annotated]

    def arming(start: int) -> dict[str, str]:
        if start == 0 or start > len(points):
            return {}
        name, count = points[start - 1]
        fired(tmp_path, start).mkdir(exist_ok=True)
        return {
            failpoints.VARIABLE: f"{name}=kill@{count}",
            failpoints.ONCE_VARIABLE: str(fired(tmp_path, start)),
        }

    with Keeper(tmp_path / "home", *SETTINGS, environment=arming) as keeper:
        loopers = {sdk: Looper(sdk, keeper.url, seed) for sdk, seed in SEEDS.items()}
        with ThreadPoolExecutor(len(loopers)) as pool:
            for start, (name, count) in enumerate(points, start=1):
                if keeper.starts <= start:
                    keeper.kill()  # the process before this one lives on; this one is armed
                mark = fired(tmp_path, start) / name
                for _ in range(MOST_ROUNDS):
                    rounds = {sdk: pool.submit(each.round) for sdk, each in loopers.items()}
                    if name.startswith("runtime.recover"):
                        setbacks = Setbacks(keeper, loopers.values())
                        while not mark.exists() and wait(rounds.values(), timeout=0.1).not_done:
                            setbacks.next()
                    for sdk, numbers in rounds.items():
                        seen[sdk].append(numbers.result())
                    if mark.exists():
                        break
                else:
                    pytest.fail(f"{name}@{count} was not reached in {MOST_ROUNDS} rounds")
        for looper in loopers.values():
            check_all_listed_load(keeper.home, looper.listed())
            check_lineage(keeper.home, looper)
            looper.close()
    for sdk, seed in SEEDS.items():
        assert seen[sdk] == uninterrupted(sdk, service.url, seed, len(seen[sdk]))


def fired(tmp_path: Path, start: int) -> Path:
    """Where a failpoint that fired leaves its mark."""
    return tmp_path / f"fired-{start}"


def check_all_listed_load(home: Path, paths: list[str], *, external: bool = True) -> None:
    """What is listed can be loaded, and hashes to what its manifest says.

    Args:
        home: of the service.
        paths: what it lists.
        external: whether sealed ones are among them, each of which opens to a plain one.
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
    """Whatever was killed in between, each names the parent that it has without that."""
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


def test_the_registry_knows_the_failpoints_of_every_room() -> None:
    rooms = {name.split(".")[0] for name in failpoints.registered()}
    assert rooms >= {"ledger", "vault", "runtime", "worker"}
    assert all(failpoints.registered().values()), "each says what it means"


@pytest.mark.parametrize("step", STEPS)
def test_every_step_has_failpoints(step: str) -> None:
    assert any(name.startswith(STEPS[step]) for name in POINTS)


def test_no_failpoint_of_the_sources_is_left_out() -> None:
    """One in a module that nothing here imports would not be killed at."""
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
    assert {name for name in known if name.startswith(BY_HAND)} == set(test_imports.POINTS)


@pytest.mark.parametrize("text", ["a", "a=explode", "a=kill@x", "a=error:ENOTHING", "=kill@"])
def test_what_can_not_be_armed_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=failpoints.VARIABLE):
        failpoints.parse(text)


def test_a_failpoint_that_is_not_armed_does_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        failpoints.Failpoint("tests.nothing.happens", "only here")()
