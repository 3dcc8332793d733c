"""Test bucket: a bucket of the S3 server, with access to its objects and request faults."""

from __future__ import annotations

import subprocess
import sys
import uuid
from typing import Any

import httpx
import obstore

from everstep.vault.storage.bucket import open_bucket
from everstep.vault.storage.objects import ObjectStorage

BUCKET = "vaults"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "the-tests-key-id",
    "AWS_SECRET_ACCESS_KEY": "the-tests-secret",
    "AWS_REGION": "us-east-1",
}


class Server:
    """An S3 server in a separate process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.buckets.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        self.address = f"http://127.0.0.1:{int(self._process.stdout.readline())}"

    def environment(self) -> dict[str, str]:
        """Return the environment variables with which a process finds the server."""
        return {**ENVIRONMENT, "AWS_ENDPOINT_URL": self.address}

    def close(self) -> None:
        """Stop the server."""
        self._process.communicate(timeout=60)


class Bucket:
    """A prefix of the server's bucket for one test.

    Attributes:
        url: the value of ``--vault``.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self.clear()

    def clear(self) -> None:
        """Switch to a new, empty prefix."""
        self.url = f"s3://{BUCKET}/{uuid.uuid4().hex}/vault"
        self._store = open_bucket(self.url)

    def storage(self, *, retry_seconds: float = 5) -> ObjectStorage:
        """Return a new storage, as another process would open it."""
        return ObjectStorage(open_bucket(self.url, retry_seconds=retry_seconds), self.url)

    # Objects

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """Return all objects under a prefix, by path."""
        listed = obstore.list(self._store, prefix or None).collect()
        return {each["path"]: bytes(self._get(each["path"])) for each in listed}

    def put(self, path: str, content: bytes) -> None:
        """Write an object behind the vault's back."""
        obstore.put(self._store, path, content, use_multipart=False)

    def remove(self, path: str) -> None:
        """Remove an object behind the vault's back."""
        obstore.delete(self._store, path)

    def only(self, key: str) -> str:
        """Return the path of a key's only object."""
        (path,) = self.objects(key)
        return path

    def _get(self, path: str) -> memoryview:
        return memoryview(obstore.get(self._store, path).bytes())

    # Faults

    def fault(
        self, fault: str | None = None, *, first: int = 1, count: int = 1, method: str | None = None
    ) -> None:
        """Set the fault of coming requests (see `server`). None removes it.

        Args:
            fault: the name of the fault.
            first: the first request that it affects, counted from 1.
            count: the number of affected requests.
            method: count only requests of this method.
        """
        wanted: dict[str, Any] = {"fault": fault, "first": first, "count": count}
        self._control("faults", wanted | ({"method": method} if method else {}))

    def request_count(self) -> int:
        """Return the number of requests of the fault's method since it was set."""
        answer: int = httpx.get(f"{self._server.address}/-/faults").json()["seen"]
        return answer

    def deliver_late(self) -> None:
        """Let late requests take effect."""
        self._control("late", {})

    def _control(self, action: str, body: dict[str, Any]) -> None:
        httpx.post(f"{self._server.address}/-/{action}", json=body).raise_for_status()
