"""Addresses of services: URLs from hosts and ports, and loopback addresses, which need no proxy.

A proxy of the environment (``HTTP_PROXY``, ``ALL_PROXY``) can't reach a service on this machine,
or would see the keys and the data that never have to leave it.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from ipaddress import IPv6Address, ip_address
from urllib.parse import quote, urlsplit

LOOPBACK = ("127.0.0.1", "::1", "localhost")
_NO_PROXY = ("no_proxy", "NO_PROXY")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def http_url(host: str, port: int) -> str:
    """Return the URL of a service.

    Args:
        host: an IP address or a name.
        port: the port.
    """
    return f"http://{bracketed(host)}:{port}"


def bracketed(host: str) -> str:
    """Return a host as it stands in a URL: an IPv6 address in brackets, its zone encoded."""
    return f"[{host.replace('%', '%25')}]" if ":" in host else host


def route(*segments: str) -> str:
    """Return a URL's path of segments, whatever they hold: ids and names are no syntax."""
    return "".join(f"/{_segment(each)}" for each in segments)


def _segment(text: str) -> str:
    dots = text in (".", "..")  # clients and proxies would resolve them
    return text.replace(".", "%2E") if dots else quote(text, safe=":")


def connectable(host: str) -> str:
    """Return the address at which clients on this machine reach a service that listens on a host.

    Args:
        host: the address that it listens on. ``0.0.0.0`` and ``::`` stand for all of the machine's.
    """
    try:
        address = ip_address(host)
    except ValueError:
        return host
    if not address.is_unspecified:
        return host
    return "::1" if isinstance(address, IPv6Address) else "127.0.0.1"


def is_loopback(host: str | None) -> bool:
    """Return whether a host is this machine, as the host of a URL without its brackets."""
    name = (host or "").lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ip_address(name)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback or address.is_unspecified


def without_proxies(*urls: str) -> dict[str, None]:
    """Return the ``mounts`` of an httpx client that reaches loopback addresses without a proxy.

    Args:
        urls: addresses that the client will use, for those that `LOOPBACK` doesn't hold.
    """
    hosts = {*LOOPBACK}
    for url in urls:
        host = _host_of(url)
        if host is not None and is_loopback(host):
            hosts.add(host)
    return {f"all://{bracketed(host)}": None for host in sorted(hosts)}


def exempt_loopback(environment: MutableMapping[str, str]) -> None:
    """Exempt loopback addresses from an environment's proxies, for libraries and child processes.

    Args:
        environment: the variables of a process. ``NO_PROXY`` keeps what it names. Without a proxy
            nothing changes.
    """
    if not any(environment.get(each) for name in _PROXIES for each in (name, name.upper())):
        return
    given = next((environment[name] for name in _NO_PROXY if environment.get(name)), "")
    names = [name for each in given.split(",") if (name := each.strip())]
    if "*" in names:
        return
    value = ",".join([*names, *(host for host in LOOPBACK if host not in names)])
    for name in _NO_PROXY:
        environment[name] = value


def _host_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
