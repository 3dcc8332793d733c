"""Client info: the SDK that sent a request, and the capabilities that follow from its release."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_address
from typing import Annotated, Literal

from fastapi import Depends, Request

from everstep.wire.paths import CheckpointKind

Release = tuple[int, int]
_RELEASE = re.compile(r"([0-9]{1,6})\.([0-9]{1,6})(?![0-9])")
_NEWEST_KNOWN: Release = (0, 38)
"""The newest official SDK whose requests are known field by field."""
_FIRST_WITH_EXTERNAL: Release = (0, 28)
_FIRST_THAT_POLLS_AND_CANCELS: Release = (0, 34)
"""The flags of `ClientInfo.polls_and_cancels` were tested with the official SDK from here on."""


@dataclass(frozen=True)
class ClientInfo:
    """The client that sent a request.

    Attributes:
        sdk: ``everstep`` for this package, ``tinkex`` for the SDK in Elixir. Every other client is
            treated as the official one, ``tinker``.
        release: the release of the official SDK as (major, minor), where the client states one.
        is_local: whether it runs on this machine and reads the same files.
    """

    sdk: Literal["tinker", "everstep", "tinkex"]
    release: Release | None
    is_local: bool

    @property
    def sends_in_order(self) -> bool:
        """Whether the client sends a run's operations one after the other.

        Sequence ids that it skipped never arrive. Tinkex does this (docs/guides/tinkex.md).
        """
        return self.sdk == "tinkex"

    @property
    def is_newer(self) -> bool:
        """Whether the client is an official SDK that may send fields which are not known here."""
        return self.sdk == "tinker" and self.release is not None and self.release > _NEWEST_KNOWN

    @property
    def reads_message_field(self) -> bool:
        """Whether the client reads an error's text from ``message``.

        Tinkex does, and can't read the usual form of a failed future.
        """
        return self.sdk == "tinkex"

    @property
    def readable_kinds(self) -> Collection[CheckpointKind]:
        """The kinds of checkpoints that the client can read in a list.

        The official SDK before 0.28, and Tinkex, fail on a list that holds an external one.
        """
        old = self.release is not None and self.release < _FIRST_WITH_EXTERNAL
        if (old and self.sdk != "everstep") or self.sdk == "tinkex":
            return (CheckpointKind.TRAINING, CheckpointKind.SAMPLER)
        return tuple(CheckpointKind)


def parse_release(version: str | None) -> Release | None:
    """Return the release that a version of the official SDK names, as (major, minor)."""
    found = _RELEASE.match(version or "")
    return (int(found[1]), int(found[2])) if found is not None else None


def polls_and_cancels(version: str | None) -> bool:
    """Return whether an SDK polls for many samples at once, joins samplers and cancels samples."""
    release = parse_release(version)
    return release is not None and release >= _FIRST_THAT_POLLS_AND_CANCELS


def client_of(request: Request) -> ClientInfo:
    """Return the client that sent a request, from its headers and address."""
    known: ClientInfo | None = getattr(request.state, "client", None)
    if known is None:
        known = request.state.client = _read(request)
    return known


async def _client(request: Request) -> ClientInfo:
    return client_of(request)


def _read(request: Request) -> ClientInfo:
    headers = request.headers
    return _info(
        headers.get("user-agent", "").lower(),
        headers.get("x-stainless-package-version"),
        request.client.host if request.client is not None else "",
    )


@lru_cache(maxsize=256)
def _info(agent: str, version: str | None, host: str) -> ClientInfo:
    sdk: Literal["tinker", "everstep", "tinkex"] = "tinker"
    if agent.startswith("asynctinkex"):
        sdk = "tinkex"
    elif agent.startswith("everstep"):
        sdk = "everstep"
    return ClientInfo(sdk, parse_release(version), _is_loopback(host))


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name instead of an address, as in-process clients have it
        return False


Client = Annotated[ClientInfo, Depends(_client)]  # asynchronous: FastAPI calls others in a thread
"""A route's parameter for the client that sent the request."""
