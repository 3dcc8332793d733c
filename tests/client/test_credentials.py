"""Credentials: their sources, the tokens that replace them, and `everstep.auth`."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path

import pytest

import everstep
from everstep.client._transport import credentials
from tests.client.fake_service import GIVE_UP_SECONDS, Answered, FakeService, Refused, Reply

ELSEWHERE = "https://service.invalid"


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("TINKER_API_KEY", "TINKER_CREDENTIAL_CMD", "TINKER_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(credentials, "_STORE", tmp_path / "credentials.json")
    return tmp_path / "credentials.json"


def jwt(**claims: object) -> str:
    payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    return f"eyJhbGciOiJub25lIn0.{payload}.signature"


def token_reply(token: str) -> Answered:
    return Answered(Reply(200, {"jwt": token}))


def sent_keys(fake: FakeService, path: str) -> list[str | None]:
    return [request.headers.get("x-api-key") for request in fake.to(path)]


def rest(fake: FakeService, api_key: str | None = None) -> everstep.RestClient:
    return everstep.RestClient(base_url=fake.url, api_key=api_key)


def test_sources_are_argument_environment_command_store_in_that_order(
    fake: FakeService, monkeypatch: pytest.MonkeyPatch, nothing_configured: Path
) -> None:
    store = {"default": "work", "keys": {"work": {"type": "manual", "key": "tml-stored"}}}
    nothing_configured.write_text(json.dumps(store))
    sources: list[tuple[str, str | None, str | None]] = [("tml-stored", None, None)]
    monkeypatch.setenv("TINKER_CREDENTIAL_CMD", "echo tml-printed")
    sources += [("tml-printed", None, None), ("tml-env", "tml-env", None)]
    sources += [("tml-given", "tml-env", "tml-given")]
    for wanted, environment, given in sources:
        if wanted == "tml-stored":
            monkeypatch.delenv("TINKER_CREDENTIAL_CMD")
        else:
            monkeypatch.setenv("TINKER_CREDENTIAL_CMD", "echo tml-printed")
        if environment:
            monkeypatch.setenv("TINKER_API_KEY", environment)
        client = everstep.ServiceClient(base_url=fake.url, api_key=given)
        client.get_server_capabilities()
        client.close().result(GIVE_UP_SECONDS)
        assert sent_keys(fake, "/get_server_capabilities")[-1] == wanted


def test_only_a_remote_service_needs_a_key(fake: FakeService) -> None:
    with pytest.raises(everstep.TinkerError, match="No API key"):
        everstep.ServiceClient(base_url=ELSEWHERE)
    with pytest.raises(everstep.TinkerError, match="begin with 'tml-'"):
        everstep.ServiceClient(base_url=ELSEWHERE, api_key="sk-else")
    rest(fake).get_server_capabilities().result(GIVE_UP_SECONDS)
    assert sent_keys(fake, "/get_server_capabilities") == [None]


def test_failing_command_raises(fake: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_CREDENTIAL_CMD", "exit 3")
    with pytest.raises(everstep.TinkerError, match="exited with code 3"):
        rest(fake).get_server_capabilities().result(GIVE_UP_SECONDS)


def test_damaged_store_raises(nothing_configured: Path) -> None:
    nothing_configured.write_text("{")
    with pytest.raises(everstep.TinkerError, match=r"credentials\.json can't be read"):
        everstep.ServiceClient(base_url=ELSEWHERE)


def test_requests_carry_tokens_if_the_service_wants_them(fake: FakeService) -> None:
    fake.config = {"pjwt_auth_enabled": True}
    token = jwt(exp=time.time() + 3600, sub="tml:user:1", org_id="2", email="a@b.c")
    fake.script("/auth/token", token_reply(token))
    client = rest(fake, api_key="tml-mine")
    client.list_checkpoints("run").result(GIVE_UP_SECONDS)
    client.list_checkpoints("run").result(GIVE_UP_SECONDS)
    assert sent_keys(fake, "/client/config") == ["tml-mine"]
    assert sent_keys(fake, "/auth/token") == ["tml-mine"]
    assert sent_keys(fake, "/training_runs/run/checkpoints") == [token, token]
    who = client.whoami().result(GIVE_UP_SECONDS)
    assert (who.user_urn, who.org_urn, who.email) == (
        "tml:user:1",
        "tml:organization:2",
        "a@b.c",
    )


def test_rejected_token_is_replaced_and_the_request_resent_once(fake: FakeService) -> None:
    fake.config = {"pjwt_auth_enabled": True}
    first, second = (jwt(exp=time.time() + 3600, n=n) for n in (1, 2))
    fake.script("/auth/token", token_reply(first), token_reply(second))
    invalid = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
    fake.script("/training_runs/run/checkpoints", Refused(401, headers=invalid))
    rest(fake, api_key="tml-b").list_checkpoints("run").result(GIVE_UP_SECONDS)
    assert sent_keys(fake, "/training_runs/run/checkpoints") == [first, second]


def test_expiring_token_is_replaced(fake: FakeService) -> None:
    fake.config = {"pjwt_auth_enabled": True}
    first, second = jwt(exp=time.time() + 5), jwt(exp=time.time() + 3600)
    fake.script("/auth/token", token_reply(first), token_reply(second))
    client = rest(fake, api_key="tml-c")
    client.list_checkpoints("a").result(GIVE_UP_SECONDS)
    client.list_checkpoints("b").result(GIVE_UP_SECONDS)
    assert sent_keys(fake, "/training_runs/b/checkpoints") == [second]


def test_whoami_needs_tokens(fake: FakeService) -> None:
    with pytest.raises(RuntimeError, match="whoami"):
        rest(fake).whoami().result(GIVE_UP_SECONDS)


def test_auth_reports_credentials_without_running_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert not everstep.auth.tinker_has_credentials()
    assert everstep.auth.get_tinker_token() is None
    touched = tmp_path / "ran"
    monkeypatch.setenv("TINKER_CREDENTIAL_CMD", f"touch {touched}")
    assert everstep.auth.tinker_has_credentials()
    assert not touched.exists()
    monkeypatch.setenv("TINKER_API_KEY", "tml-env")
    assert everstep.auth.get_tinker_token() == "tml-env"


def test_auth_checks_access_with_one_request(
    fake: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", fake.url)
    everstep.auth.raise_if_tinker_not_accessible()
    fake.script("/get_server_capabilities", Refused(402), Refused(401))
    with pytest.raises(everstep.BillingError):
        everstep.auth.raise_if_tinker_not_accessible()
    with pytest.raises(everstep.AuthenticationError):
        everstep.auth.raise_if_tinker_not_accessible()
    assert len(fake.to("/get_server_capabilities")) == 3
