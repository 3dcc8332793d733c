"""Pytest fixtures: a real service and its clients, in the seconds that it takes to start.

Pytest loads this module wherever everstep is installed. It imports and starts nothing before a test
requests a fixture. The service is one child process, shared by all tests of a session (of a worker,
under pytest-xdist), with its home in the tests' temporary directory.

    def test_loss_decreases(everstep_training_client):
        ...

Options: ``--everstep-url`` (a running service), ``--everstep-model`` (a model to serve in addition
to ``everstep/pico``). ``everstep_base_model`` in the configuration is the model of new runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from everstep.client import RestClient, ServiceClient, TrainingClient

_API_KEY = "tml-pytest"
_PICO = "everstep/pico"


@dataclass(frozen=True)
class EverstepService:
    """A service for tests.

    Attributes:
        url: its ``base_url``, for this client and the official one.
        api_key: a valid key.
        base_model: of new runs.
        home: its home directory. None: it runs elsewhere.
    """

    url: str
    api_key: str
    base_model: str
    home: Path | None


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the plugin's options."""
    group = parser.getgroup("everstep", "a training service for tests")
    group.addoption(
        "--everstep-url",
        metavar="URL",
        help="use this running service instead of starting one; its key is TINKER_API_KEY",
    )
    group.addoption(
        "--everstep-model",
        metavar="NAME=PATH",
        action="append",
        default=[],
        help=f"serve this model in addition to {_PICO}; may be repeated",
    )
    parser.addini("everstep_base_model", "base model of new runs", default=_PICO)


@pytest.fixture(scope="session")
def everstep_service(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EverstepService]:
    """The service that all tests of the session share."""
    from everstep.client import ServiceClient

    base_model = str(pytestconfig.getini("everstep_base_model"))
    url = pytestconfig.getoption("--everstep-url")
    if url is not None:
        key = os.environ.get("TINKER_API_KEY", _API_KEY)
        yield EverstepService(url, key, base_model, None)
        return
    home = tmp_path_factory.mktemp("everstep") / "home"
    models = pytestconfig.getoption("--everstep-model")
    with ServiceClient(base_url="local", home=home, models=models, api_key=_API_KEY) as service:
        yield EverstepService(service.base_url, _API_KEY, base_model, home)


@pytest.fixture
def everstep_client(everstep_service: EverstepService) -> Iterator[ServiceClient]:
    """A client with its own session, which ends with the test."""
    from everstep.client import ServiceClient

    with ServiceClient(base_url=everstep_service.url, api_key=everstep_service.api_key) as client:
        yield client


@pytest.fixture
def everstep_rest_client(everstep_client: ServiceClient) -> RestClient:
    """A client for runs and checkpoints."""
    return everstep_client.create_rest_client()


@pytest.fixture
def everstep_new_run(
    everstep_service: EverstepService, everstep_client: ServiceClient
) -> Callable[..., TrainingClient]:
    """Creates training clients: ``everstep_new_run(rank=4, seed=1)``."""

    def new_run(**arguments: Any) -> TrainingClient:
        own: dict[str, Any] = {"base_model": everstep_service.base_model, "rank": 8, "seed": 0}
        return everstep_client.create_lora_training_client(**(own | arguments)).result()

    return new_run


@pytest.fixture
def everstep_training_client(everstep_new_run: Callable[..., TrainingClient]) -> TrainingClient:
    """A new run of rank 8."""
    return everstep_new_run()
