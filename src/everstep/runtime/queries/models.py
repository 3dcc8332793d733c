"""Model queries: the served models, and the model of a run."""

from __future__ import annotations

from pathlib import Path

from everstep.engine.losses.specs import LOSSES, STABLE_REINFORCE
from everstep.runtime.adapted_modules import adapted_modules
from everstep.runtime.admission.accept import Admission
from everstep.runtime.context import RuntimeContext
from everstep.wire import types


class ModelQueries:
    """Reads the served models, as wire types.

    Args:
        context: the service's workers and settings.
        admission: looks up runs and their base models.
    """

    def __init__(self, context: RuntimeContext, admission: Admission) -> None:
        self._workers = context.workers
        self._admission = admission
        self._settings = context.settings

    def capabilities(self) -> types.GetServerCapabilitiesResponse:
        """Return the served models, and the losses with whose definition each has."""
        refused = {STABLE_REINFORCE} if self._settings.stable_reinforce == "refuse" else set()
        return types.GetServerCapabilitiesResponse(
            supported_models=[
                types.SupportedModel(
                    model_name=info.name,
                    max_context_length=info.max_context_length,
                    trainable=True,
                    sampleable=True,
                )
                for info in self._workers.models.values()
            ],
            losses={name: spec.definition for name, spec in LOSSES.items() if name not in refused},
        )

    async def model_info(self, model_id: str, near: bool = False) -> types.GetInfoResponse:
        """Return a run's model.

        Args:
            model_id: the run's id.
            near: whether the client is on this machine. Other clients could load no tokenizer from
                a directory of it. They get the model's name instead, under which the service
                offers the tokenizer.

        Raises:
            Rejected: there is no such run (404), or its model is not served (503).
        """
        run = await self._admission.run(model_id)
        info = self._admission.base(run)
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
                "lora_seed": run.lora.get("seed"),
                "model_name": info.name,
                "optimizer_config": run.optimizer,
                "adapted_modules": adapted_modules(info, run.lora),
            }
        )
