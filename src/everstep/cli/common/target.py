"""The service that a command calls, and the options that choose it.

``--base-url`` or ``TINKER_BASE_URL``, otherwise the service that runs on the home. If none does,
commands that only list and show read the home's files. Others start one, which ends with the last
process that uses it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import urlsplit

import typer

from everstep.cli.common.errors import NoAccess, NotOffered, Unreachable, WrongUsage, report_errors
from everstep.cli.common.options import (
    DEFAULT_HOME,
    Home,
    Json,
    existing_home,
    existing_ledger,
)

if TYPE_CHECKING:
    import httpx

    from everstep.client import RestClient, ServiceClient
    from everstep.client._transport.session import Connection
    from everstep.wire.base import Request, Response
    from everstep.wire.messages.inspection import CheckpointDetailsResponse, ServiceInfoResponse

P = ParamSpec("P")
R = TypeVar("R", bound="Response")
BaseUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        envvar="TINKER_BASE_URL",
        help="Address of the service; 'local' is the one that runs on --home, which is started "
        "if none does. [default: local]",
        show_default=False,
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        envvar="TINKER_API_KEY",
        help="API key of the service; a service on this machine needs none.",
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
    """The service of a command, and the format of its output.

    Attributes:
        base_url: address of the service, or None for the service of the home.
        api_key: API key of the service. None: as for any client.
        home: the home whose service is called if there is no address.
        as_json: print JSON.
    """

    base_url: str | None
    api_key: str | None
    home: Path
    as_json: bool

    @classmethod
    def of_home(cls, home: Path, vault_url: str | None, as_json: bool) -> Target:
        """Choose the service of an existing home, whatever address the environment names.

        Args:
            home: the home.
            vault_url: the bucket in which its vault is expected. None: as the home remembers.
            as_json: print JSON.

        Raises:
            NotFound: the home has no vault.
            VaultElsewhere: the vault is not in that bucket.
            Refused: the ledger is lost. A service would begin a new one, and regard all
                checkpoints as orphaned.
        """
        home = existing_home(home, vault_url)
        existing_ledger(home)
        return cls(None, None, home, as_json)

    @contextmanager
    def service(self, *, create: bool = False, models: tuple[str, ...] = ()) -> Iterator[Service]:
        """Connect to the service and check that it answers.

        Args:
            create: create the home if it does not exist.
            models: ``NAME=PATH_OR_HUB_ID`` of the models of a service that has to be started.

        Raises:
            WrongUsage: the address is malformed.
            Unreachable: there is no service, it does not answer, or it is not a Tinker service.
            NoAccess: the API key is missing or malformed.
        """
        from everstep.client import ServiceClient
        from everstep.client._transport.errors import LocalServiceError, TinkerError

        home = self._home()
        url = check_address(self.base_url) if self.base_url else self._local(home, create)
        try:
            client = ServiceClient(base_url=url, api_key=self.api_key, home=home, models=models)
        except LocalServiceError:
            raise
        except TinkerError as error:
            raise _no_access(error) from error
        with client:
            service = Service(client, self)
            service.check()
            yield service

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        """Connect for reading: to the service, or to the home's files if none runs on the home.

        Raises:
            Refused: the home has no ledger.
            LedgerError: the ledger can't be read, or has another schema than this release's.
            WrongUsage, Unreachable, NoAccess: as by `service`.
        """
        from everstep.cli.common import service_file

        home = self._home()
        remote = self.base_url and check_address(self.base_url) != "local"
        if remote or service_file.can_attach(home):
            with self.service() as service:
                yield service
            return
        self._require_home(home)
        existing_ledger(home)
        from everstep.cli.common.home_transport import connect
        from everstep.client._transport.errors import TinkerError

        with contextlib.ExitStack() as stack:
            try:
                connection = stack.enter_context(connect(home, self.api_key))
            except TinkerError as error:
                raise _no_access(error) from error
            yield Reader(connection, self)

    def _home(self) -> Path:
        return self.home.expanduser().resolve()

    def _require_home(self, home: Path) -> None:
        if not (home / "vault").is_dir():
            raise Unreachable(
                f"No service runs on {home}, and there is no home. Start a service with 'everstep "
                "serve', give the --base-url of another, or choose --home."
            )

    def _local(self, home: Path, create: bool) -> str:
        """Return ``local``: the client attaches to the home's service, or starts it."""
        from everstep.cli.common import service_file

        if not (create or service_file.is_used(home)):
            self._require_home(home)
        if (home / "vault").is_dir():
            service_file.require_unlocked(home)
        return "local"


class Reader:
    """A connection for reading: to a service, or to the files of a home on which none runs.

    Args:
        connection: the connection.
        target: how it was chosen.
    """

    def __init__(self, connection: Connection, target: Target) -> None:
        self._connection = connection
        self.target = target

    @property
    def url(self) -> str:
        """Address of the service."""
        return self._connection.http.base_url

    @functools.cached_property
    def rest(self) -> RestClient:
        """A client for runs, checkpoints and sessions."""
        from everstep.client import RestClient

        return RestClient(self._connection)

    @functools.cached_property
    def everstep(self) -> ServiceInfoResponse | None:
        """The service's description of itself, or None if it is not Everstep."""
        from everstep.client._transport.http import body_of, read
        from everstep.wire.messages.inspection import ServiceInfoResponse

        answer = self.send("GET", "/everstep/info")
        return read(ServiceInfoResponse, body_of(answer)) if answer.status_code == 200 else None

    def send(self, method: str, path: str) -> httpx.Response:
        """Send a request once and return the response, whatever its status."""
        from everstep.client._transport.futures import submit

        http = self._connection.http
        return submit(http.send(method, path, timeout=_PROBE_SECONDS)).result()

    def details(self, path: str) -> CheckpointDetailsResponse | None:
        """Return the details of a checkpoint, or None if the service does not offer them."""
        from everstep.wire.messages.inspection import CheckpointDetailsResponse, CheckpointRequest

        if self.everstep is None:
            return None
        request = CheckpointRequest(tinker_path=path)
        return self.call("/everstep/checkpoints/details", request, CheckpointDetailsResponse)

    def call(
        self,
        path: str,
        request: Request,
        response: type[R],
        *,
        timeout: float = 60.0,
        not_retried: tuple[int, ...] = (),
    ) -> R:
        """Call a route that only Everstep has.

        Args:
            path: path of the route.
            request: the request.
            response: type of the response.
            timeout: time limit of one attempt, in seconds.
            not_retried: statuses to raise at once.
        """
        result: R = self.rest.holder.call(
            "POST",
            path,
            response,
            json=request.model_dump(mode="json"),
            timeout=timeout,
            hand_back=not_retried,
        ).result()
        return result

    def get(self, path: str, response: type[R]) -> R:
        """Read a route that only Everstep has.

        Args:
            path: path of the route.
            response: type of the response.
        """
        result: R = self.rest.holder.call("GET", path, response).result()
        return result

    def require_everstep(self, feature: str) -> None:
        """Raise `NotOffered` unless the service is Everstep."""
        if self.everstep is None:
            raise NotOffered(
                f"{self.url} does not offer this: {feature} needs an Everstep service, and it is "
                "another Tinker service."
            )

    @contextmanager
    def optional(self, feature: str) -> Iterator[None]:
        """Translate the error of a missing route into `NotOffered`.

        Args:
            feature: the call inside, on something that is known to exist.
        """
        from everstep.client._transport.errors import APIStatusError

        try:
            yield
        except APIStatusError as error:
            if error.status_code not in _NO_ROUTE or self.everstep is not None:
                raise
            raise NotOffered(
                f"{self.url} does not offer {feature}: it answered {error.status_code}."
            ) from error


class Service(Reader):
    """A connection to a service.

    Args:
        client: a client of the service.
        target: how the service was chosen.
    """

    def __init__(self, client: ServiceClient, target: Target) -> None:
        super().__init__(client.holder.connection, target)
        self.client = client

    def check(self) -> None:
        """Check that the service answers as a Tinker service does.

        Raises:
            Unreachable: it does not answer, or is not a Tinker service.
            APIStatusError: it refuses the API key.
        """
        from everstep.cli.common.output import messages
        from everstep.client._transport.errors import APIConnectionError, status_error
        from everstep.client._transport.http import body_of

        try:
            answer = self.send("GET", "/healthz")
            if answer.status_code in _NO_ROUTE:
                answer = self.send("GET", "/get_server_capabilities")
        except APIConnectionError as error:
            raise Unreachable(
                f"{error}. Start a service with 'everstep serve', or give the --base-url of one "
                "that runs; 'everstep doctor' finds out more."
            ) from error
        body = body_of(answer)
        if answer.status_code in (401, 403):
            raise status_error(answer.status_code, body)
        if answer.status_code >= 500 and answer.status_code not in _NO_ROUTE:
            messages().print(
                f"everstep: {self.url} answers {answer.status_code}; retrying for a while"
            )
        elif not isinstance(body, dict) or not answer.is_success:
            raise Unreachable(
                f"{self.url} is not a Tinker service. Correct --base-url or TINKER_BASE_URL; "
                "'everstep doctor' finds out more."
            )


def with_target(command: Callable[Concatenate[Target, P], None]) -> Callable[..., None]:
    """Add the options that choose the service to a command, and report its errors.

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
        with report_errors():
            command(target, **arguments)  # type: ignore[call-arg]  # the options are in `arguments`

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    del run.__wrapped__
    return run


def _no_access(error: Exception) -> NoAccess:
    return NoAccess(f"{error} On the command line: --api-key KEY, or TINKER_API_KEY.")


def check_address(text: str) -> str:
    """Return a service's address, or ``local``, unchanged. Raises `WrongUsage` if malformed."""
    try:
        parts = urlsplit(text)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        known = known and not (parts.query or parts.fragment)
    except ValueError:
        known = False
    if not known and text != "local":
        raise WrongUsage(
            f"--base-url (TINKER_BASE_URL): {text!r} is not an address; give http://HOST:PORT, "
            "https://HOST, or 'local'."
        )
    return text
