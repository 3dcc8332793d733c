"""RestClient: what is there, without a session."""

from __future__ import annotations

import asyncio
import os
import warnings
from datetime import date, datetime
from typing import Any, Literal

from pydantic import BaseModel

from everstep.client._archive import archive_url_of
from everstep.client._credentials import claims
from everstep.client._errors import TinkerError
from everstep.client._experimental import ExperimentalWarning
from everstep.client._futures import APIFuture
from everstep.client._http import read
from everstep.client._rest import Rest
from everstep.client._twins import gives_result
from everstep.client.admin_client import AdminClient, AuditEvents
from everstep.wire import types
from everstep.wire.paths import CheckpointKind, parse_path

AccessScope = Literal["owned", "accessible"]
_EXPORT_POLL_SECONDS = 5.0


class RestClient(Rest):
    """Runs, checkpoints, sessions and models of a service; see `Rest` for its arguments.

    Every method returns at once with a future.
    """

    # Models and runs

    def get_server_capabilities(self) -> APIFuture[types.GetServerCapabilitiesResponse]:
        """The models that are served."""
        return self._get("/get_server_capabilities", types.GetServerCapabilitiesResponse)

    def get_training_run(
        self, training_run_id: str, access_scope: AccessScope = "owned"
    ) -> APIFuture[types.TrainingRun]:
        """One run."""
        params = {"access_scope": access_scope}
        return self._get(f"/training_runs/{training_run_id}", types.TrainingRun, params)

    def get_training_run_by_tinker_path(
        self, tinker_path: str, access_scope: AccessScope = "owned"
    ) -> APIFuture[types.TrainingRun]:
        """The run of a checkpoint."""
        return self.get_training_run(parse_path(tinker_path).run_id, access_scope)

    def list_training_runs(
        self,
        limit: int = 20,
        offset: int = 0,
        access_scope: AccessScope = "owned",
        project_id: str | None = None,
    ) -> APIFuture[types.TrainingRunsResponse]:
        """A page of runs, the latest used first.

        Args:
            limit: how many.
            offset: how many to leave out before them.
            access_scope: ``owned``, or all that are ``accessible``.
            project_id: only of this project.
        """
        params: dict[str, Any] = {"limit": limit, "offset": offset, "access_scope": access_scope}
        if project_id is not None:
            params["project_id"] = project_id
        return self._get("/training_runs", types.TrainingRunsResponse, params)

    def get_sampler(self, sampler_id: str) -> APIFuture[types.GetSamplerResponse]:
        """What a sampler samples from."""
        return self._get(f"/samplers/{sampler_id}", types.GetSamplerResponse)

    # Checkpoints

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
        body = {"tinker_path": tinker_path}
        return self._call("POST", "/weights_info", types.WeightsInfoResponse, json=body)

    def get_external_weights_urls(
        self, tinker_path: str
    ) -> APIFuture[types.ExternalWeightsUrlsResponse]:
        """Addresses from which an external checkpoint's files can be fetched.

        Raises:
            ValueError: the path is not of an external checkpoint.
        """
        if parse_path(tinker_path).kind is not CheckpointKind.EXTERNAL:
            raise ValueError(f"{tinker_path} is not an external checkpoint; save one first")
        path = f"{_checkpoint(tinker_path)}/external_weights_urls"
        return self._get(path, types.ExternalWeightsUrlsResponse)

    def get_checkpoint_archive_url(
        self, training_run_id: str, checkpoint_id: str
    ) -> APIFuture[types.CheckpointArchiveUrlResponse]:
        """The address of a checkpoint, ``weights/<name>``, as a tar.

        Newer services of the vendor don't have it (`NotFoundError`).
        """

        async def work() -> types.CheckpointArchiveUrlResponse:
            http = await self.holder.configured()
            path = f"{_path(training_run_id, checkpoint_id)}/archive"
            headers = {"Accept": "application/json"}
            answer = await http.request("GET", path, headers=headers, follow_redirects=False)
            return read(types.CheckpointArchiveUrlResponse, archive_url_of(answer))

        return APIFuture.of(work())

    def get_checkpoint_archive_url_from_tinker_path(
        self, tinker_path: str
    ) -> APIFuture[types.CheckpointArchiveUrlResponse]:
        """The address of a checkpoint as a tar."""
        path = parse_path(tinker_path)
        return self.get_checkpoint_archive_url(path.run_id, path.checkpoint_id)

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

    def copy_weights(
        self,
        path: str,
        destination_project_id: str | None = None,
        *,
        ttl_seconds: int | None = None,
        weights_access_token: str | None = None,
    ) -> APIFuture[str]:
        """Copy a checkpoint into a project; no bytes are copied.

        Args:
            path: of the checkpoint.
            destination_project_id: the project; else ``TINKER_PROJECT_ID``.
            ttl_seconds: the copy expires after so long; None: never.
            weights_access_token: for checkpoints of another account.

        Returns:
            The copy's path.

        Raises:
            ValueError: no project is named.
        """
        project = destination_project_id or os.environ.get("TINKER_PROJECT_ID")
        if not project:
            raise ValueError("give destination_project_id, or set TINKER_PROJECT_ID")
        request = types.CopyWeightsRequest(
            source_path=path, destination_project_id=project, ttl_seconds=ttl_seconds
        )
        headers = {}
        if weights_access_token is not None:
            headers["X-Tinker-Weights-Access-Token"] = weights_access_token

        async def work() -> str:
            http = await self.holder.configured()
            answer = await http.call(
                "POST",
                "/copy_weights",
                types.CopyWeightsResponse,
                json=request.model_dump(mode="json", exclude_none=True),
                headers=headers,
            )
            return answer.tinker_path

        return APIFuture.of(work())

    # Sessions

    def get_session(
        self, session_id: str, access_scope: AccessScope = "owned"
    ) -> APIFuture[types.GetSessionResponse]:
        """A session's runs and samplers."""
        params = {"access_scope": access_scope}
        return self._get(f"/sessions/{session_id}", types.GetSessionResponse, params)

    def list_sessions(
        self, limit: int = 20, offset: int = 0, access_scope: AccessScope = "owned"
    ) -> APIFuture[types.ListSessionsResponse]:
        """A page of session ids."""
        params = {"limit": limit, "offset": offset, "access_scope": access_scope}
        return self._get("/sessions", types.ListSessionsResponse, params)

    def search_sessions(
        self, request: types.SessionSearchRequest
    ) -> APIFuture[types.SessionSearchResponse]:
        """A page of the sessions that meet a search, newest first. May change."""
        warnings.warn("search_sessions may change", ExperimentalWarning, stacklevel=2)
        body = request.model_dump(mode="json", exclude_none=True)
        return self._call("POST", "/sessions/search", types.SessionSearchResponse, json=body)

    def search_checkpoints(
        self, request: types.CheckpointSearchRequest
    ) -> APIFuture[types.CheckpointSearchResponse]:
        """A page of the checkpoints that meet a search, newest first. May change."""
        warnings.warn("search_checkpoints may change", ExperimentalWarning, stacklevel=2)
        body = request.model_dump(mode="json", exclude_none=True)
        return self._call("POST", "/checkpoints/search", types.CheckpointSearchResponse, json=body)

    def assign_session_project(self, session_id: str, project_id: str) -> APIFuture[None]:
        """Move a session into a project."""
        return self._do("PUT", f"/sessions/{session_id}/project", json={"project_id": project_id})

    def export_session_trace(self, session_id: str) -> APIFuture[str]:
        """Have the service draw a session's time line; gives the address of the file.

        Raises:
            TinkerError: the service could not.
        """

        async def work() -> str:
            http = await self.holder.configured()
            while True:
                path = f"/sessions/{session_id}/trace_export"
                answer = await http.call("GET", path, _TraceExport)
                if answer.status == "ready" and answer.url is not None:
                    return answer.url
                if answer.status != "pending":
                    raise TinkerError(f"no trace of {session_id}: {answer.error or 'no reason'}")
                await asyncio.sleep(_EXPORT_POLL_SECONDS)

        return APIFuture.of(work())

    def whoami(self) -> APIFuture[types.WhoamiResponse]:
        """Whose credentials are in use.

        Raises:
            RuntimeError: the service doesn't exchange credentials for tokens that would say it.
        """

        async def work() -> types.WhoamiResponse:
            await self.holder.configured()
            token = await self.holder.credential.token()
            if token is None:
                raise RuntimeError("whoami: this service has no tokens that say who calls")
            told = claims(token)
            return types.WhoamiResponse(
                user_urn=told["sub"],
                org_urn=f"tml:organization:{told['org_id']}",
                email=told.get("email") or None,
            )

        return APIFuture.of(work())

    # Moved to AdminClient; kept for older scripts

    def get_audit_log(
        self, event_type: AuditEvents = "all", day: date | None = None
    ) -> APIFuture[types.AuditLogResponse]:
        """`AdminClient.get_audit_log`."""
        return AdminClient(self.holder).get_audit_log(event_type, day)

    def get_billing_usage(
        self, starting_on: datetime | str, ending_before: datetime | str
    ) -> APIFuture[types.BillingUsageResponse]:
        """`AdminClient.get_billing_usage`."""
        return AdminClient(self.holder).get_billing_usage(starting_on, ending_before)

    def get_current_checkpoint_storage_usage(
        self, project_id: str | None = None
    ) -> APIFuture[types.CurrentCheckpointStorageUsageResponse]:
        """`AdminClient.get_current_checkpoint_storage_usage`."""
        return AdminClient(self.holder).get_current_checkpoint_storage_usage(project_id)

    get_server_capabilities_async = gives_result(get_server_capabilities)
    get_training_run_async = gives_result(get_training_run)
    get_training_run_by_tinker_path_async = gives_result(get_training_run_by_tinker_path)
    list_training_runs_async = gives_result(list_training_runs)
    get_sampler_async = gives_result(get_sampler)
    list_checkpoints_async = gives_result(list_checkpoints)
    list_user_checkpoints_async = gives_result(list_user_checkpoints)
    get_weights_info_by_tinker_path_async = gives_result(get_weights_info_by_tinker_path)
    get_external_weights_urls_async = gives_result(get_external_weights_urls)
    get_checkpoint_archive_url_async = gives_result(get_checkpoint_archive_url)
    get_checkpoint_archive_url_from_tinker_path_async = gives_result(
        get_checkpoint_archive_url_from_tinker_path
    )
    delete_checkpoint_async = gives_result(delete_checkpoint)
    delete_checkpoint_from_tinker_path_async = gives_result(delete_checkpoint_from_tinker_path)
    publish_checkpoint_from_tinker_path_async = gives_result(publish_checkpoint_from_tinker_path)
    unpublish_checkpoint_from_tinker_path_async = gives_result(
        unpublish_checkpoint_from_tinker_path
    )
    set_checkpoint_ttl_from_tinker_path_async = gives_result(set_checkpoint_ttl_from_tinker_path)
    copy_weights_async = gives_result(copy_weights)
    get_session_async = gives_result(get_session)
    list_sessions_async = gives_result(list_sessions)
    assign_session_project_async = gives_result(assign_session_project)
    export_session_trace_async = gives_result(export_session_trace)
    get_audit_log_async = gives_result(get_audit_log)
    get_billing_usage_async = gives_result(get_billing_usage)
    get_current_checkpoint_storage_usage_async = gives_result(get_current_checkpoint_storage_usage)


class _TraceExport(BaseModel):
    status: Literal["pending", "ready", "failed"]
    url: str | None = None
    error: str | None = None


def _path(run_id: str, checkpoint_id: str) -> str:
    return f"/training_runs/{run_id}/checkpoints/{checkpoint_id}"


def _checkpoint(tinker_path: str) -> str:
    path = parse_path(tinker_path)
    return _path(path.run_id, path.checkpoint_id)
