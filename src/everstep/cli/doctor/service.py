"""Checks of the service: address, API key, clock, release, models."""

from __future__ import annotations

import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx

from everstep import service_home
from everstep._version import __version__
from everstep.addresses import without_proxies
from everstep.cli.common import service_file
from everstep.cli.common.errors import WrongUsage
from everstep.cli.common.target import check_address
from everstep.cli.doctor.finding import Finding, ok, problem, warning

_SECONDS = 10.0
_SKEW_SECONDS = 60.0


def check_service(base_url: str | None, api_key: str | None, home: Path) -> Iterator[Finding]:
    """Check the service that commands would call.

    Args:
        base_url: address of the service, or None for the service of the home.
        api_key: its API key.
        home: the home.
    """
    try:
        if base_url in (None, "", "local"):
            url = service_file.find_address(home)
        else:
            url = check_address(str(base_url))
    except WrongUsage as refusal:
        yield problem("service", str(refusal), "Correct it, or unset TINKER_BASE_URL.")
        return
    if url is None:
        yield _not_ready(home)
        return
    url = url.rstrip("/")
    yield from _key(api_key, url)
    with httpx.Client(
        timeout=_SECONDS, headers=_headers(api_key), mounts=without_proxies(url)
    ) as client:
        try:
            answer = client.get(f"{url}/api/v1/healthz")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            yield problem(
                "service",
                f"{url} can't be reached: {error!r}",
                "Start one with 'everstep serve', or correct --base-url or TINKER_BASE_URL.",
            )
            return
        yield _health(url, answer)
        yield _clock(answer)
        try:
            described = client.get(f"{url}/api/v1/everstep/info")
            yield _release(described)
            yield from _models(client, url, api_key)
            yield from _refused_models(described)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            yield problem("service", f"its response can't be read: {error!r}", "Look at its log.")


def _not_ready(home: Path) -> Finding:
    """Say why a home has no service that is ready."""
    if service_file.is_used(home):
        return warning(
            "service",
            "it starts or stops",
            "Wait, or look at it: 'everstep serve status', 'everstep serve logs'.",
        )
    last = service_home.recorded(home)
    if last is not None:
        return warning(
            "service",
            f"none runs; the last one (process {last.process}) was killed or failed",
            "Look at its log ('everstep serve logs'). The next start resumes its runs.",
        )
    return ok(
        "service",
        "none runs on the home; commands start one when they need it, and 'everstep serve "
        "--detach' one that stays",
    )


def _headers(api_key: str | None) -> dict[str, str]:
    from everstep.client._transport.credentials import static_key
    from everstep.client._transport.errors import TinkerError

    try:
        key = static_key(api_key)
    except TinkerError:
        key = None
    return {} if key is None else {"X-API-Key": key}


def _key(api_key: str | None, url: str) -> Iterator[Finding]:
    from everstep.client._transport.credentials import Credential, static_key
    from everstep.client._transport.errors import TinkerError

    try:
        Credential(api_key, url)
        key = static_key(api_key)
    except TinkerError as error:
        yield problem(
            "API key", str(error), "Give --api-key or TINKER_API_KEY a key that begins with 'tml-'."
        )
        return
    yield ok(
        "API key", "none; this service needs none" if key is None else f"{key[:4]}…, well-formed"
    )


def _health(url: str, answer: httpx.Response) -> Finding:
    if answer.is_success:
        return ok("service", f"{url} is ready")
    if answer.status_code == 503:
        return warning("service", f"{url} or its worker is starting", "Wait, or look at its log.")
    if answer.status_code in (401, 403):
        return problem("service", f"{url} refuses the API key", "Ask its operator for a valid key.")
    return warning(
        "service",
        f"{url} answers {answer.status_code} to /api/v1/healthz",
        "Make sure that this is the address of a Tinker service.",
    )


def _clock(answer: httpx.Response) -> Finding:
    try:
        reported = parsedate_to_datetime(answer.headers["date"]).timestamp()
    except (KeyError, ValueError):
        return ok("clock", "the service does not report its time")
    skew = time.time() - reported
    if abs(skew) > _SKEW_SECONDS:
        return warning(
            "clock",
            f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the service's",
            "Expiry times and signed URLs use the service's clock; set yours (NTP).",
        )
    return ok("clock", "within a minute of the service's")


def _release(answer: httpx.Response) -> Finding:
    own = __version__
    if answer.status_code in (404, 405):
        return ok("releases", f"client {own}; the service is not Everstep")
    if not answer.is_success:
        return warning(
            "releases", f"client {own}; the service does not report its own", "Try again."
        )
    other = answer.json()["version"]
    if other != own:
        return warning(
            "releases", f"client {own}, service {other}", "Install the same release of both."
        )
    return ok("releases", f"client and service {own}")


def _models(client: httpx.Client, url: str, api_key: str | None) -> Iterator[Finding]:
    answer = client.get(f"{url}/api/v1/get_server_capabilities")
    if not answer.is_success:
        yield _no_models(answer)
        return
    names = [each["model_name"] for each in answer.json()["supported_models"]]
    if not names:
        yield problem(
            "models", "none is served", "Start one with 'everstep serve --model NAME_OR_PATH'."
        )
        return
    yield ok("models", f"{', '.join(names)}: loaded")
    for name in names if len(names) == 1 else ():
        yield _tokenizer(url, api_key, name)


def _refused_models(answer: httpx.Response) -> Iterator[Finding]:
    """Name the models that a service was started with and can't serve."""
    if answer.is_success:
        for name, reason in answer.json().get("refused_models", {}).items():
            yield problem("models", f"{name} {reason}", "Leave it out, or correct its path.")


def _no_models(answer: httpx.Response) -> Finding:
    if answer.status_code in (401, 403):
        return problem(
            "models", "the service refuses the API key", "Ask its operator for a valid key."
        )
    found = f"the service answers {answer.status_code}: {' '.join(answer.text[:200].split())}"
    if answer.status_code in (404, 405, 501):
        return problem("models", found, "Make sure that this is the address of a Tinker service.")
    return problem("models", found, "Look at its log: a model may not load.")


def _tokenizer(url: str, api_key: str | None, model: str) -> Finding:
    from everstep.client import ServiceClient
    from everstep.client._transport.errors import TinkerError
    from everstep.client._transport.tokenizer import load_tokenizer

    advice = "pip install transformers; a model of the hub needs the hub or its cache (HF_HOME)."
    try:
        with ServiceClient(base_url=url, api_key=api_key) as client:
            tokenizer = load_tokenizer(client.holder.http, model)
    except (TinkerError, OSError, ValueError) as error:
        return problem("tokenizer", f"{model}: {error}", advice)
    return ok("tokenizer", f"{model}: {len(tokenizer):,} tokens")
