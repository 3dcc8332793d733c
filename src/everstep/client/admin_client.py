"""AdminClient: what needs the role of an administrator."""

from __future__ import annotations

from datetime import date, datetime
from typing import Literal

from everstep.client._futures import APIFuture
from everstep.client._rest import Rest
from everstep.client._twins import gives_result
from everstep.wire import types

AuditEvents = Literal["all", "checkpoints", "projects", "teams", "organizations"]


class AdminClient(Rest):
    """Audit log, billing and storage of an organization; see `Rest` for its arguments."""

    def get_audit_log(
        self, event_type: AuditEvents = "all", day: date | None = None
    ) -> APIFuture[types.AuditLogResponse]:
        """What was done in a day.

        Args:
            event_type: to what.
            day: in UTC; today when not given.
        """
        params = {"event_type": event_type} | ({"day": day.isoformat()} if day else {})
        return self._get("/audit", types.AuditLogResponse, params)

    def get_billing_usage(
        self, starting_on: datetime | str, ending_before: datetime | str
    ) -> APIFuture[types.BillingUsageResponse]:
        """Use by the hour.

        Args:
            starting_on: begin of the window, with its time zone.
            ending_before: its end, excluded.

        Raises:
            ValueError: they are no such times.
        """
        request = types.GetBillingUsageRequest.model_validate(
            {"starting_on": starting_on, "ending_before": ending_before}
        )
        params = request.model_dump(mode="json")
        return self._get("/billing/usage/events", types.BillingUsageResponse, params)

    def get_current_checkpoint_storage_usage(
        self, project_id: str | None = None
    ) -> APIFuture[types.CurrentCheckpointStorageUsageResponse]:
        """What checkpoints take now.

        Args:
            project_id: only of this project.
        """
        params = {"project_id": project_id} if project_id is not None else {}
        answer = types.CurrentCheckpointStorageUsageResponse
        return self._get("/billing/usage/checkpoints/current", answer, params)

    get_audit_log_async = gives_result(get_audit_log)
    get_billing_usage_async = gives_result(get_billing_usage)
    get_current_checkpoint_storage_usage_async = gives_result(get_current_checkpoint_storage_usage)
