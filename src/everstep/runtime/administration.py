"""What administrators ask: what was done, and what checkpoints take."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta

from everstep.ledger import Event, Ledger
from everstep.runtime.access import OWNER
from everstep.wire import types

_RESOURCES = {
    "all": None,
    "checkpoints": "checkpoint",
    "projects": "project",
    "teams": "team",
    "organizations": "organization",
}


class Administration:
    """Answers from the ledger, in the wire's types."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def audit_log(
        self, event_type: str, day: date | None, *, limit: int | None = None, cursor: int = 0
    ) -> types.AuditLogResponse:
        """What was done in a day, in order.

        Args:
            event_type: ``all``, or to what.
            day: in UTC; None: today.
            limit: at most so many; None: all.
            cursor: ``next_cursor`` of the page before; 0: the first.
        """
        start = datetime.combine(day or datetime.now(UTC).date(), time(), UTC)
        found = await self._ledger.audit.between(
            start,
            start + timedelta(days=1),
            resource=_RESOURCES[event_type],
            after=cursor,
            limit=None if limit is None else limit + 1,
        )
        more = limit is not None and len(found) > limit
        page = found[:limit] if more else found
        return types.AuditLogResponse(
            entries=[_entry(each) for each in page],
            next_cursor=page[-1].number if more else None,
        )

    async def storage(
        self, project_id: str | None = None
    ) -> types.CurrentCheckpointStorageUsageResponse:
        """What checkpoints take now, by project. It costs nothing."""
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
                for each in await self._ledger.directory.stored(project_id)
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
