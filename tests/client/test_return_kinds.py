"""Every public call of the official SDK, on both clients: the same kind of result or error."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import tinker

import everstep
from tests.client.fake_service import GIVE_UP_SECONDS, MODEL, FakeService

pytestmark = pytest.mark.filterwarnings("ignore")
T = GIVE_UP_SECONDS
RUN, PATH = "session-0:train:0", "tinker://session-0:train:0/weights/a"
NOT_CALLED = {
    "close": "ends the client",
    "from_sampler_handle": "made by a handle of one SDK",
    "create": "a static method of the clients' own session",
    "on_queue_state_change": "called by the client, with its own enumeration",
    "get_tokenizer": "needs a tokenizer",
    "export_session_trace": "waits for a file",
    "whoami": "needs a token",
}
OPTIONAL = [("RestClient", "get_telemetry"), ("AdminClient", "get_telemetry")]
"""Ours has telemetry of sessions only, and None is a result of theirs as well."""


def loss(data: Any, logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
    return sum((row * row).sum() for row in logprobs), {}


def traced(logprobs: Any) -> tuple[Any, dict[str, Any]]:
    return logprobs.sum(), {"custom/a:sum": logprobs.sum()}


def arguments_of(sdk: Any, name: str, method: Any) -> dict[str, Any]:
    """Return arguments for the parameters of a method that have no default."""
    kinds = sdk.types
    tokens = kinds.ModelInput.from_ints([1, 2])
    known: dict[str, Any] = {
        "base_model": MODEL,
        "path": PATH,
        "model_path": "tinker://session-0:train:0/sampler_weights/s",
        "tinker_path": PATH,
        "name": "a",
        "data": [kinds.Datum(model_input=tokens, loss_fn_inputs={"target_tokens": [1, 2]})],
        "loss_fn": loss if "custom" in name else "cross_entropy",
        "fn": traced,
        "input_ranks": {"logprobs": 1},
        "prompt": tokens,
        "num_samples": 1,
        "sampling_params": kinds.SamplingParams(max_tokens=1),
        "training_run_id": RUN,
        "checkpoint_id": "weights/a",
        "session_id": "session-0",
        "sampler_id": "session-0:sample:0",
        "project_id": "p",
        "ttl_seconds": 3600,
        "starting_on": "2026-01-01T00:00:00Z",
        "ending_before": "2026-01-02T00:00:00Z",
        "request": kinds.SessionSearchRequest() if "sessions" in name else None,
    }
    wanted = inspect.signature(method).parameters.values()
    chosen = {p.name: known[p.name] for p in wanted if p.default is p.empty}
    if "optim_step" in name:
        chosen["optim_params"] = kinds.AdamParams(learning_rate=0.1)
    if "destination_project_id" in inspect.signature(method).parameters:
        chosen["destination_project_id"] = "p"
    if name.startswith("create_sampling_client"):
        chosen = {"model_path": known["model_path"]}
    return chosen


class Clients:
    """All clients of one SDK, of one scripted service."""

    def __init__(self, sdk: Any, fake: FakeService) -> None:
        self.sdk = sdk
        service = sdk.ServiceClient(base_url=fake.url, api_key="tml-test", project_id="p")
        run = service.create_lora_training_client(MODEL).result(T)
        self.of = {
            "ServiceClient": service,
            "TrainingClient": run,
            "SamplingClient": run.save_weights_and_get_sampling_client().result(T),
            "RestClient": sdk.RestClient(base_url=fake.url, api_key="tml-test"),
            "AdminClient": sdk.AdminClient(base_url=fake.url, api_key="tml-test"),
        }

    def kinds(self, client: str, name: str) -> list[str]:
        """Call a method. Returns what came of it: its kind, and that of its result or error."""
        method = getattr(self.of[client], name)
        given = arguments_of(self.sdk, name, method)
        try:
            found = method(**given)
        except Exception as error:  # noqa: BLE001  the errors are compared
            return [f"raises {type(error).__name__}"]
        if inspect.iscoroutine(found):
            try:
                return ["coroutine", *self._of_result(asyncio.run(asyncio.wait_for(found, T)))]
            except Exception as error:  # noqa: BLE001  as above
                return ["coroutine", f"raises {type(error).__name__}"]
        return self._of_result(found)

    def _of_result(self, found: Any) -> list[str]:
        if not isinstance(found, self.sdk.APIFuture):
            return [f"value {type(found).__name__}"]
        kind = "future"
        kind += ", of the standard library too" * isinstance(found, concurrent.futures.Future)
        try:
            return [kind, type(found.result(T)).__name__]
        except Exception as error:  # noqa: BLE001  as above
            return [kind, f"raises {type(error).__name__}"]


def public_calls() -> list[tuple[str, str]]:
    clients = ("ServiceClient", "TrainingClient", "SamplingClient", "RestClient", "AdminClient")
    return [
        (client, name)
        for client in clients
        for name, value in inspect.getmembers(getattr(tinker, client), inspect.isroutine)
        if not name.startswith("_")
        and name.removesuffix("_async") not in NOT_CALLED
        and (client, name) not in OPTIONAL
    ]


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[Clients, Clients]]:
    with FakeService() as one, FakeService() as other, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = Clients(everstep, one), Clients(tinker, other)
        yield ours, theirs
        for clients in (ours, theirs):
            clients.of["ServiceClient"].close("success").result(T)


@pytest.mark.parametrize(("client", "name"), public_calls())
def test_calls_return_what_the_official_sdk_returns(
    both: tuple[Clients, Clients], client: str, name: str
) -> None:
    ours, theirs = both
    assert ours.kinds(client, name) == theirs.kinds(client, name)


@pytest.mark.parametrize("sdk", [everstep, tinker], ids=["ours", "theirs"])
def test_closed_client_takes_no_call(sdk: Any) -> None:
    with FakeService() as fake:
        service = sdk.ServiceClient(base_url=fake.url, api_key="tml-test")
        service.create_lora_training_client(MODEL).result(T)
        service.close("success").result(T)
        service.close("success").result(T)
        with pytest.raises(RuntimeError, match="closed"):
            service.create_lora_training_client(MODEL)
        with pytest.raises(RuntimeError, match="closed"):
            service.get_server_capabilities()
        with pytest.raises(RuntimeError, match="closed"), service:
            pass


@pytest.mark.parametrize("sdk", [everstep, tinker], ids=["ours", "theirs"])
@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError, "errored"), (KeyboardInterrupt, "interrupted"), (SystemExit, "interrupted")],
)
def test_block_that_raises_ends_the_session_with_its_status(
    sdk: Any, error: type[BaseException], status: str
) -> None:
    with FakeService() as fake:
        with (
            pytest.raises(error),
            sdk.ServiceClient(base_url=fake.url, api_key="tml-test") as service,
        ):
            service.create_lora_training_client(MODEL).result(T)
            raise error
        (ended,) = [each.body for each in fake.requests if each.path.endswith("/finish")]
        assert ended["reason"]["type"] == status
