"""The doctor's look at the service: its address, the key, its clock, its release, its models."""

from __future__ import annotations

import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from pathlib import Path

import httpx

from everstep.cli import running
from everstep.cli.errors import Refused, WrongUsage
from everstep.cli.finding import Finding, ok, problem, warning
from everstep.cli.target import address

_SECONDS = 10.0
_SKEW_SECONDS = 60.0


def findings(base_url: str | None, api_key: str | None, home: Path) -> Iterator[Finding]:
    """Look at the service that commands would use.

    Args:
        base_url: as it was given.
        api_key: likewise.
        home: whose service it is, where no address is given.
    """
    try:
        url = running.address(home) if base_url in (None, "", "local") else address(str(base_url))
    except WrongUsage as refusal:
        yield problem("service", str(refusal), "Correct it, or unset TINKER_BASE_URL.")
        return
    except Refused as refusal:
        yield problem("service", str(refusal), "Try again in a minute.")
        return
    if url is None:
        yield ok("service", "none runs on the home; commands that need one start one")
        return
    url = url.rstrip("/")
    yield from _key(api_key, url)
    with httpx.Client(timeout=_SECONDS, headers=_headers(api_key)) as client:
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
            yield _release(client, url)
            yield from _models(client, url, api_key)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            yield problem("service", f"its answer can't be read: {error!r}", "Look at its log.")


def _headers(api_key: str | None) -> dict[str, str]:
    from everstep.client._credentials import static_key
    from everstep.client._errors import TinkerError

    try:
        key = static_key(api_key)
    except TinkerError:
        key = None
    return {} if key is None else {"X-API-Key": key}


def _key(api_key: str | None, url: str) -> Iterator[Finding]:
    from everstep.client._credentials import Credential, static_key
    from everstep.client._errors import TinkerError

    try:
        Credential(api_key, url)
        key = static_key(api_key)
    except TinkerError as error:
        yield problem(
            "API key", str(error), "Give --api-key or TINKER_API_KEY a key that begins with 'tml-'."
        )
        return
    yield ok("API key", "none; none is needed here" if key is None else f"{key[:4]}…, of its form")


def _health(url: str, answer: httpx.Response) -> Finding:
    if answer.is_success:
        return ok("service", f"{url} is ready")
    if answer.status_code == 503:
        return warning("service", f"{url} is starting, or its worker is", "Wait; look at its log.")
    if answer.status_code in (401, 403):
        return problem("service", f"{url} refuses the API key", "Ask for a key that it knows.")
    return warning(
        "service",
        f"{url} answers {answer.status_code} to /api/v1/healthz",
        "Make sure that this is the address of a Tinker service.",
    )


def _clock(answer: httpx.Response) -> Finding:
    try:
        theirs = parsedate_to_datetime(answer.headers["date"]).timestamp()
    except (KeyError, ValueError):
        return ok("clock", "the service doesn't say what time it is")
    skew = time.time() - theirs
    if abs(skew) > _SKEW_SECONDS:
        return warning(
            "clock",
            f"{abs(skew):.0f} s {'before' if skew > 0 else 'behind'} the service's",
            "Lifetimes and links go by the service's clock; set yours (NTP).",
        )
    return ok("clock", "the service's is the same, to a minute")


def _release(client: httpx.Client, url: str) -> Finding:
    answer = client.get(f"{url}/api/v1/everstep/info")
    own = version("everstep")
    if answer.status_code in (404, 405):
        return ok("releases", f"client {own}; the service is not Everstep")
    if not answer.is_success:
        return warning("releases", f"client {own}; the service doesn't say its own", "Try again.")
    theirs = answer.json()["version"]
    if theirs != own:
        return warning(
            "releases", f"client {own}, service {theirs}", "Install the same release of both."
        )
    return ok("releases", f"client and service {own}")


def _models(client: httpx.Client, url: str, api_key: str | None) -> Iterator[Finding]:
    answer = client.get(f"{url}/api/v1/get_server_capabilities")
    if not answer.is_success:
        yield _no_models(answer)
        return
    names = [each["model_name"] for each in answer.json()["supported_models"]]
    if not names:
        yield problem("models", "none is served", "everstep serve --model NAME_OR_PATH")
        return
    yield ok("models", f"{', '.join(names)}: loaded")
    for name in names if len(names) == 1 else ():
        yield _tokenizer(url, api_key, name)


def _no_models(answer: httpx.Response) -> Finding:
    if answer.status_code in (401, 403):
        return problem("models", "the service refuses the API key", "Ask for a key that it knows.")
    found = f"the service answers {answer.status_code}: {' '.join(answer.text[:200].split())}"
    if answer.status_code in (404, 405, 501):
        return problem("models", found, "Make sure that this is the address of a Tinker service.")
    return problem("models", found, "Look at its log: a model may not load.")


def _tokenizer(url: str, api_key: str | None, model: str) -> Finding:
    from everstep.client import ServiceClient
    from everstep.client._errors import TinkerError
    from everstep.client._tokenizers import load_tokenizer

    advice = "pip install transformers; a hub's model needs the hub or its cache (HF_HOME)."
    try:
        with ServiceClient(base_url=url, api_key=api_key) as client:
            tokenizer = load_tokenizer(client.holder.http, model)
    except (TinkerError, OSError, ValueError) as error:
        return problem("tokenizer", f"{model}: {error}", advice)
    return ok("tokenizer", f"{model}: {len(tokenizer):,} tokens")
