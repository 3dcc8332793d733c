"""A bucket of the S3 server: what lies in it, what befalls the requests to it."""

from __future__ import annotations

import subprocess
import sys
import uuid
from typing import Any

import httpx
import obstore

from everstep.vault.bucket import open_bucket
from everstep.vault.objects import ObjectStorage

BUCKET = "vaults"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "the-tests-key-id",
    "AWS_SECRET_ACCESS_KEY": "the-tests-secret",
    "AWS_REGION": "us-east-1",
}


class Server:
    """An S3 server in a process of its own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.buckets.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        self.address = f"http://127.0.0.1:{int(self._process.stdout.readline())}"

    def environment(self) -> dict[str, str]:
        """What a process needs to find it."""
        return {**ENVIRONMENT, "AWS_ENDPOINT_URL": self.address}

    def close(self) -> None:
        """End it."""
        self._process.communicate(timeout=60)


class Bucket:
    """A prefix of the server's bucket that is one test's own.

    Attributes:
        url: what ``--vault`` takes.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self.renew()

    def renew(self) -> None:
        """Become an empty one."""
        self.url = f"s3://{BUCKET}/{uuid.uuid4().hex}/vault"
        self._store = open_bucket(self.url)

    def storage(self, *, retry_seconds: float = 5) -> ObjectStorage:
        """A storage of a process of its own."""
        return ObjectStorage(open_bucket(self.url, retry_seconds=retry_seconds), self.url)

    # What lies in it

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """All objects under a prefix."""
        listed = obstore.list(self._store, prefix or None).collect()
        return {each["path"]: bytes(self._get(each["path"])) for each in listed}

    def put(self, path: str, content: bytes) -> None:
        """Write an object behind the vault's back."""
        obstore.put(self._store, path, content, use_multipart=False)

    def remove(self, path: str) -> None:
        """Remove an object behind the vault's back."""
        obstore.delete(self._store, path)

    def only(self, key: str) -> str:
        """The path of the one object of a key."""
        (path,) = self.objects(key)
        return path

    def _get(self, path: str) -> memoryview:
        return memoryview(obstore.get(self._store, path).bytes())

    # What befalls requests

    def fault(
        self, fault: str | None = None, *, first: int = 1, count: int = 1, method: str | None = None
    ) -> None:
        """Have something happen to requests from now on; see `server`. None: nothing any more."""
        wanted: dict[str, Any] = {"fault": fault, "first": first, "count": count}
        self._control("faults", wanted | ({"method": method} if method else {}))

    def seen(self) -> int:
        """How many requests there were since the fault was set, of its method."""
        answer: int = httpx.get(f"{self._server.address}/-/faults").json()["seen"]
        return answer

    def arrive(self) -> None:
        """Let the late requests take effect."""
        self._control("late", {})

    def _control(self, what: str, body: dict[str, Any]) -> None:
        httpx.post(f"{self._server.address}/-/{what}", json=body).raise_for_status()
