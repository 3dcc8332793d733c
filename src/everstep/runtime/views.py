"""What the service tells of models, runs and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from everstep.engine.info import ModelInfo
from everstep.ledger import Checkpoint, CheckpointQuery, Ledger, Run
from everstep.runtime.accept import Acceptance
from everstep.runtime.access import OWNER, Access
from everstep.runtime.checkpoints import Checkpoints
from everstep.runtime.errors import OperationFailed, Rejected
from everstep.runtime.payloads import optimizer_of
from everstep.runtime.session_views import owned_by, projects
from everstep.wire import types
from everstep.wire.errors import WireError
from everstep.wire.paths import CheckpointKind, TinkerPath

ALL_KINDS = tuple(CheckpointKind)


class Views:
    """Read-only answers, in the wire's types."""

    def __init__(
        self,
        ledger: Ledger,
        checkpoints: Checkpoints,
        acceptance: Acceptance,
        models: Callable[[], Mapping[str, ModelInfo]],
        access: Access,
    ) -> None:
        self._access = access
        self._ledger = ledger
        self._checkpoints = checkpoints
        self._acceptance = acceptance
        self._models = models

    def capabilities(self) -> types.GetServerCapabilitiesResponse:
        """The models that are served."""
        return types.GetServerCapabilitiesResponse(
            supported_models=[
                types.SupportedModel(
                    model_name=info.name,
                    max_context_length=info.max_context_length,
                    trainable=True,
                    sampleable=True,
                )
                for info in self._models().values()
            ]
        )

    async def model_info(self, model_id: str, near: bool = False) -> types.GetInfoResponse:
        """A run's model; raises `Rejected`: 404 for an unknown run, 503 when it isn't served.

        Args:
            model_id: the run's id.
            near: whether who asks is on this machine. Others are not told of a directory on it,
                from which they could load no tokenizer, but the name under which it is offered.
        """
        run = await self._acceptance.run(model_id)
        info = self._acceptance.base(run)
        unreachable = not near and Path(info.tokenizer_id).is_absolute()
        return types.GetInfoResponse.model_validate(
            {
                "model_id": run.run_id,
                "model_data": {
                    "arch": info.architecture,
                    "model_name": info.name,
                    "tokenizer_id": info.name if unreachable else info.tokenizer_id,
                },
                "is_lora": True,
                "lora_rank": run.lora["rank"],
                "model_name": info.name,
                "optimizer_config": run.optimizer,
            }
        )

    async def weights_info(
        self, tinker_path: str, token: str | None = None
    ) -> types.WeightsInfoResponse:
        """What a checkpoint was trained with; raises `Rejected` (400, 404).

        Args:
            tinker_path: of the checkpoint.
            token: the weights access token that was sent with it, if any.
        """
        try:
            await self._access.check(tinker_path, token)
            checkpoint = await self._checkpoints.find(tinker_path)
        except WireError as error:
            raise Rejected(400, str(error)) from error
        except OperationFailed as failure:
            raise Rejected(404, failure.message) from failure
        return types.WeightsInfoResponse.model_validate(
            {
                "base_model": checkpoint.base_model,
                "is_lora": True,
                "lora_rank": checkpoint.lora["rank"],
                "train_unembed": checkpoint.lora["train_unembed"],
                "train_mlp": checkpoint.lora["train_mlp"],
                "train_attn": checkpoint.lora["train_attn"],
                "lora_alpha": checkpoint.lora.get("alpha"),
                "lora_seed": checkpoint.lora.get("seed"),
                "optimizer_config": checkpoint.optimizer or optimizer_of(None),
            }
        )

    async def training_run(self, run_id: str) -> types.TrainingRun:
        """One run; raises `Rejected` (404) for an unknown one."""
        return await self._training_run(await self._acceptance.run(run_id))

    async def training_runs(
        self, limit: int, offset: int, project_id: str | None = None
    ) -> types.TrainingRunsResponse:
        """A page of runs, the latest used first; all, or those of a project."""
        runs, total = await self._ledger.directory.runs(limit, offset, project_id)
        return types.TrainingRunsResponse(
            training_runs=[await self._training_run(run) for run in runs],
            cursor=types.Cursor(offset=offset, limit=limit, total_count=total),
        )

    async def run_checkpoints(
        self, run_id: str, kinds: Collection[CheckpointKind] = ALL_KINDS
    ) -> types.CheckpointsListResponse:
        """All checkpoints of a run of some kinds, unpaginated; raises `Rejected` (404)."""
        run = await self._acceptance.run(run_id)
        found = await self._ledger.checkpoints(run.run_id)
        return types.CheckpointsListResponse(
            checkpoints=[_checkpoint(c) for c in found if c.kind in kinds], cursor=None
        )

    async def user_checkpoints(
        self, limit: int, offset: int, kinds: Collection[CheckpointKind] = ALL_KINDS
    ) -> types.CheckpointsListResponse:
        """A page of all checkpoints of some kinds, newest first."""
        wanted = [str(kind) for kind in kinds]
        found, total = await self._ledger.directory.checkpoints(limit, offset, wanted)
        return types.CheckpointsListResponse(
            checkpoints=[_checkpoint(c) for c in found],
            cursor=types.Cursor(offset=offset, limit=limit, total_count=total),
        )

    async def search_checkpoints(
        self,
        request: types.CheckpointSearchRequest,
        kinds: Collection[CheckpointKind] = ALL_KINDS,
    ) -> types.CheckpointSearchResponse:
        """A page of the checkpoints of some kinds that meet a search, newest first."""
        if not owned_by(request.owner):
            return types.CheckpointSearchResponse(checkpoints=[])
        cursor, kind = request.cursor, request.checkpoint_type
        found = await self._ledger.directory.search_checkpoints(
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
        return types.CheckpointSearchResponse(
            checkpoints=[_checkpoint(each) for each in page], next_cursor=last
        )

    async def _training_run(self, run: Run) -> types.TrainingRun:
        found = [_checkpoint(c) for c in await self._ledger.checkpoints(run.run_id)]
        found.sort(key=lambda c: c.time)
        last: dict[str, types.Checkpoint] = {c.checkpoint_type: c for c in found}
        return types.TrainingRun(
            training_run_id=run.run_id,
            base_model=run.base_model,
            model_owner=OWNER,
            is_lora=True,
            corrupted=run.status == "corrupted",
            lora_rank=run.lora["rank"],
            last_request_time=run.last_request_at,
            last_checkpoint=last.get("training"),
            last_sampler_checkpoint=last.get("sampler"),
            user_metadata=run.user_metadata,
        )


def _checkpoint(checkpoint: Checkpoint) -> types.Checkpoint:
    kind = CheckpointKind(checkpoint.kind)
    path = TinkerPath(checkpoint.run_id, kind, checkpoint.name)
    return types.Checkpoint(
        checkpoint_id=path.checkpoint_id,
        checkpoint_type=str(kind),
        time=checkpoint.created_at,
        tinker_path=checkpoint.path,
        size_bytes=checkpoint.size_bytes,
        public=checkpoint.public,
        user_metadata=checkpoint.user_metadata,
        expires_at=checkpoint.expires_at,
        base_model=checkpoint.base_model,
    )
