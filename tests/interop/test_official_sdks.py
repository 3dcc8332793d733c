"""Official SDKs of every age, unmodified, each in a process of its own, on one real service."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.metadata import distributions, version
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.conformance.proxy import Proxy, Recorder
from tests.conftest import Service
from tests.interop import sdks
from tests.scenario import MODEL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
EVERY_SDK = pytest.mark.parametrize("sdk", sdks.VERSIONS)
NEWEST = sdks.VERSIONS[-1]


EXTERNAL = "0.28"
"""The first release that knows external checkpoints."""


def before(sdk: str) -> list[str]:
    """All older releases; the newest, of the oldest."""
    return sdks.VERSIONS[: sdks.VERSIONS.index(sdk)] or [NEWEST]


def knows(sdk: str, since: str) -> bool:
    """Whether a release has what came with another."""
    return Version(sdk) >= Version(since)


Life = Callable[[str], dict[str, Any]]
Restored = Callable[[str], tuple[dict[str, Any], Recorder]]


@pytest.fixture(scope="module")
def life(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Life:
    """What became of a release's run, which is lived once."""
    home = tmp_path_factory.mktemp("hub")
    return cache(lambda sdk: sdks.run(sdk, service.url, home / sdk, "life"))


@pytest.fixture(scope="module")
def restored(service: Service, life: Life, tmp_path_factory: pytest.TempPathFactory) -> Restored:
    """How a release went on from checkpoints of others, and the requests that it sent."""

    home = tmp_path_factory.mktemp("hub")

    @cache
    def restore(sdk: str) -> tuple[dict[str, Any], Recorder]:
        paths = [life(other)["path"] for other in before(sdk)]
        listed = life(NEWEST)["model_id"]
        recorder = Recorder()
        with Proxy(service.url, recorder) as proxy:
            told = sdks.run(sdk, proxy.url, home / sdk, "restore", paths=paths, listed=listed)
        return told, recorder

    return restore


@EVERY_SDK
def test_what_a_release_needs_is_what_it_runs_with(sdk: str) -> None:
    (release,) = distributions(path=[str(sdks.directory(sdk))])
    assert (release.name, release.version) == ("tinker", sdk)
    for line in release.requires or ():
        needed = Requirement(line)
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            assert needed.specifier.contains(version(needed.name)), line


@EVERY_SDK
def test_a_run_is_created_trained_saved_and_restored(sdk: str, life: Life) -> None:
    told = life(sdk)
    assert told["version"] == sdk
    assert (told["model_name"], MODEL in told["models"]) == (MODEL, True)
    assert told["path"] == f"tinker://{told['model_id']}/weights/mid"
    assert told["sampler_path"] == f"tinker://{told['model_id']}/sampler_weights/mid"
    uninterrupted, cold = told["uninterrupted"], told["cold"]
    assert told["warm"] == told["warm_async"] == told["loaded_warm"] == uninterrupted
    assert cold[0] == uninterrupted[0], "the same weights"
    assert cold[1] != uninterrupted[1], "not the same moments"
    assert told["loaded_cold"] == cold


@EVERY_SDK
def test_all_releases_compute_the_same(sdk: str, life: Life) -> None:
    told, newest = life(sdk), life(NEWEST)
    for numbers in ("first", "uninterrupted", "cold", "samples"):
        assert told[numbers] == newest[numbers]
    assert told["passes"] == newest["passes"]


@EVERY_SDK
def test_samples_and_passes(sdk: str, life: Life) -> None:
    named, unnamed = life(sdk)["samples"]["draws"]
    assert named == unnamed
    assert [len(tokens) for tokens, _ in named] == [8, 8]
    scores, again = life(sdk)["samples"]["scores"]
    assert scores == again
    assert (scores[0], len(scores)) == (None, 4)
    passes = life(sdk)["passes"]
    assert (passes["many"], passes["custom_seen"]) == (1025, 3.0)
    assert passes["apart"] < 1e-6


@EVERY_SDK
def test_lists_and_deletions(sdk: str, life: Life) -> None:
    told = life(sdk)
    lists = told["lists"]
    assert lists["weights_info"] == [MODEL, True, 4]
    assert lists["run_listed"]
    assert lists["run"] == told["path"]
    external = {told["downloads"]["external_path"]} if knows(sdk, EXTERNAL) else set()
    saved = {told["path"], told["sampler_path"], *external}
    assert set(lists["checkpoints"]) == saved
    assert saved <= set(lists["user_checkpoints"])
    assert lists["sessions"] >= 1
    assert set(lists["left"]) == saved - {told["sampler_path"]}


@EVERY_SDK
def test_downloads_are_what_was_saved(sdk: str, life: Life) -> None:
    """As a tar where a release asks for one, else as external weights; some have both."""
    downloads, newest = life(sdk)["downloads"], life(NEWEST)["downloads"]["external"]
    assert set(newest) == {"adapter_config.json", "adapter_model.safetensors"}
    assert (downloads["archive"] is not None) == (not knows(sdk, "0.35"))
    assert (downloads["external"] is not None) == knows(sdk, EXTERNAL)
    if downloads["archive"] is not None:
        assert "checkpoint_complete" in downloads["archive"]
        assert newest.items() <= {**downloads["archive"]}.items()
    if downloads["external"] is not None:
        assert downloads["external"] == newest


@EVERY_SDK
def test_tokenizers_come_from_the_service(sdk: str, life: Life) -> None:
    own = list(b"Every step")
    assert life(sdk)["tokens"] == [own] * (2 if knows(sdk, "0.12") else 1)


@EVERY_SDK
def test_a_release_goes_on_from_checkpoints_of_others(
    sdk: str, life: Life, restored: Restored
) -> None:
    told, _ = restored(sdk)
    for other, (warm, cold) in zip(before(sdk), told["continued"], strict=True):
        assert warm == life(other)["uninterrupted"], f"warm, from {other}"
        assert cold == life(other)["cold"], f"cold, from {other}"


@EVERY_SDK
def test_a_release_takes_the_best_path_that_it_knows(sdk: str, restored: Restored) -> None:
    told, requests = restored(sdk)
    assert bool(requests.of("/client/config")) == knows(sdk, "0.18")
    # Passes are written in protobuf, one that computes no gradient too.
    protobuf = {call.training_pass is not None for call in requests.of("/forward_backward")}
    assert protobuf == {knows(sdk, "0.19")}
    assert len(requests.of("/forward")) == (not knows(sdk, "0.22.3"))
    # Their results are read in protobuf.
    accepted = {"protobuf" in call.accept for call in requests.of("/retrieve_future")}
    assert (True in accepted) == knows(sdk, "0.19")
    # A run is restored in one call, not in three.
    calls = [len(requests.of(f"/{path}")) for path in ("load_weights", "create_model")]
    restores = 2 * len(told["continued"]) + 1
    assert calls == [restores, 0 if knows(sdk, "0.24.1") else restores]


@EVERY_SDK
def test_external_checkpoints_are_listed_to_those_that_know_them(
    sdk: str, life: Life, restored: Restored
) -> None:
    """Another release's list would be unreadable as a whole."""
    newest, (told, _) = life(NEWEST), restored(sdk)
    external = newest["downloads"]["external_path"]
    assert newest["path"] in told["checkpoints"]
    assert (external in told["checkpoints"]) == knows(sdk, EXTERNAL)
    assert (external in told["user_checkpoints"]) == knows(sdk, EXTERNAL)
