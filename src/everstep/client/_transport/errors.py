"""Errors of the client, under the names of the official SDK.

TinkerError
├── APIError
│   ├── APIStatusError (status_code, body)
│   │   ├── BadRequestError 400            AuthenticationError 401     BillingError 402
│   │   ├── PermissionDeniedError 403      NotFoundError 404           ConflictError 409
│   │   └── UnprocessableEntityError 422   RateLimitError 429          InternalServerError 5xx
│   ├── APIConnectionError ── APITimeoutError
│   └── APIResponseValidationError
├── RequestFailedError (request_id, category)   an accepted operation failed
├── DownloadError                               a download failed, or its content is wrong
└── LocalServiceError                           the embedded service can't be started
"""

from __future__ import annotations

from typing import Any

from everstep.wire.errors import ErrorCategory


class TinkerError(Exception):
    """Base of the client's errors."""


class APIError(TinkerError):
    """A request failed."""


class APIStatusError(APIError):
    """The service responded with an error status.

    Attributes:
        status_code: of the response.
        body: the response's JSON, or its text.
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
    """The service did not respond in time."""


class APIResponseValidationError(APIError):
    """The response does not follow the protocol."""


class RequestFailedError(TinkerError):
    """An accepted operation failed.

    Attributes:
        request_id: of the operation.
        category: ``user`` if the request was wrong, ``server`` if the service failed.
    """

    def __init__(self, message: str, request_id: str, category: ErrorCategory) -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id
        self.category = category


class DownloadError(TinkerError):
    """A file could not be downloaded, or its size or checksum is wrong."""


class LocalServiceError(TinkerError):
    """The embedded service did not start, or exited and could not be restarted."""


class ExperimentalWarning(FutureWarning):
    """The call may change or be removed in any release."""


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
    """Return the error for a response's status."""
    kind = _BY_STATUS.get(status, InternalServerError if status >= 500 else APIStatusError)
    return kind(f"Error code: {status} - {body}", status, body)
