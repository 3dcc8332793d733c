"""Client info: SDK, release and capabilities from the headers and the address of a request."""

from __future__ import annotations

import pytest
from fastapi import Request

from everstep.server.client_info import ClientInfo, client_of, polls_and_cancels
from everstep.wire.paths import CheckpointKind

WITHOUT_EXTERNAL = (CheckpointKind.TRAINING, CheckpointKind.SAMPLER)
VERSION = "x-stainless-package-version"


def request(host: str = "10.1.2.3", **headers: str) -> Request:
    pairs = [(name.replace("_", "-").encode(), text.encode()) for name, text in headers.items()]
    return Request({"type": "http", "headers": pairs, "client": (host, 1)})


@pytest.mark.parametrize(
    ("headers", "sdk", "release", "reads_external"),
    [
        ({}, "tinker", None, True),
        ({"user_agent": "AsyncTinker/Python 0.27.9", VERSION: "0.27.9"}, "tinker", (0, 27), False),
        ({"user_agent": "AsyncTinker/Python 0.28.0", VERSION: "0.28.0"}, "tinker", (0, 28), True),
        ({"user_agent": "AsyncTinker/Python", VERSION: "unknown"}, "tinker", None, True),
        ({"user_agent": "everstep/0.1.0", VERSION: "0.1.0"}, "everstep", (0, 1), True),
        ({"user_agent": "AsyncTinkex/Elixir 0.3.4"}, "tinkex", None, False),
    ],
)
def test_sdk_and_release_give_the_readable_kinds(
    headers: dict[str, str], sdk: str, release: tuple[int, int] | None, reads_external: bool
) -> None:
    client = client_of(request(**headers))
    assert (client.sdk, client.release) == (sdk, release)
    assert client.readable_kinds == (tuple(CheckpointKind) if reads_external else WITHOUT_EXTERNAL)
    assert client.sends_in_order == client.reads_message_field == (sdk == "tinkex")


@pytest.mark.parametrize(
    ("host", "is_local"),
    [("127.0.0.1", True), ("::1", True), ("10.1.2.3", False), ("testclient", False)],
)
def test_only_a_loopback_address_is_local(host: str, is_local: bool) -> None:
    assert client_of(request(host)).is_local == is_local


def test_client_is_read_once_per_request() -> None:
    one = request(user_agent="everstep/0.1.0")
    assert isinstance(client_of(one), ClientInfo)
    assert client_of(one) is client_of(one)


@pytest.mark.parametrize(
    ("version", "enabled"),
    [(None, False), ("", False), ("0.33.9", False), ("0.34.0", True), ("1.0", True)],
)
def test_flags_are_enabled_from_the_tested_release_on(version: str | None, enabled: bool) -> None:
    assert polls_and_cancels(version) == enabled
