r"""Followed acceptance: the response to a submit that carries the operation's result as well.

A client that accepts it saves the poll for the result. The body comes in two parts::

    {"request_id": …}\n            once the operation is accepted: the JSON that others get
    application/x-protobuf\n…      once it has ended: the result's media type, and the result

The second part is empty where the operation takes longer than a long poll does, or where its result
is too large or is an error of the poll itself: the client then polls. It does the same when the
connection breaks, so that nothing depends on the second part.
"""

from __future__ import annotations

FOLLOWED = "application/vnd.everstep.followed"
_END = b"\n"


def accepted_part(body: bytes) -> bytes:
    """Return the first part.

    Args:
        body: the JSON of the acceptance, in one line.
    """
    return body + _END


def result_part(media_type: str, body: bytes) -> bytes:
    """Return the second part.

    Args:
        media_type: of the result.
        body: the result.
    """
    return media_type.encode("ascii") + _END + body


def split_accepted(body: bytes) -> tuple[bytes, bytes] | None:
    """Return the acceptance's JSON and what follows it, or None if it is not whole yet."""
    accepted, end, rest = body.partition(_END)
    return (accepted, rest) if end else None


def split_result(rest: bytes) -> tuple[str, bytes] | None:
    """Return the media type and the bytes of a result, or None if the client has to poll."""
    media_type, end, body = rest.partition(_END)
    return (media_type.decode("ascii", "replace"), body) if end else None
