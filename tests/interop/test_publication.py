"""Expiry, publication, copies, sessions and administration, with both clients."""

from __future__ import annotations

import json
import urllib.request
import warnings
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
import tinker

import everstep
from tests.conftest import Service
from tests.interop.sdks import Releases
from tests.scenario import MODEL, connect, train

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SDKS = pytest.mark.parametrize("sdk", [tinker, everstep], ids=["official", "ours"])


def clients(sdk: Any, url: str) -> tuple[Any, Any]:
    service = connect(sdk, url)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return service, service.create_rest_client()


@SDKS
def test_checkpoint_is_published_expired_copied_and_deleted(sdk: Any, service: Service) -> None:
    client, rest = clients(sdk, service.url)
    run = client.create_lora_training_client(
        MODEL, rank=4, seed=1, train_unembed=False, user_metadata={"a": "b"}
    ).result()
    train(sdk, run, 1)
    path = run.save_state("a", user_metadata={"k": "v"}).result().path
    sampler = run.save_weights_for_sampler("a", user_metadata={"k": "s"}).result().path
    losses = train(sdk, run, 1, shift=1)

    def listed_as(of: str) -> Any:
        found = rest.list_checkpoints(of.split("/")[2]).result().checkpoints
        return {each.tinker_path: each for each in found}[of]

    for _ in range(2):
        rest.publish_checkpoint_from_tinker_path(path).result()
        rest.set_checkpoint_ttl_from_tinker_path(path, 3600).result()
    assert (listed_as(path).public, listed_as(path).user_metadata) == (True, {"k": "v"})
    assert listed_as(path).expires_at - datetime.now(UTC) < timedelta(hours=1)
    for _ in range(2):
        rest.unpublish_checkpoint_from_tinker_path(path).result()
        rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    assert (listed_as(path).public, listed_as(path).expires_at) == (False, None)

    copies = {of: rest.copy_weights(of, "p", ttl_seconds=7200).result() for of in (path, sampler)}
    for of, copied in copies.items():
        assert listed_as(copied).user_metadata == listed_as(of).user_metadata
        assert listed_as(copied).checkpoint_type == listed_as(of).checkpoint_type
        assert listed_as(copied).expires_at is not None
        info = rest.get_weights_info_by_tinker_path(copied).result()
        assert (info.train_unembed, info.train_mlp, info.train_attn) == (False, True, True)
    for of in (path, sampler, path):
        rest.delete_checkpoint_from_tinker_path(of).result()
    listed = {each.tinker_path for each in rest.list_user_checkpoints().result().checkpoints}
    assert set(copies.values()) <= listed
    assert not {path, sampler} & listed
    again = client.create_training_client_from_state_with_optimizer(copies[path]).result()
    assert train(sdk, again, 1, shift=1) == losses
    mine = client.create_sampling_client(model_path=copies[sampler]).result()
    assert mine.get_base_model() == MODEL


@SDKS
def test_weights_access_tokens_are_sent_with_every_call_that_takes_one(
    sdk: Any, service: Service
) -> None:
    client, rest = clients(sdk, service.url)
    run = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
    path, other = (run.save_state(name).result().path for name in "ab")
    body = {"tinker_path": path, "ttl_seconds": 3600}
    url = f"{service.url}/api/v1/everstep/weights_access_tokens"
    token = httpx.post(url, json=body).json()["weights_access_token"]
    given = {"weights_access_token": token}
    for key in (token, "tml-another-accounts-key"):
        given = {"weights_access_token": key}
        client.create_training_client_from_state(path, **given).result()
        client.create_training_client_from_state_with_optimizer(path, **given).result()
        run.load_state(path, **given).result()
        rest.copy_weights(path, "p", **given).result()
    given = {"weights_access_token": token}
    calls: list[Callable[[], Any]] = [
        lambda: client.create_training_client_from_state(other, **given).result(),
        lambda: run.load_state_with_optimizer(other, **given).result(),
        lambda: rest.copy_weights(other, "p", **given).result(),
    ]
    for call in calls:
        with pytest.raises(Exception, match="does not open"):
            call()


@SDKS
def test_sessions_are_listed_searched_assigned_and_traced(sdk: Any, service: Service) -> None:
    owner = sdk.ServiceClient(
        base_url=service.url,
        api_key="tml-test",
        user_metadata={"who": sdk.__name__},
        display_name=f"of {sdk.__name__}",
    )
    run = owner.create_lora_training_client(MODEL, rank=4, seed=1).result()
    run.save_state("a").result()
    train(sdk, run, 1)
    session = run.model_id.split(":")[0]
    _, rest = clients(sdk, service.url)
    assert session in rest.list_sessions(limit=1000).result().sessions
    assert rest.get_session(session).result().training_run_ids == [run.model_id]
    rest.assign_session_project(session, "p").result()
    runs = rest.list_training_runs(project_id="p", access_scope="accessible").result()
    assert run.model_id in [each.training_run_id for each in runs.training_runs]
    search = sdk.types.SessionSearchRequest(
        user_metadata={"who": sdk.__name__}, project_ids=["p"], display_name=sdk.__name__
    )
    (found,) = rest.search_sessions(search).result().sessions
    assert (found.session_id, found.checkpoints_count) == (session, 1)
    url = rest.export_session_trace(session).result()
    with urllib.request.urlopen(url) as answer:
        events = json.load(answer)["traceEvents"]
    assert [e["name"] for e in events if e["ph"] == "b"][:2] == ["create_model", "save_weights"]
    owner.close("success").result()
    assert rest.search_sessions(search).result().sessions[0].status.type == "client_finished"


@SDKS
def test_admin_client_reads_audit_log_and_usage(sdk: Any, service: Service) -> None:
    client, rest = clients(sdk, service.url)
    run = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
    path = run.save_state("a").result().path
    copied = rest.copy_weights(path, f"project of {sdk.__name__}").result()
    admin_class = getattr(sdk, "AdminClient", None) or everstep.client.AdminClient
    admin = admin_class(base_url=service.url, api_key="tml-test")
    entries = admin.get_audit_log("checkpoints", day=datetime.now(UTC).date()).result().entries
    mine = [each.event for each in entries if each.tinker_path in (path, copied)]
    assert mine == ["checkpoint_create", "checkpoint_copy"]
    found = admin.get_current_checkpoint_storage_usage(f"project of {sdk.__name__}").result()
    (usage,) = found.data
    assert usage.checkpoint_count == 1
    assert usage.size_bytes > 0
    with pytest.raises(sdk.NotFoundError, match="nothing is billed"):
        admin.get_billing_usage("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z").result()


def test_official_command_line_shows_and_changes_checkpoints(
    service: Service, releases: Releases
) -> None:
    client = connect(tinker, service.url)
    run = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
    path = run.save_state("cli").result().path

    def command(*arguments: str) -> str:
        code, output = releases.command_line(service.url, *arguments)
        return f"{output}\n(exit code {code})"

    assert "Error" not in command("checkpoint", "publish", path)
    assert "Error" not in command("checkpoint", "set-ttl", path, "--ttl", "3600")
    assert "Yes" in command("checkpoint", "info", path)
    assert "nothing is billed" in command("billing", "usage", "2026-01-01", "2026-01-02").replace(
        "\n", " "
    )
    assert "Error" not in command("billing", "checkpoint-storage")
    session = run.model_id.split(":")[0]
    assert "/everstep/traces/" in command(
        "-f", "json", "session", "export-trace", session, "--url-only"
    )
    assert "Error" not in command("checkpoint", "delete", path, "-y")
