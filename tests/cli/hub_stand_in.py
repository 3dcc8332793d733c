"""A local stand-in for the Hugging Face hub, with the routes that a push calls."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_a-secret-that-nobody-prints"


class Hub(ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
        repositories: whether each is private, by name.
        files: of all repositories, by path.
        blobs: large files, by SHA-256.
        refuses: whether it refuses every token.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.refuses = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.refuses or self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid credentials in Authorization header"}, 401)
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path.endswith("/preupload/main"):
            modes = [_mode(each) for each in json.loads(body)["files"]]
            self._answer({"files": modes})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            objects = [self._upload_of(each) for each in json.loads(body)["objects"]]
            self._answer({"transfer": "basic", "objects": objects})
        elif self.path.endswith("/commit/main"):
            self._commit(body)
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        else:
            self._answer({"error": f"no {self.path}"}, 404)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        digest = self.path.rsplit("/", 1)[-1]
        assert hashlib.sha256(content).hexdigest() == digest
        self.server.blobs[digest] = content
        self._answer({})

    def do_GET(self) -> None:
        self._answer({"sha": "0" * 40, "id": "me/adapter", "siblings": []})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        known = name in self.server.repositories
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.server.repositories.setdefault(name, private)
        answer = {"url": f"{self.server.url}/{name}", "name": name}
        self._answer(answer, 409 if known else 200)

    def _upload_of(self, wanted: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.server.url}/upload/{wanted['oid']}"
        return {**wanted, "actions": {"upload": {"href": href}}}

    def _commit(self, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.blobs[value["oid"]]
        url = f"{self.server.url}/me/adapter/commit/1"
        self._answer({"commitUrl": url, "commitOid": "1" * 40, "success": True})

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}


@contextmanager
def hub() -> Iterator[Hub]:
    """Run a stand-in."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, name="hub")
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
