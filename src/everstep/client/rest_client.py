"""REST clients: runs, checkpoints, sessions and administration of a service, without a session."""

from __future__ import annotations

import os
import warnings
from datetime import date, datetime
from typing import Any, Literal

from everstep.addresses import route
from everstep.client._operations.async_aliases import result_alias
from everstep.client._operations.deletion import DeletionCalls
from everstep.client._operations.trace_export import exported_trace
from everstep.client._transport.archive import archive_url
from everstep.client._transport.credentials import claims
from everstep.client._transport.errors import ExperimentalWarning
from everstep.client._transport.futures import APIFuture
from everstep.client._transport.http import read
from everstep.client._transport.session import Connection, shared_connection
from everstep.client._transport.telemetry import Telemetry
from everstep.wire import types
from everstep.wire.base import convert
from everstep.wire.paths import CheckpointKind, parse_path

AccessScope = Literal["owned", "accessible"]
AuditEvents = Literal["all", "checkpoints", "projects", "teams", "organizations"]


class _Administration:
    """Calls that `AdminClient` and `RestClient` share."""

    def __init__(
        self,
        _holder: Connection | None = None,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
    ) -> None:
        if _holder is not None and (base_url is not None or api_key is not None):
            raise ValueError(f"{type(self).__name__}: give a connection, or base_url and api_key")
        self.holder = _holder or shared_connection(base_url, api_key)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.holder.http.base_url}>"

    def get_telemetry(self) -> Telemetry | None:
        """Return None: only sessions have telemetry."""
        return None

    def get_audit_log(
        self, event_type: AuditEvents = "all", day: date | None = None
    ) -> APIFuture[types.AuditLogResponse]:
        """List the audit log of a day. Needs the role of an administrator.

        Args:
            event_type: kind of object that the events are about.
            day: in UTC, today by default.
        """
        params = {"event_type": event_type} | ({"day": day.isoformat()} if day else {})
        return self._get("/audit", types.AuditLogResponse, params)

    def get_billing_usage(
        self, starting_on: datetime | str, ending_before: datetime | str
    ) -> APIFuture[types.BillingUsageResponse]:
        """Report usage by the hour. Needs the role of an administrator.

        Args:
            starting_on: start of the window, with its time zone.
            ending_before: end of the window, excluded.

        Raises:
            ValueError: a time can't be parsed, or has no time zone.
        """
        request = types.GetBillingUsageRequest.model_validate(
            {"starting_on": starting_on, "ending_before": ending_before}
        )
        params = request.model_dump(mode="json")
        return self._get("/billing/usage/events", types.BillingUsageResponse, params)

    def get_current_checkpoint_storage_usage(
        self, project_id: str | None = None
    ) -> APIFuture[types.CurrentCheckpointStorageUsageResponse]:
        """Report the storage that checkpoints use now. Needs the role of an administrator.

        Args:
            project_id: only count this project.
        """
        params = {"project_id": project_id} if project_id is not None else {}
        answer = types.CurrentCheckpointStorageUsageResponse
        return self._get("/billing/usage/checkpoints/current", answer, params)

    get_audit_log_async = result_alias(get_audit_log)
    get_billing_usage_async = result_alias(get_billing_usage)
    get_current_checkpoint_storage_usage_async = result_alias(get_current_checkpoint_storage_usage)

    def _get(self, path: str, answer: Any, params: dict[str, Any] | None = None) -> APIFuture[Any]:
        return self.holder.call("GET", path, answer, params=params)


class AdminClient(_Administration):
    """Audit log, billing and storage usage of an organization.

    Args:
        holder: the connection to use, not together with the other arguments.
        base_url: of the service, by default ``TINKER_BASE_URL``.
        api_key: by default ``TINKER_API_KEY``, or the stored key.
    """


class RestClient(DeletionCalls, _Administration):
    """Runs, checkpoints, sessions and models of a service. Every method returns a future at once.

    It takes the arguments of `AdminClient`, whose methods are kept here for older scripts.
    """

    def get_server_capabilities(self) -> APIFuture[types.GetServerCapabilitiesResponse]:
        """List the models that the service serves."""
        return self._get("/get_server_capabilities", types.GetServerCapabilitiesResponse)

    def get_training_run(
        self, training_run_id: str, access_scope: AccessScope = "owned"
    ) -> APIFuture[types.TrainingRun]:
        """Get a run."""
        params = {"access_scope": access_scope}
        return self._get(route("training_runs", training_run_id), types.TrainingRun, params)

    def get_training_run_by_tinker_path(
        self, tinker_path: str, access_scope: AccessScope = "owned"
    ) -> APIFuture[types.TrainingRun]:
        """Get the run of a checkpoint."""
        return self.get_training_run(parse_path(tinker_path).run_id, access_scope)

    def list_training_runs(
        self,
        limit: int = 20,
        offset: int = 0,
        access_scope: AccessScope = "owned",
        project_id: str | None = None,
    ) -> APIFuture[types.TrainingRunsResponse]:
        """List a page of runs, most recently used first.

        Args:
            limit: page size.
            offset: number of runs to skip.
            access_scope: ``owned``, or all that are ``accessible``.
            project_id: only list runs of this project.
        """
        params: dict[str, Any] = {"limit": limit, "offset": offset, "access_scope": access_scope}
        if project_id is not None:
            params["project_id"] = project_id
        return self._get("/training_runs", types.TrainingRunsResponse, params)

    def get_sampler(self, sampler_id: str) -> APIFuture[types.GetSamplerResponse]:
        """Get the base model and checkpoint of a sampler."""
        return self._get(route("samplers", sampler_id), types.GetSamplerResponse)

    def list_checkpoints(self, training_run_id: str) -> APIFuture[types.CheckpointsListResponse]:
        """List all checkpoints of a run."""
        path = route("training_runs", training_run_id, "checkpoints")
        return self._get(path, types.CheckpointsListResponse)

    def list_user_checkpoints(
        self, limit: int = 100, offset: int = 0
    ) -> APIFuture[types.CheckpointsListResponse]:
        """List a page of all checkpoints, newest first."""
        params = {"limit": limit, "offset": offset}
        return self._get("/checkpoints", types.CheckpointsListResponse, params)

    def get_weights_info_by_tinker_path(
        self, tinker_path: str
    ) -> APIFuture[types.WeightsInfoResponse]:
        """Get the base model and adapter settings of a checkpoint."""
        body = {"tinker_path": tinker_path}
        return self.holder.call("POST", "/weights_info", types.WeightsInfoResponse, json=body)

    def get_external_weights_urls(
        self, tinker_path: str
    ) -> APIFuture[types.ExternalWeightsUrlsResponse]:
        """Get download URLs of an external checkpoint's files.

        Raises:
            ValueError: the path is not that of an external checkpoint.
        """
        if parse_path(tinker_path).kind is not CheckpointKind.EXTERNAL:
            raise ValueError(
                f"{tinker_path} is not an external checkpoint; save one with save_weights_external"
            )
        path = f"{_checkpoint(tinker_path)}/external_weights_urls"
        return self._get(path, types.ExternalWeightsUrlsResponse)

    def get_checkpoint_archive_url(
        self, training_run_id: str, checkpoint_id: str
    ) -> APIFuture[types.CheckpointArchiveUrlResponse]:
        """Get the download URL of a checkpoint, ``weights/<name>``, as a tar.

        Newer services of the vendor lack the endpoint (`NotFoundError`).
        """

        async def work() -> types.CheckpointArchiveUrlResponse:
            http = await self.holder.configured()
            path = f"{_path(training_run_id, checkpoint_id)}/archive"
            headers = {"Accept": "application/json"}
            answer = await http.request("GET", path, headers=headers, follow_redirects=False)
            return read(types.CheckpointArchiveUrlResponse, archive_url(answer))

        return APIFuture.of(work())

    def get_checkpoint_archive_url_from_tinker_path(
        self, tinker_path: str
    ) -> APIFuture[types.CheckpointArchiveUrlResponse]:
        """Get the download URL of a checkpoint as a tar."""
        path = parse_path(tinker_path)
        return self.get_checkpoint_archive_url(path.run_id, path.checkpoint_id)

    def delete_checkpoint(self, training_run_id: str, checkpoint_id: str) -> APIFuture[None]:
        """Delete a checkpoint, ``weights/<name>``, permanently."""
        return self.holder.do("DELETE", _path(training_run_id, checkpoint_id))

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Delete a checkpoint permanently."""
        return self.holder.do("DELETE", _checkpoint(tinker_path))

    def publish_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Make a checkpoint readable for everyone."""
        return self.holder.do("POST", _checkpoint(tinker_path) + "/publish")

    def unpublish_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Make a checkpoint readable for its owner only."""
        return self.holder.do("DELETE", _checkpoint(tinker_path) + "/publish")

    def set_checkpoint_ttl_from_tinker_path(
        self, tinker_path: str, ttl_seconds: int | None
    ) -> APIFuture[None]:
        """Set a checkpoint's time to live, counted from now. None: it never expires."""
        body = {"ttl_seconds": ttl_seconds}
        return self.holder.do("PUT", _checkpoint(tinker_path) + "/ttl", json=body)

    def copy_weights(
        self,
        path: str,
        destination_project_id: str | None = None,
        *,
        ttl_seconds: int | None = None,
        weights_access_token: str | None = None,
    ) -> APIFuture[str]:
        """Copy a checkpoint into a project. No bytes are copied.

        Args:
            path: of the checkpoint.
            destination_project_id: the project, by default ``TINKER_PROJECT_ID``.
            ttl_seconds: seconds until the copy expires. None: never.
            weights_access_token: for checkpoints of another account.

        Returns:
            The copy's path.

        Raises:
            ValueError: no project was given.
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

    def get_session(
        self, session_id: str, access_scope: AccessScope = "owned"
    ) -> APIFuture[types.GetSessionResponse]:
        """Get a session's runs and samplers."""
        params = {"access_scope": access_scope}
        return self._get(route("sessions", session_id), types.GetSessionResponse, params)

    def list_sessions(
        self, limit: int = 20, offset: int = 0, access_scope: AccessScope = "owned"
    ) -> APIFuture[types.ListSessionsResponse]:
        """List a page of session ids."""
        params = {"limit": limit, "offset": offset, "access_scope": access_scope}
        return self._get("/sessions", types.ListSessionsResponse, params)

    def search_sessions(
        self, request: types.SessionSearchRequest
    ) -> APIFuture[types.SessionSearchResponse]:
        """Search sessions. Returns a page of matches, newest first. Experimental."""
        warnings.warn("search_sessions may change", ExperimentalWarning, stacklevel=2)
        request = convert(types.SessionSearchRequest, request, "request")
        body = request.model_dump(mode="json", exclude_none=True)
        return self.holder.call("POST", "/sessions/search", types.SessionSearchResponse, json=body)

    def search_checkpoints(
        self, request: types.CheckpointSearchRequest
    ) -> APIFuture[types.CheckpointSearchResponse]:
        """Search checkpoints. Returns a page of matches, newest first. Experimental."""
        warnings.warn("search_checkpoints may change", ExperimentalWarning, stacklevel=2)
        request = convert(types.CheckpointSearchRequest, request, "request")
        body = request.model_dump(mode="json", exclude_none=True)
        return self.holder.call(
            "POST", "/checkpoints/search", types.CheckpointSearchResponse, json=body
        )

    def assign_session_project(self, session_id: str, project_id: str) -> APIFuture[None]:
        """Move a session into a project."""
        return self.holder.do(
            "PUT", route("sessions", session_id, "project"), json={"project_id": project_id}
        )

    def export_session_trace(self, session_id: str) -> APIFuture[str]:
        """Have the service export a session's timeline, and return the file's URL.

        Raises:
            TinkerError: the export failed.
        """
        return APIFuture.of(exported_trace(self.holder, session_id))

    def whoami(self) -> APIFuture[types.WhoamiResponse]:
        """Return the user whose credentials are in use.

        Raises:
            RuntimeError: the service doesn't exchange credentials for tokens, which name the user.
        """

        async def work() -> types.WhoamiResponse:
            await self.holder.configured()
            token = await self.holder.credential.token()
            if token is None:
                raise RuntimeError("whoami: this service issues no tokens that name the user")
            user = claims(token)
            return types.WhoamiResponse(
                user_urn=user["sub"],
                org_urn=f"tml:organization:{user['org_id']}",
                email=user.get("email") or None,
            )

        return APIFuture.of(work())

    get_server_capabilities_async = result_alias(get_server_capabilities)
    get_training_run_async = result_alias(get_training_run)
    get_training_run_by_tinker_path_async = result_alias(get_training_run_by_tinker_path)
    list_training_runs_async = result_alias(list_training_runs)
    get_sampler_async = result_alias(get_sampler)
    list_checkpoints_async = result_alias(list_checkpoints)
    list_user_checkpoints_async = result_alias(list_user_checkpoints)
    get_weights_info_by_tinker_path_async = result_alias(get_weights_info_by_tinker_path)
    get_external_weights_urls_async = result_alias(get_external_weights_urls)
    get_checkpoint_archive_url_async = result_alias(get_checkpoint_archive_url)
    get_checkpoint_archive_url_from_tinker_path_async = result_alias(
        get_checkpoint_archive_url_from_tinker_path
    )
    delete_checkpoint_async = result_alias(delete_checkpoint)
    delete_checkpoint_from_tinker_path_async = result_alias(delete_checkpoint_from_tinker_path)
    publish_checkpoint_from_tinker_path_async = result_alias(publish_checkpoint_from_tinker_path)
    unpublish_checkpoint_from_tinker_path_async = result_alias(
        unpublish_checkpoint_from_tinker_path
    )
    set_checkpoint_ttl_from_tinker_path_async = result_alias(set_checkpoint_ttl_from_tinker_path)
    copy_weights_async = result_alias(copy_weights)
    get_session_async = result_alias(get_session)
    list_sessions_async = result_alias(list_sessions)
    assign_session_project_async = result_alias(assign_session_project)
    export_session_trace_async = result_alias(export_session_trace)


def _path(run_id: str, checkpoint_id: str) -> str:
    return route("training_runs", run_id, "checkpoints", *checkpoint_id.split("/"))


def _checkpoint(tinker_path: str) -> str:
    path = parse_path(tinker_path)
    return _path(path.run_id, path.checkpoint_id)
