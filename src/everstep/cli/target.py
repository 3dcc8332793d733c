"""The service that a command speaks to, and the options that say which.

In this order: ``--base-url`` (or ``TINKER_BASE_URL``); the service that runs on the home; one that
is started on the home for this command, as ``--base-url local`` does in any case.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import urlsplit

import typer

from everstep.cli.errors import NoAccess, NotOffered, Unreachable, WrongUsage, told
from everstep.cli.options import DEFAULT_HOME, Home, Json

if TYPE_CHECKING:
    import httpx

    from everstep.client import RestClient, ServiceClient
    from everstep.wire.base import Request, Response
    from everstep.wire.inspection import CheckpointDetailsResponse, ServiceInfoResponse

P = ParamSpec("P")
A = TypeVar("A", bound="Response")
BaseUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        envvar="TINKER_BASE_URL",
        help="The service; none: the one that runs on --home; 'local': one for this command.",
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        envvar="TINKER_API_KEY",
        help="Of the service; on this machine none is needed.",
        show_default=False,
    ),
]
_PROBE_SECONDS = 10.0
_NO_ROUTE = (404, 405, 501)
_OPTIONS = {
    "base_url": (BaseUrl, None),
    "api_key": (ApiKey, None),
    "home": (Home, DEFAULT_HOME),
    "as_json": (Json, False),
}


@dataclass(frozen=True)
class Target:
    """Which service, and how its answers are printed.

    Attributes:
        base_url: as it was given.
        api_key: as it was given.
        home: whose service it is, where no address is given.
        as_json: print JSON.
    """

    base_url: str | None
    api_key: str | None
    home: Path
    as_json: bool

    @contextmanager
    def service(self, *, create: bool = False, models: tuple[str, ...] = ()) -> Iterator[Service]:
        """Connect to the service; it answers.

        Args:
            create: begin a home where there is none.
            models: ``NAME=PATH_OR_HUB_ID`` to serve, should one be started.

        Raises:
            WrongUsage: the address can't be one.
            Unreachable: there is none, it doesn't answer, or it is none of the protocol.
            NoAccess: there is no API key, or it can't be one.
        """
        from everstep.client import ServiceClient
        from everstep.client._errors import LocalServiceError, TinkerError

        home = self.home.expanduser().resolve()
        url = address(self.base_url) if self.base_url else self._running(home, create)
        try:
            with _status(f"starting a service on {home}", shown=url == "local"):
                client = ServiceClient(base_url=url, api_key=self.api_key, home=home, models=models)
        except LocalServiceError:
            raise
        except TinkerError as error:
            raise NoAccess(
                f"{error} On the command line: --api-key KEY, or TINKER_API_KEY."
            ) from error
        with client:
            service = Service(client, self)
            service.greet()
            yield service

    def _running(self, home: Path, create: bool) -> str:
        from everstep.cli import running

        address = running.address(home)
        if address is None and not create and not (home / "vault").is_dir():
            raise Unreachable(
                f"No service runs on {home}, and there is no home. Start one with 'everstep "
                "serve', give --base-url URL of another, or choose --home."
            )
        return address or "local"


class Service:
    """A service that answers.

    Args:
        client: of it.
        target: how it was found.
    """

    def __init__(self, client: ServiceClient, target: Target) -> None:
        self.client = client
        self.target = target

    @property
    def url(self) -> str:
        """Where it is."""
        return self.client.base_url

    @functools.cached_property
    def rest(self) -> RestClient:
        """What is there."""
        return self.client.create_rest_client()

    @functools.cached_property
    def everstep(self) -> ServiceInfoResponse | None:
        """What an Everstep service tells of itself; None: it is another one."""
        from everstep.client._http import body_of, read
        from everstep.wire.inspection import ServiceInfoResponse

        answer = self.send("GET", "/everstep/info")
        return read(ServiceInfoResponse, body_of(answer)) if answer.status_code == 200 else None

    def greet(self) -> None:
        """See whether it is a service of the protocol, and says so.

        Raises:
            Unreachable: it does not answer, or as something else does.
            APIStatusError: it refuses the API key.
        """
        from everstep.cli.output import messages
        from everstep.client._errors import APIConnectionError, status_error
        from everstep.client._http import body_of

        try:
            answer = self.send("GET", "/healthz")
            if answer.status_code in _NO_ROUTE:
                answer = self.send("GET", "/get_server_capabilities")
        except APIConnectionError as error:
            raise Unreachable(
                f"{error}. Start a service with 'everstep serve', or give --base-url URL of "
                "one that runs; 'everstep doctor' says more."
            ) from error
        body = body_of(answer)
        if answer.status_code in (401, 403):
            raise status_error(answer.status_code, body)
        if answer.status_code >= 500 and answer.status_code not in _NO_ROUTE:
            messages().print(
                f"everstep: {self.url} answers {answer.status_code}; it is asked again for a while"
            )
        elif not isinstance(body, dict) or not answer.is_success:
            raise Unreachable(
                f"{self.url} answers, and not as a Tinker service does. Correct --base-url or "
                "TINKER_BASE_URL; 'everstep doctor' says more."
            )

    def send(self, method: str, path: str) -> httpx.Response:
        """Send a request once; whatever comes back."""
        from everstep.client._futures import submit

        http = self.client.holder.http
        return submit(http.send(method, path, timeout=_PROBE_SECONDS)).result()

    def details(self, path: str) -> CheckpointDetailsResponse | None:
        """What a checkpoint is made of; None: the service doesn't tell it."""
        from everstep.wire.inspection import CheckpointDetailsResponse, CheckpointRequest

        if self.everstep is None:
            return None
        asked = CheckpointRequest(tinker_path=path)
        return self.ask("/everstep/checkpoints/details", asked, CheckpointDetailsResponse)

    def ask(self, path: str, request: Request, answer: type[A], *, timeout: float = 60.0) -> A:
        """Make a call of Everstep's own.

        Args:
            path: of the call.
            request: what is asked.
            answer: what comes back.
            timeout: how long one attempt may take, in seconds.
        """
        body = request.model_dump(mode="json")
        result: A = self.rest._call("POST", path, answer, json=body, timeout=timeout).result()
        return result

    def only_everstep(self, what: str) -> None:
        """Raise `NotOffered` unless the service is Everstep."""
        if self.everstep is None:
            raise NotOffered(
                f"{self.url} does not offer this: {what} is a call of Everstep's own, and it is "
                "another service of the protocol."
            )

    @contextmanager
    def optional(self, what: str) -> Iterator[None]:
        """Tell a route that the service doesn't have as `NotOffered`.

        Args:
            what: the call that is made, of something that was found before.
        """
        from everstep.client._errors import APIStatusError

        try:
            yield
        except APIStatusError as error:
            if error.status_code not in _NO_ROUTE or self.everstep is not None:
                raise
            raise NotOffered(
                f"{self.url} does not offer {what}: it answered {error.status_code}."
            ) from error


def with_target(command: Callable[Concatenate[Target, P], None]) -> Callable[..., None]:
    """Give a command the options that say which service, and have its errors told.

    Args:
        command: takes the target first, then its own arguments.
    """
    own = inspect.signature(command, eval_str=True)
    parameters = list(own.parameters.values())[1:]
    parameters += [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
        )
        for name, (annotation, default) in _OPTIONS.items()
    ]

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        target = Target(*(arguments.pop(name) for name in _OPTIONS))
        with told():
            command(target, **arguments)  # type: ignore[call-arg]  # the options are in `arguments`

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    del run.__wrapped__
    return run


def address(text: str) -> str:
    """A service's address as it was given, or ``local``; raises `WrongUsage` where it is none."""
    try:
        parts = urlsplit(text)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        known = False
    if not known and text != "local":
        raise WrongUsage(
            f"--base-url (TINKER_BASE_URL): {text!r} is no address; give http://HOST:PORT, "
            "https://HOST, or 'local'."
        )
    return text


@contextmanager
def _status(text: str, *, shown: bool) -> Iterator[None]:
    """Say on standard error what takes a while."""
    from everstep.cli.output import messages

    terminal = messages()
    if not shown or not terminal.is_terminal:
        yield
        return
    with terminal.status(text):
        yield
