"""The pytest plugin, used as a project does that has everstep installed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points

import pytest

from tests.conftest import Service

pytest_plugins = ["pytester"]

STEP = """
import everstep

def step(client):
    datum = everstep.Datum(
        model_input=everstep.ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={"target_tokens": [2, 3, 4], "weights": [1.0, 1.0, 1.0]},
    )
    passed = client.forward_backward([datum], "cross_entropy")
    client.optim_step(everstep.AdamParams(learning_rate=0.005)).result()
    return passed.result().metrics["loss:sum"]
"""


Run = Callable[..., pytest.RunResult]


@pytest.fixture
def run(pytester: pytest.Pytester) -> Run:
    """Runs pytest in a process of its own, with the plugin loaded by name if it isn't installed."""
    registered = any(point.name == "everstep" for point in entry_points(group="pytest11"))

    def run(*arguments: str) -> pytest.RunResult:
        named = () if registered else ("-p", "everstep.pytest_plugin")
        return pytester.runpytest_subprocess(*named, *arguments)

    return run


@pytest.mark.slow
def test_session_shares_one_service_and_tests_get_own_clients(
    pytester: pytest.Pytester, run: Run
) -> None:
    pytester.makepyfile(
        STEP
        + """
from pathlib import Path
seen = []

def test_it_learns(everstep_training_client, everstep_service):
    seen.append((everstep_service.url, everstep_training_client.model_id))
    losses = [step(everstep_training_client) for _ in range(3)]
    assert losses[2] < losses[0]
    assert (everstep_service.home / "ledger.sqlite").exists()

def test_service_is_shared_and_session_is_not(
    everstep_service, everstep_client, everstep_new_run, everstep_rest_client
):
    first, second = (everstep_new_run(rank=4, seed=7) for _ in range(2))
    url, other = seen[0]
    assert url == everstep_service.url == everstep_client.base_url
    assert first.model_id.split(":")[0] == second.model_id.split(":")[0] != other.split(":")[0]
    assert step(first) == step(second)
    path = first.save_state("a").result().path
    listed = everstep_rest_client.list_checkpoints(first.model_id).result().checkpoints
    assert [each.tinker_path for each in listed] == [path]
"""
    )
    run().assert_outcomes(passed=2)


@pytest.mark.slow
def test_url_option_names_another_service(
    pytester: pytest.Pytester, run: Run, service: Service
) -> None:
    pytester.makepyfile(
        STEP
        + f"""
def test_it(everstep_training_client, everstep_service):
    assert everstep_service.url == {service.url!r} and everstep_service.home is None
    assert step(everstep_training_client) > 0
"""
    )
    run("--everstep-url", service.url).assert_outcomes(passed=1)


def test_base_model_is_configured_in_ini(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makeini("[pytest]\neverstep_base_model = acme/tiny\n")
    pytester.makepyfile(
        "def test_it(everstep_service): assert everstep_service.base_model == 'acme/tiny'"
    )
    run("--everstep-url", "http://127.0.0.1:1").assert_outcomes(passed=1)


def test_options_are_in_the_help(run: Run) -> None:
    out = run("--help").stdout.str()
    assert "--everstep-url" in out and "--everstep-model" in out and "everstep_base_model" in out


def test_plugin_imports_nothing_heavy_at_start() -> None:
    heavy = ("torch", "transformers", "httpx", "fastapi", "pydantic", "everstep.client")
    code = f"import sys, everstep.pytest_plugin; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
