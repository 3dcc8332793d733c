"""Releases of the official SDK from the oldest to the newest, unmodified, on one real service."""

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
from tests.interop.sdks import Releases
from tests.scenario import MODEL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
EVERY_SDK = pytest.mark.parametrize("sdk", sdks.VERSIONS)
NEWEST = sdks.VERSIONS[-1]


EXTERNAL = "0.28"
"""The first release that knows external checkpoints."""


def before(sdk: str) -> list[str]:
    """Return all older releases; for the oldest, the newest."""
    return sdks.VERSIONS[: sdks.VERSIONS.index(sdk)] or [NEWEST]


def knows(sdk: str, since: str) -> bool:
    """Return whether a release is at least as new as another."""
    return Version(sdk) >= Version(since)


Life = Callable[[str], dict[str, Any]]
Restored = Callable[[str], tuple[dict[str, Any], Recorder]]


@pytest.fixture(scope="module")
def life(service: Service, releases: Releases) -> Life:
    """Run `sdk_program.life` with a release, once for all tests."""
    program = "tests.interop.sdk_program:life"
    return cache(lambda sdk: releases.run(sdk, program, url=service.url))


@pytest.fixture(scope="module")
def restored(service: Service, life: Life, releases: Releases) -> Restored:
    """Run `sdk_program.restore` with a release, once. Returns its report and its requests."""

    @cache
    def restore(sdk: str) -> tuple[dict[str, Any], Recorder]:
        paths = [life(other)["path"] for other in before(sdk)]
        listed = life(NEWEST)["model_id"]
        recorder = Recorder()
        with Proxy(service.url, recorder) as proxy:
            program = "tests.interop.sdk_program:restore"
            report = releases.run(sdk, program, url=proxy.url, paths=paths, listed=listed)
        return report, recorder

    return restore


@EVERY_SDK
def test_environment_satisfies_what_a_release_requires(sdk: str) -> None:
    (release,) = distributions(path=[str(sdks.directory(sdk))])
    assert (release.name, release.version) == ("tinker", sdk)
    for line in release.requires or ():
        needed = Requirement(line)
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            assert needed.specifier.contains(version(needed.name)), line


@EVERY_SDK
def test_run_resumes_exactly_in_every_way(sdk: str, life: Life) -> None:
    report = life(sdk)
    assert report["version"] == sdk
    assert (report["model_name"], MODEL in report["models"]) == (MODEL, True)
    assert report["path"] == f"tinker://{report['model_id']}/weights/mid"
    assert report["sampler_path"] == f"tinker://{report['model_id']}/sampler_weights/mid"
    uninterrupted, cold = report["uninterrupted"], report["cold"]
    assert report["warm"] == report["warm_async"] == report["loaded_warm"] == uninterrupted
    assert cold[0] == uninterrupted[0], "the same weights"
    assert cold[1] != uninterrupted[1], "not the same moments"
    assert report["loaded_cold"] == cold


@EVERY_SDK
def test_all_releases_compute_the_same_numbers(sdk: str, life: Life) -> None:
    report, newest = life(sdk), life(NEWEST)
    for numbers in ("first", "uninterrupted", "cold", "samples"):
        assert report[numbers] == newest[numbers]
    assert report["passes"] == newest["passes"]


@EVERY_SDK
def test_samplers_agree_and_passes_are_chunked(sdk: str, life: Life) -> None:
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
def test_lists_show_checkpoints_until_they_are_deleted(sdk: str, life: Life) -> None:
    report = life(sdk)
    lists = report["lists"]
    assert lists["weights_info"] == [MODEL, True, 4]
    assert lists["run_listed"]
    assert lists["run"] == report["path"]
    external = {report["downloads"]["external_path"]} if knows(sdk, EXTERNAL) else set()
    saved = {report["path"], report["sampler_path"], *external}
    assert set(lists["checkpoints"]) == saved
    assert saved <= set(lists["user_checkpoints"])
    assert lists["sessions"] >= 1
    assert set(lists["left"]) == saved - {report["sampler_path"]}


@EVERY_SDK
def test_downloads_match_the_saved_files(sdk: str, life: Life) -> None:
    """A release fetches a tar or external weights; some fetch both."""
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
def test_release_resumes_from_checkpoints_of_other_releases(
    sdk: str, life: Life, restored: Restored
) -> None:
    report, _ = restored(sdk)
    for other, (warm, cold) in zip(before(sdk), report["continued"], strict=True):
        assert warm == life(other)["uninterrupted"], f"warm, from {other}"
        assert cold == life(other)["cold"], f"cold, from {other}"


@EVERY_SDK
def test_release_uses_the_newest_protocol_that_it_knows(sdk: str, restored: Restored) -> None:
    report, requests = restored(sdk)
    assert bool(requests.of("/client/config")) == knows(sdk, "0.18")
    # Passes are sent as protobuf, a forward without gradients as well.
    protobuf = {call.training_pass is not None for call in requests.of("/forward_backward")}
    assert protobuf == {knows(sdk, "0.19")}
    assert len(requests.of("/forward")) == (not knows(sdk, "0.22.3"))
    # Results are requested as protobuf.
    accepted = {"protobuf" in call.accept for call in requests.of("/retrieve_future")}
    assert (True in accepted) == knows(sdk, "0.19")
    # A run is restored by one request, not three.
    calls = [len(requests.of(f"/{path}")) for path in ("load_weights", "create_model")]
    restores = 2 * len(report["continued"]) + 1
    assert calls == [restores, 0 if knows(sdk, "0.24.1") else restores]


@EVERY_SDK
def test_external_checkpoints_are_listed_to_releases_that_know_them(
    sdk: str, life: Life, restored: Restored
) -> None:
    """An older release can't parse a list that has an external checkpoint in it."""
    newest, (report, _) = life(NEWEST), restored(sdk)
    external = newest["downloads"]["external_path"]
    assert newest["path"] in report["checkpoints"]
    assert (external in report["checkpoints"]) == knows(sdk, EXTERNAL)
    assert (external in report["user_checkpoints"]) == knows(sdk, EXTERNAL)
