"""Run queries: runs and checkpoints of a service."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from everstep.ledger import Checkpoint, CheckpointQuery, Ledger, Run
from everstep.runtime.authorization import OWNER
from everstep.runtime.queries.known_runs import known_run
from everstep.runtime.queries.rows import servable, servable_one
from everstep.runtime.queries.sessions import owned_by, projects
from everstep.wire import types
from everstep.wire.messages.inspection import EnvironmentChange
from everstep.wire.paths import CheckpointKind

ALL_KINDS = tuple(CheckpointKind)
_LAST_KINDS = (CheckpointKind.TRAINING, CheckpointKind.SAMPLER)


class RunQueries:
    """Reads runs and checkpoints from the ledger, as wire types."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def training_run(self, run_id: str) -> types.TrainingRun:
        """Return a run, or raise `Rejected` (404)."""
        run = await known_run(self._ledger, run_id)
        newest = await self._ledger.search.newest_checkpoints([run_id], _LAST_KINDS)
        built = _training_run(run, newest[run_id])
        return servable_one(built, f"run {run_id}")

    async def training_runs(
        self, limit: int, offset: int, project_id: str | None = None
    ) -> types.TrainingRunsResponse:
        """Return a page of runs, of a project or of all, the last used first."""
        runs, total = await self._ledger.search.list_runs(limit, offset, project_id)
        run_ids = [run.run_id for run in runs]
        newest = await self._ledger.search.newest_checkpoints(run_ids, _LAST_KINDS)
        rows = [(run, newest[run.run_id]) for run in runs]
        return types.TrainingRunsResponse(
            training_runs=servable(
                rows, lambda row: _training_run(*row), lambda row: row[0].run_id
            ),
            cursor=types.Cursor(offset=offset, limit=limit, total_count=total),
        )

    async def run_checkpoints(
        self, run_id: str, kinds: Collection[CheckpointKind] = ALL_KINDS
    ) -> types.CheckpointsListResponse:
        """Return all checkpoints of a run of some kinds, or raise `Rejected` (404)."""
        run = await known_run(self._ledger, run_id)
        found = await self._ledger.checkpoints(run.run_id)
        return types.CheckpointsListResponse(
            checkpoints=_checkpoints(c for c in found if c.kind in kinds), cursor=None
        )

    async def user_checkpoints(
        self, limit: int, offset: int, kinds: Collection[CheckpointKind] = ALL_KINDS
    ) -> types.CheckpointsListResponse:
        """Return a page of all checkpoints of some kinds, newest first."""
        wanted = [str(kind) for kind in kinds]
        found, total = await self._ledger.search.list_checkpoints(limit, offset, wanted)
        return types.CheckpointsListResponse(
            checkpoints=_checkpoints(found),
            cursor=types.Cursor(offset=offset, limit=limit, total_count=total),
        )

    async def search_checkpoints(
        self,
        request: types.CheckpointSearchRequest,
        kinds: Collection[CheckpointKind] = ALL_KINDS,
    ) -> types.CheckpointSearchResponse:
        """Return a page of the checkpoints of some kinds that match a search, newest first."""
        if not owned_by(request.owner):
            return types.CheckpointSearchResponse(checkpoints=[])
        cursor, kind = request.cursor, request.checkpoint_type
        found = await self._ledger.search.search_checkpoints(
            CheckpointQuery(
                kinds=[str(each) for each in kinds if kind in (None, str(each))],
                project_ids=projects(request.project_ids),
                user_metadata=request.user_metadata,
                base_models=request.base_models,
                before=(cursor.last_created_at, cursor.last_checkpoint_uuid) if cursor else None,
                limit=request.limit + 1,
            )
        )
        page, last = found[: request.limit], None
        if len(found) > request.limit:
            last = types.CheckpointSearchCursor(
                last_created_at=page[-1].created_at, last_checkpoint_uuid=page[-1].path
            )
        return types.CheckpointSearchResponse(checkpoints=_checkpoints(page), next_cursor=last)


def _training_run(run: Run, newest: Iterable[Checkpoint]) -> types.TrainingRun:
    last = {each.checkpoint_type: each for each in _checkpoints(newest)}
    return types.TrainingRun(
        training_run_id=run.run_id,
        base_model=run.base_model,
        model_owner=OWNER,
        is_lora=True,
        corrupted=run.status == "corrupted",
        environment_changes=[
            EnvironmentChange.model_validate(change) for change in run.environment_changes or []
        ]
        or None,
        lora_rank=run.lora["rank"],
        last_request_time=run.last_request_at,
        last_checkpoint=last.get("training"),
        last_sampler_checkpoint=last.get("sampler"),
        user_metadata=run.user_metadata,
    )


def _checkpoints(rows: Iterable[Checkpoint]) -> list[types.Checkpoint]:
    return servable(rows, _checkpoint, lambda row: row.path)


def _checkpoint(checkpoint: Checkpoint) -> types.Checkpoint:
    kind = CheckpointKind(checkpoint.kind)
    return types.Checkpoint(
        checkpoint_id=f"{kind.segment}/{checkpoint.name}",
        checkpoint_type=str(kind),
        time=checkpoint.created_at,
        tinker_path=checkpoint.path,
        size_bytes=checkpoint.size_bytes,
        public=checkpoint.public,
        user_metadata=checkpoint.user_metadata,
        expires_at=checkpoint.expires_at,
        base_model=checkpoint.base_model,
    )
