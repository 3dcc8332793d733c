"""Addresses: URLs of any host and id, and loopback addresses that no proxy is asked for."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.addresses import (
    connectable,
    exempt_loopback,
    http_url,
    is_loopback,
    route,
    without_proxies,
)

PROXY = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8055"),
        ("::1", "http://[::1]:8055"),
        ("fe80::1%eth0", "http://[fe80::1%25eth0]:8055"),
        ("example.org", "http://example.org:8055"),
    ],
)
def test_ipv6_host_is_bracketed_in_a_url(host: str, url: str) -> None:
    assert http_url(host, 8055) == url


@pytest.mark.parametrize(
    ("host", "reached"),
    [("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("::0", "::1"), ("10.1.2.3", "10.1.2.3"), ("a", "a")],
)
def test_service_on_all_addresses_is_reached_by_loopback(host: str, reached: str) -> None:
    assert connectable(host) == reached


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.8.9.1", "::1", "localhost", "LOCALHOST.", "a.localhost", "::ffff:127.0.0.1"],
)
def test_loopback_is_recognised(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", [None, "", "10.0.0.1", "example.org", "localhost.example.org"])
def test_other_host_is_not_loopback(host: str | None) -> None:
    assert not is_loopback(host)


@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=3))
def test_any_id_stays_one_segment_of_a_path(segments: list[str]) -> None:
    encodable = [each for each in segments if each.isprintable() or each.isascii()]
    url = httpx.URL(f"http://127.0.0.1:1/api{route(*encodable)}")
    assert url.query == b"" and url.fragment == ""
    assert url.raw_path.count(b"/") == 1 + len(encodable)


def test_run_id_reads_as_it_is() -> None:
    assert route("training_runs", "abc:train:0") == "/training_runs/abc:train:0"


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"])
def test_client_asks_no_proxy_for_loopback(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, PROXY)
    with httpx.Client(mounts=without_proxies("http://127.0.0.7:80")) as client:
        direct = client._transport
        for host in ("127.0.0.1", "[::1]", "localhost", "127.0.0.7"):
            assert client._transport_for_url(httpx.URL(f"http://{host}:8055/x")) is direct
        proxied = client._transport_for_url(httpx.URL("http://example.org/x"))
    assert proxied is not direct


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
def test_exemption_keeps_what_the_environment_names(name: str) -> None:
    environment = {"HTTPS_PROXY": PROXY, name: "example.org, localhost"}
    exempt_loopback(environment)
    assert environment["no_proxy"] == environment["NO_PROXY"]
    assert environment["NO_PROXY"] == "example.org,localhost,127.0.0.1,::1"
    again = dict(environment)
    exempt_loopback(again)
    assert again == environment


def test_exemption_of_everything_stays() -> None:
    environment = {"http_proxy": PROXY, "NO_PROXY": "*"}
    exempt_loopback(environment)
    assert environment == {"http_proxy": PROXY, "NO_PROXY": "*"}


def test_environment_without_a_proxy_stays() -> None:
    environment = {"HTTP_PROXY": "", "HOME": "/"}
    exempt_loopback(environment)
    assert environment == {"HTTP_PROXY": "", "HOME": "/"}
