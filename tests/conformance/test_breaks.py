"""The checks can fail: services with one fault each, and exactly the checks that detect it.

Each test runs the checks that have to fail, and related ones that have to pass. The last one runs
all checks against many faults at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from everstep.conformance import Result, Target, Verdict, all_checks, chosen, opened, run
from tests.conformance import breaks
from tests.conformance.proxy import Break, Proxy
from tests.conftest import Service

pytestmark = pytest.mark.slow
KEY = "tml-conformance"
RESUME = "exact-resume exact-resume-pending exact-resume-live"

# the fault, the checks that have to fail, related checks that have to pass
CASES: list[tuple[Callable[[], Break], str, str]] = [
    (
        lambda: breaks.drops_optimizer,
        f"{RESUME} optimizer-restored optimizer-of-sampler failed-load",
        "cold-load failed-create",
    ),
    (
        lambda: breaks.always_optimizer,
        "cold-load cold-load-live",
        "exact-resume optimizer-of-sampler",
    ),
    (breaks.Torn, "exact-resume exact-resume-live optimizer-restored", "name-taken"),
    (
        breaks.CollidesKinds,
        "same-name-apart delete-apart optimizer-of-sampler",
        "sampling-of-kinds name-taken",
    ),
    (lambda: breaks.refuses_overwrite, "overwrite", "name-taken unnamed-save"),
    (lambda: breaks.always_overwrites, "name-taken", "overwrite unnamed-save"),
    (lambda: breaks.resolves_deletions, "bad-deletions", "bad-paths delete-apart"),
    (lambda: breaks.deletes_nothing, "delete-apart external-apart", "bad-deletions"),
    (breaks.AppliesTwice, "retried-step retried-save retried-sampler", "failed-operation"),
    (lambda: breaks.LoadsAnything("model_id"), "failed-load", "failed-create failed-operation"),
    (breaks.SamplingLoads, "sampling-leaves-run", "sampler-stays"),
]

# faults that don't interfere, each with its checks and the beginning of their details
TOGETHER: list[tuple[Callable[[], Break], dict[str, str]]] = [
    (lambda: breaks.keeps_old, {"overwrite": "After an overwrite the name does not give the new"}),
    (lambda: breaks.one_unnamed, {"unnamed-save": "Two saves without a name got one path."}),
    (lambda: breaks.ignores_ttl, {"ttl": "ttl_seconds=0 was not refused."}),
    (
        lambda: breaks.forgets_changed_ttl,
        {"ttl-change": "A checkpoint with ttl_seconds is listed without expires_at."},
    ),
    (
        lambda: breaks.samples_anything,
        {"sampling-of-kinds": "A sampler on a path that names nothing was not refused."},
    ),
    (breaks.AcceptsNames, {"bad-names": "A checkpoint could be named ''."}),
    (lambda: breaks.resolves_paths, {"bad-paths": "A run could be created from an invalid path."}),
    (lambda: breaks.hides_flags, {"lora-flags": "weights_info of the checkpoint: train_attn is"}),
    (
        breaks.ConflictsWithItself,
        {
            "retried-save": "A retried save_weights failed.",
            "retried-sampler": "A retried save for sampling failed.",
        },
    ),
    (
        breaks.LeavesGradient,
        {"failed-operation": "A forward_backward with a token outside of the vocabulary failed"},
    ),
    (
        lambda: breaks.LoadsAnything("session_id"),
        {"failed-create": "A run exists although its checkpoint could not be loaded."},
    ),
    (
        breaks.ArrivalOrder,
        {
            "chunk-order": "Chunks were not executed in the order of their seq_id.",
            "gaps-wait": "An operation did not wait for the one before it.",
        },
    ),
    (
        breaks.SamplersFollow,
        {"sampler-stays": "A sampler changed when its run was trained"},
    ),
]


def results(target: Target, names: Sequence[str]) -> dict[str, Result]:
    """Return the results of these checks, or of all of them if none is named."""
    with opened(target) as bench:
        return {result.name: result for result in run(bench, chosen(names))}


def failing(found: dict[str, Result]) -> set[str]:
    """Return the checks that failed. None may end in an error, which would be a missing verdict."""
    details = {name: (r.detail, r.sent, r.came_back) for name, r in found.items() if r.bad}
    errors = {name: details[name] for name, r in found.items() if r.verdict is Verdict.ERROR}
    assert not errors
    return set(details)


@pytest.mark.parametrize(("wrong", "fail", "hold"), CASES, ids=[case[1] for case in CASES])
def test_broken_service_fails_exactly_the_checks_of_its_fault(
    service: Service, wrong: Callable[[], Break], fail: str, hold: str
) -> None:
    with Proxy(service.url, wrong()) as proxy:
        found = results(Target(proxy.url, KEY), [*fail.split(), *hold.split()])
    assert failing(found) == set(fail.split())
    for name in fail.split():
        assert found[name].detail
        assert found[name].sent or found[name].came_back


def test_noise_only_fails_exact_checks_and_is_quantified(
    service: Service,
) -> None:
    hold = "optimizer-restored cold-load chunk-order overwrite"
    with Proxy(service.url, breaks.Noisy(1e-5)) as proxy:
        found = results(Target(proxy.url, KEY), [*RESUME.split(), *hold.split()])
    assert failing(found) == set(RESUME.split())
    for name in RESUME.split():
        assert "values differ, from operation 1 on; logprobs by up to" in found[name].came_back
        assert "two equal runs of this service differ by up to" in found[name].came_back
        by = float(found[name].came_back.partition("up to ")[2].split(",")[0])
        assert 1e-6 < by < 3e-5


def test_service_without_protobuf_is_checked_in_json(service: Service) -> None:
    names = ["exact-resume", "optimizer-restored", "failed-operation", "same-name-apart"]
    with Proxy(service.url, breaks.knows_json_only) as proxy:
        found = results(Target(proxy.url, KEY), names)
    assert {name: result.verdict for name, result in found.items()} == dict.fromkeys(
        names, Verdict.PASS
    )


def test_isolation_of_two_keys_is_checked(service: Service) -> None:
    def isolation(url: str) -> Result:
        return results(Target(url, KEY, "tml-another"), ["isolation"])["isolation"]

    with Proxy(service.url, breaks.Tenants()) as proxy:
        assert isolation(proxy.url).verdict is Verdict.PASS
    with Proxy(service.url, breaks.Tenants(open_to_all="DELETE")) as proxy:
        broken = isolation(proxy.url)
    assert broken.verdict is Verdict.FAIL
    assert broken.detail == "With another key it was possible to delete a checkpoint."
    assert broken.sent.startswith("DELETE ")
    with Proxy(service.url) as proxy:
        assert results(Target(proxy.url, KEY), ["isolation"])["isolation"].verdict is (
            Verdict.NOT_SUPPORTED
        )


@pytest.mark.long(reason="the whole suite of checks against a faulty service")
def test_many_faults_fail_exactly_their_checks(service: Service) -> None:
    with Proxy(service.url, *(wrong() for wrong, _ in TOGETHER)) as proxy:
        found = results(Target(proxy.url, KEY), [])
    expected = {name: text for _, details in TOGETHER for name, text in details.items()}
    assert failing(found) == set(expected)
    for name, text in expected.items():
        assert found[name].detail.startswith(text)


def test_every_check_has_a_failing_service() -> None:
    seen = {name for _, fail, _ in CASES for name in fail.split()}
    seen |= {name for _, details in TOGETHER for name in details} | {"isolation"}
    assert {check.name for check in all_checks()} == seen
