"""RestClient: what is there, without a session."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

from everstep.client._futures import APIFuture
from everstep.client._http import Http
from everstep.wire import types
from everstep.wire.paths import TinkerPath, parse_path

T = TypeVar("T")


class RestClient:
    """Runs, checkpoints and models of a service. Every method returns at once with a future."""

    def __init__(self, http: Http) -> None:
        self._http = http

    def get_server_capabilities(self) -> APIFuture[types.GetServerCapabilitiesResponse]:
        """The models that are served."""
        return self._get("/get_server_capabilities", types.GetServerCapabilitiesResponse)

    def get_training_run(
        self, training_run_id: str, access_scope: str = "owned"
    ) -> APIFuture[types.TrainingRun]:
        """One run."""
        params = {"access_scope": access_scope}
        return self._get(f"/training_runs/{training_run_id}", types.TrainingRun, params)

    def get_training_run_by_tinker_path(
        self, tinker_path: str, access_scope: str = "owned"
    ) -> APIFuture[types.TrainingRun]:
        """The run of a checkpoint."""
        return self.get_training_run(parse_path(tinker_path).run_id, access_scope)

    def list_training_runs(
        self, limit: int = 20, offset: int = 0, access_scope: str = "owned"
    ) -> APIFuture[types.TrainingRunsResponse]:
        """A page of runs, the latest used first."""
        params = {"limit": limit, "offset": offset, "access_scope": access_scope}
        return self._get("/training_runs", types.TrainingRunsResponse, params)

    def list_checkpoints(self, training_run_id: str) -> APIFuture[types.CheckpointsListResponse]:
        """All checkpoints of a run."""
        path = f"/training_runs/{training_run_id}/checkpoints"
        return self._get(path, types.CheckpointsListResponse)

    def list_user_checkpoints(
        self, limit: int = 100, offset: int = 0
    ) -> APIFuture[types.CheckpointsListResponse]:
        """A page of all checkpoints, newest first."""
        params = {"limit": limit, "offset": offset}
        return self._get("/checkpoints", types.CheckpointsListResponse, params)

    def get_weights_info_by_tinker_path(
        self, tinker_path: str
    ) -> APIFuture[types.WeightsInfoResponse]:
        """What a checkpoint was trained with."""
        return APIFuture.of(
            self._http.call(
                "POST",
                "/weights_info",
                types.WeightsInfoResponse,
                json={"tinker_path": tinker_path},
            )
        )

    def get_sampler(self, sampler_id: str) -> APIFuture[types.GetSamplerResponse]:
        """What a sampler samples from."""
        return self._get(f"/samplers/{sampler_id}", types.GetSamplerResponse)

    def delete_checkpoint(self, training_run_id: str, checkpoint_id: str) -> APIFuture[None]:
        """Delete a checkpoint, ``weights/<name>``, for good."""
        return self._do("DELETE", _path(training_run_id, checkpoint_id))

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Delete a checkpoint for good."""
        return self._do("DELETE", _checkpoint(tinker_path))

    def publish_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Let everyone read a checkpoint."""
        return self._do("POST", _checkpoint(tinker_path) + "/publish")

    def unpublish_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Let only its owner read a checkpoint."""
        return self._do("DELETE", _checkpoint(tinker_path) + "/publish")

    def set_checkpoint_ttl_from_tinker_path(
        self, tinker_path: str, ttl_seconds: int | None
    ) -> APIFuture[None]:
        """Have a checkpoint expire so long from now; None: never."""
        body = {"ttl_seconds": ttl_seconds}
        return self._do("PUT", _checkpoint(tinker_path) + "/ttl", json=body)

    def get_session(self, session_id: str) -> APIFuture[types.GetSessionResponse]:
        """A session's runs and samplers."""
        return self._get(f"/sessions/{session_id}", types.GetSessionResponse)

    def list_sessions(
        self, limit: int = 20, offset: int = 0
    ) -> APIFuture[types.ListSessionsResponse]:
        """A page of session ids."""
        params = {"limit": limit, "offset": offset}
        return self._get("/sessions", types.ListSessionsResponse, params)

    def __getattr__(self, name: str) -> Any:
        """``<method>_async``: the method, to be awaited for its result."""
        if name.endswith("_async") and not name.startswith("_"):
            return getattr(self, name.removesuffix("_async"))
        raise AttributeError(f"RestClient has no attribute {name!r}")

    def _get(self, path: str, answer: Any, params: dict[str, Any] | None = None) -> APIFuture[Any]:
        return APIFuture.of(self._http.call("GET", path, answer, params=params))

    def _do(self, method: str, path: str, **arguments: Any) -> APIFuture[None]:
        async def work() -> None:
            await self._http.request(method, path, **arguments)

        done: Coroutine[Any, Any, None] = work()
        return APIFuture.of(done)


def _path(run_id: str, checkpoint_id: str) -> str:
    return f"/training_runs/{run_id}/checkpoints/{checkpoint_id}"


def _checkpoint(tinker_path: str) -> str:
    path: TinkerPath = parse_path(tinker_path)
    return _path(path.run_id, path.checkpoint_id)
