"""What the client raises, under the names of the official SDK.

TinkerError
├── APIError
│   ├── APIStatusError (status_code, body)
│   │   ├── BadRequestError 400            AuthenticationError 401     BillingError 402
│   │   ├── PermissionDeniedError 403      NotFoundError 404           ConflictError 409
│   │   └── UnprocessableEntityError 422   RateLimitError 429          InternalServerError 5xx
│   ├── APIConnectionError ── APITimeoutError
│   └── APIResponseValidationError
├── RequestFailedError (request_id, category)   an accepted operation failed
├── DownloadError                               a file could not be had, or is not what it should be
└── LocalServiceError                           the embedded service can't be started
"""

from __future__ import annotations

from typing import Any

from everstep.wire.errors import ErrorCategory


class TinkerError(Exception):
    """Base of the client's errors."""


class APIError(TinkerError):
    """A request did not get its answer."""


class APIStatusError(APIError):
    """The service refused a request.

    Attributes:
        status_code: of the answer.
        body: the answer's JSON, or its text.
    """

    def __init__(self, message: str, status_code: int, body: Any = None) -> None:
        super().__init__(message)
        self.message = message
        self.status_code = status_code
        self.body = body


class BadRequestError(APIStatusError):
    """400."""


class AuthenticationError(APIStatusError):
    """401."""


class BillingError(APIStatusError):
    """402."""


class PermissionDeniedError(APIStatusError):
    """403."""


class NotFoundError(APIStatusError):
    """404."""


class ConflictError(APIStatusError):
    """409."""


class UnprocessableEntityError(APIStatusError):
    """422."""


class RateLimitError(APIStatusError):
    """429."""


class InternalServerError(APIStatusError):
    """5xx."""


class APIConnectionError(APIError):
    """The service could not be reached."""


class APITimeoutError(APIConnectionError):
    """The service did not answer in time."""


class APIResponseValidationError(APIError):
    """The service answered with something else than the protocol says."""


class RequestFailedError(TinkerError):
    """An operation was accepted and failed.

    Attributes:
        request_id: of the operation.
        category: ``user`` when the request was wrong, ``server`` when the service was.
    """

    def __init__(self, message: str, request_id: str, category: ErrorCategory) -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id
        self.category = category


class DownloadError(TinkerError):
    """A file could not be fetched, or is not what the service says of it."""


class LocalServiceError(TinkerError):
    """The embedded service did not start, or ended and could not be started again."""


_BY_STATUS: dict[int, type[APIStatusError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    402: BillingError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    422: UnprocessableEntityError,
    429: RateLimitError,
}


def status_error(status: int, body: Any) -> APIStatusError:
    """The error of an answer."""
    kind = _BY_STATUS.get(status, InternalServerError if status >= 500 else APIStatusError)
    return kind(f"Error code: {status} - {body}", status, body)
