"""Malformed HTTP: the bound of a request's head, and the answer to what can't be read."""

from __future__ import annotations

import json

MAX_HEAD_BYTES = 16 << 10
"""Of a request's line and headers, and of what stands between the parts of a body."""


def malformed_answer() -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Return headers and body of the answer to malformed HTTP, which ends the connection."""
    text = "Invalid HTTP request received. Its head is malformed, or too long."
    body = json.dumps({"detail": text}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    return headers, body
