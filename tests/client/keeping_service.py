"""A scripted service that stores checkpoints and their metadata, and can lose its state."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.client.fake_service import FakeService, Recorded, Reply

RANK = 4


class KeepingService(FakeService):
    """A `FakeService` with an account's checkpoints.

    Attributes:
        checkpoints: the listed checkpoints, by path.
        drops_metadata: whether ``user_metadata`` is dropped.
        hides: whether a path is acknowledged but not listed.
        unloadable: paths whose load fails, with the failure's category.
        corrupted: runs that are reported as corrupted.
        gone: runs and sessions that get status 410.
        no_ttl: whether the TTL endpoint is missing.
        lists_no_runs: whether the endpoint for runs is missing.
        page: the largest page of a list.
    """

    def __init__(self) -> None:
        super().__init__()
        self.checkpoints: dict[str, dict[str, Any]] = {}
        self.ttls: list[tuple[str, int | None]] = []
        self.deleted: list[str] = []
        self.drops_metadata = False
        self.hides: Callable[[str], bool] = lambda path: False
        self.unloadable: dict[str, str] = {}
        self.corrupted: set[str] = set()
        self.gone: set[str] = set()
        self.no_ttl = False
        self.lists_no_runs = False
        self.page = 1000
        self._clock = datetime(2026, 1, 1, tzinfo=UTC)

    def names(self) -> list[str]:
        """Names of the listed checkpoints, oldest first."""
        return [path.rsplit("/", 1)[1] for path in self.checkpoints]

    async def _answer(self, request: Recorded) -> Reply:
        path, body = request.path, request.body if isinstance(request.body, dict) else {}
        if (gone := self._gone(path, body)) is not None:
            return gone
        match request.method, path.strip("/").split("/"):
            case "POST", ["save_weights"]:
                self._keep(body)
            case "POST", ["load_weights"] if "model_id" not in body:
                if body["path"] in self.unloadable:
                    return self._failed(request, self.unloadable[body["path"]])
            case "POST", ["weights_info"]:
                if body["tinker_path"] not in self.checkpoints:
                    return Reply(404, {"detail": f"no {body['tinker_path']}"})
            case "GET", ["checkpoints"]:
                return self._list(request.query)
            case "GET", ["training_runs", run, "checkpoints"]:
                own = [c for p, c in self.checkpoints.items() if p.split("/")[2] == run]
                return Reply(body={"checkpoints": own, "cursor": None})
            case "GET", ["training_runs", run]:
                return self._training_run(run)
            case "DELETE", ["training_runs", run, "checkpoints", kind, name]:
                self.deleted.append(name)
                found = self.checkpoints.pop(f"tinker://{run}/{kind}/{name}", None)
                return Reply(204) if found else Reply(404, {"detail": "none"})
            case "PUT", ["training_runs", run, "checkpoints", kind, name, "ttl"]:
                if self.no_ttl:
                    return Reply(404, {"detail": "no such route"})
                self.ttls.append((name, body["ttl_seconds"]))
                return Reply(204)
        return await super()._answer(request)

    def _gone(self, path: str, body: dict[str, Any]) -> Reply | None:
        named = {body.get("model_id"), body.get("session_id")}
        if path.endswith("/finish") or not named & self.gone:
            return None
        return Reply(410, {"detail": "gone"})

    def _keep(self, body: dict[str, Any]) -> None:
        path = f"tinker://{body['model_id']}/weights/{body['path']}"
        self._clock += timedelta(seconds=1)
        if path not in self.checkpoints and not self.hides(path):
            self.checkpoints[path] = {
                "checkpoint_id": f"weights/{body['path']}",
                "checkpoint_type": "training",
                "time": self._clock.isoformat(),
                "tinker_path": path,
                "user_metadata": None if self.drops_metadata else body.get("user_metadata"),
            }

    def _list(self, query: str) -> Reply:
        params = dict(part.split("=") for part in query.split("&"))
        offset, limit = int(params["offset"]), min(int(params["limit"]), self.page)
        newest_first = list(self.checkpoints.values())[::-1]
        cursor = {"offset": offset, "limit": limit, "total_count": len(newest_first)}
        return Reply(body={"checkpoints": newest_first[offset : offset + limit], "cursor": cursor})

    def _training_run(self, run: str) -> Reply:
        if run in self.gone or self.lists_no_runs:
            return Reply(404, {"detail": "no such run"})
        body = {
            "training_run_id": run,
            "base_model": "fake/model",
            "model_owner": "me",
            "is_lora": True,
            "corrupted": run in self.corrupted,
            "last_request_time": self._clock.isoformat(),
        }
        return Reply(body=body)

    def _failed(self, request: Recorded, category: str) -> Reply:
        body = request.body
        run = f"{body['session_id']}:train:{body['model_seq_id']}"
        failure = {"error": "this checkpoint is damaged", "category": category}
        return self._created(("create", run, 0), request, run, Reply(body=failure))
