"""Audit queries: the audit log, and the storage that checkpoints use."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta

from everstep.ledger import Event, Ledger
from everstep.runtime.authorization import OWNER
from everstep.runtime.queries.rows import servable
from everstep.wire import types

_RESOURCES = {
    "all": None,
    "checkpoints": "checkpoint",
    "projects": "project",
    "teams": "team",
    "organizations": "organization",
}


class AuditQueries:
    """Reads the audit log and storage use from the ledger, as wire types."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def audit_log(
        self, event_type: str, day: date | None, *, limit: int | None = None, cursor: int = 0
    ) -> types.AuditLogResponse:
        """Return a page of a day's audit log, in order.

        Args:
            event_type: ``all``, or the kind of resource.
            day: the day in UTC, None for today.
            limit: maximum number of entries, None for all.
            cursor: ``next_cursor`` of the previous page, 0 for the first page.
        """
        start = datetime.combine(day or datetime.now(UTC).date(), time(), UTC)
        found = await self._ledger.audit.events_between(
            start,
            start + timedelta(days=1),
            resource=_RESOURCES[event_type],
            after=cursor,
            limit=None if limit is None else limit + 1,
        )
        more = limit is not None and len(found) > limit
        page = found[:limit] if more else found
        return types.AuditLogResponse(
            entries=servable(page, _entry, lambda event: f"event {event.number}"),
            next_cursor=page[-1].number if more else None,
        )

    async def storage(
        self, project_id: str | None = None
    ) -> types.CurrentCheckpointStorageUsageResponse:
        """Return the storage that checkpoints use now, by project."""
        return types.CurrentCheckpointStorageUsageResponse(
            data=[
                types.CurrentCheckpointStorageUsageItem(
                    project_id=each.project_id,
                    org_user_urn=OWNER,
                    user_name=OWNER,
                    checkpoint_count=each.count,
                    size_bytes=each.size_bytes,
                    size_gigabytes=each.size_bytes / 1e9,
                )
                for each in await self._ledger.search.storage_by_project(project_id)
            ]
        )


def _entry(event: Event) -> types.AuditLogEntry:
    about = {"actor": event.actor}
    if event.path is not None:
        about["tinker_path"] = event.path
    purpose = event.details.get("purpose")
    return types.AuditLogEntry(
        timestamp=event.at or datetime.fromtimestamp(0, UTC),
        event=event.event,
        event_details={**about, **event.details},
        model_id=event.run_id,
        tinker_path=event.path,
        purpose=str(purpose) if purpose is not None else None,
    )
