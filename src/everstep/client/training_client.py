"""TrainingClient: the operations of one training run."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from everstep.client._operations import submit as ops
from everstep.client._operations.async_aliases import future_alias, result_alias
from everstep.client._operations.custom_loss import CustomLoss
from everstep.client._operations.loss_handle import LossHandle
from everstep.client._operations.run import BuildRequest, Run
from everstep.client._transport.errors import BadRequestError, NotFoundError
from everstep.client._transport.futures import APIFuture, BackcompatSamplingClientFuture
from everstep.client._transport.session import Session
from everstep.client._transport.telemetry import Telemetry
from everstep.client._transport.tokenizer import load_tokenizer
from everstep.client.sampling_client import SamplingClient
from everstep.wire import types
from everstep.wire.messages.optimizers import to_optim_params

_log = logging.getLogger("everstep.client")


class TrainingClient:
    """One training run. Every method returns a future at once.

    Operations are numbered when they are called, and executed in that order. A loop may call
    ``forward_backward`` and ``optim_step`` without waiting in between.

    Args:
        holder: the session.
        model_seq_id: the run's number in the session.
        model_id: the run's id.
        info: the run's model.
    """

    def __init__(
        self, holder: Session, model_seq_id: int, model_id: str, *, info: types.GetInfoResponse
    ) -> None:
        self._run = Run(holder, model_seq_id, model_id, info)
        self._sampling_clients: weakref.WeakKeyDictionary[SamplingClient, str | None] = (
            weakref.WeakKeyDictionary()
        )

    def __repr__(self) -> str:
        return f"<TrainingClient {self.model_id}: {self._run.info.model_name}>"

    @property
    def model_id(self) -> str:
        """The run's id."""
        return self._run.model_id

    @property
    def model_seq_id(self) -> int:
        """The run's number in its session."""
        return self._run.model_seq_id

    @property
    def holder(self) -> Session:
        """The session that the run belongs to."""
        return self._run.session

    # Training

    def forward(
        self,
        data: Sequence[types.Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float | str] | None = None,
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """Compute a loss and the targets' logprobs, without gradients. See `forward_backward`."""
        observer = self.on_queue_state_change
        return self._run.passes.run(data, loss_fn, loss_fn_config, observer, forward_only=True)

    def forward_backward(
        self,
        data: Sequence[types.Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float | str] | None = None,
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """Compute a loss and accumulate its gradients for the next `optim_step`.

        Args:
            data: examples. ``target_tokens[i]`` is predicted at position i of the input.
            loss_fn: ``cross_entropy``, ``importance_sampling``, ``ppo``, ``cispo``, ``dro``, ….
            loss_fn_config: the loss's settings.

        Returns:
            Per datum ``logprobs`` in the shape of its targets, and metrics such as ``loss:sum``.

        Raises:
            RequestFailedError: the input was wrong. The message says where. No gradient was added.
        """
        observer = self.on_queue_state_change
        return self._run.passes.run(data, loss_fn, loss_fn_config, observer, forward_only=False)

    def forward_backward_custom(
        self,
        data: Sequence[types.Datum],
        loss_fn: CustomLoss | LossHandle,
        *,
        loss_type_input: Literal["logprobs"] | None = None,
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """Compute gradients of a custom loss, which is evaluated in this process with torch.

        Args:
            data: examples. Their ``target_tokens`` select the logprobs that the loss gets.
            loss_fn: called with the data and a list of logprob tensors, one per datum. Returns the
                loss, a scalar tensor, and metrics. Or a loss of `ServiceClient.create_custom_loss`,
                which the service may evaluate itself.
            loss_type_input: ``logprobs``, the only input that a loss can have.

        Raises:
            ValueError: the loss belongs to another session, or a datum lacks one of its inputs.
        """
        if loss_type_input not in (None, "logprobs"):
            raise ValueError(f"loss_type_input has to be 'logprobs'; got {loss_type_input!r}")
        return self._run.passes.run_custom(data, loss_fn, self.on_queue_state_change)

    def optim_step(
        self,
        optim_params: types.AdamParams | types.OptimParamsBase | None = None,
        *,
        adam_params: types.AdamParams | None = None,
    ) -> APIFuture[types.OptimStepResponse]:
        """Take one optimizer step with the accumulated gradients, and clear them.

        Args:
            optim_params: parameters of this step.
            adam_params: an older name for ``optim_params``.

        Raises:
            TypeError: neither or both were given, or another object.
        """
        if (optim_params is None) == (adam_params is None):
            raise TypeError("optim_step takes optim_params or adam_params, and exactly one of them")
        params = to_optim_params(optim_params if adam_params is None else adam_params)
        field = "adam_params" if isinstance(params, types.AdamParams) else "optimizer_params"
        return self._submit(
            "OptimStep",
            "/optim_step",
            lambda model_id, seq_id: types.OptimStepRequest(
                model_id=model_id, seq_id=seq_id, **{field: params}
            ),
            types.OptimStepResponse,
        )

    # Persistence

    def save_state(
        self,
        name: str | None,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> APIFuture[types.SaveWeightsResponse]:
        """Save weights, optimizer state and pending gradients as of this call.

        Training may continue at once: it neither waits for the save nor changes its content.

        Args:
            name: letters, digits and ``. _ - + =``, unique in the run. None: the service chooses.
            ttl_seconds: seconds until the checkpoint expires. None: never.
            overwrite: replace a checkpoint of that name, atomically.
            user_metadata: stored with the checkpoint.

        Returns:
            The checkpoint's ``path``, ``tinker://<run>/weights/<name>``, once it is durable.

        Raises:
            RequestFailedError: the name is invalid or taken.

        Example:
            >>> path = client.save_state("step-100").result().path
        """
        return self._submit(
            "SaveWeights",
            "/save_weights",
            lambda model_id, seq_id: types.SaveWeightsRequest(
                model_id=model_id,
                path=name,
                seq_id=seq_id,
                ttl_seconds=ttl_seconds,
                overwrite=overwrite,
                user_metadata=user_metadata,
            ),
            types.SaveWeightsResponse,
        )

    def load_state(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[types.LoadWeightsResponse]:
        """Load a checkpoint's weights into this run, and reset the optimizer.

        The run is then equal to a new one that starts from those weights: moments zero, step 0,
        no pending gradients.

        Args:
            path: of the checkpoint, ``tinker://…``.
            weights_access_token: for checkpoints of another account.

        Raises:
            RequestFailedError: the checkpoint doesn't exist, or doesn't fit this run. The run is
                unchanged.
        """
        return self._load(path, weights_access_token, optimizer=False)

    def load_state_with_optimizer(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[types.LoadWeightsResponse]:
        """Load weights, optimizer state and pending gradients, and resume exactly from there.

        Args:
            path: of a checkpoint that `save_state` made.
            weights_access_token: for checkpoints of another account.

        Raises:
            RequestFailedError: the checkpoint doesn't exist, holds no optimizer state, or doesn't
                fit this run. The run is unchanged.
        """
        return self._load(path, weights_access_token, optimizer=True)

    def save_weights_for_sampler(
        self,
        name: str,
        ttl_seconds: int | None = None,
        user_metadata: dict[str, str] | None = None,
    ) -> APIFuture[types.SaveWeightsForSamplerResponse]:
        """Save weights to sample from, under ``tinker://<run>/sampler_weights/<name>``."""
        return self._submit(
            "SaveWeightsForSampler",
            "/save_weights_for_sampler",
            lambda model_id, seq_id: types.SaveWeightsForSamplerRequest(
                model_id=model_id,
                path=name,
                seq_id=seq_id,
                ttl_seconds=ttl_seconds,
                user_metadata=user_metadata,
            ),
            types.SaveWeightsForSamplerResponse,
        )

    def save_weights_external(
        self,
        name: str,
        ttl_seconds: int | None = None,
        age_encryption_recipients: list[str] | None = None,
    ) -> APIFuture[types.SaveWeightsExternalResponse]:
        """Save the adapter as files to download, ``tinker://<run>/external_weights/<name>``.

        Args:
            name: see `save_state`.
            ttl_seconds: seconds until the files expire. None: never.
            age_encryption_recipients: age or SSH public keys that the files are encrypted for.
        """
        return self._submit(
            "SaveWeightsExternal",
            "/save_weights_external",
            lambda model_id, seq_id: types.SaveWeightsExternalRequest(
                model_id=model_id,
                path=name,
                seq_id=seq_id,
                ttl_seconds=ttl_seconds,
                age_encryption_recipients=age_encryption_recipients,
            ),
            types.SaveWeightsExternalResponse,
        )

    def save_weights_and_get_sampling_client(
        self,
        name: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
        kind: types.SamplingClientKind = "snapshot",
    ) -> BackcompatSamplingClientFuture[SamplingClient]:
        """Save the current weights and sample from them. They are kept until the session ends.

        Args:
            name: has no effect. Kept for older scripts.
            retry_config: has no effect. Kept for scripts that pass one.
            record_stability_info: see `SamplingClient`.
            kind: ``snapshot``, or ``inflight``: later saves of that kind update this sampler.
        """
        run = self._run
        seq_id, sampler_id = run.claim_unnamed_save(kind, self.on_queue_state_change)

        async def work() -> SamplingClient:
            sampler = SamplingClient(
                run.session,
                sampling_session_id=await sampler_id,
                base_model=run.info.model_name or run.info.model_data.model_name or "",
                retry_config=retry_config,
                record_stability_info=record_stability_info,
            )
            self._sampling_clients[sampler] = None
            return sampler

        reported = run.reported("SaveWeightsForSampler", seq_id, work())
        return BackcompatSamplingClientFuture.of(reported)

    def create_sampling_client(
        self, model_path: str, retry_config: Any = None, record_stability_info: bool = False
    ) -> BackcompatSamplingClientFuture[SamplingClient]:
        """Sample from a checkpoint. See `ServiceClient.create_sampling_client`."""
        future = SamplingClient.create(
            self.holder,
            model_path=model_path,
            retry_config=retry_config,
            record_stability_info=record_stability_info,
        )

        def created(done: Any) -> None:
            if not done.cancelled() and done.exception() is None:
                self._sampling_clients[done.result()] = model_path

        future.future().add_done_callback(created)
        return future

    # Information

    def get_info(self) -> types.GetInfoResponse:
        """Return the run's model, as the service described it when the client was created."""
        return self._run.info

    def get_tokenizer(self) -> Any:
        """Load the model's tokenizer. Needs transformers."""
        data = self._run.info.model_data
        return load_tokenizer(self.holder.http, data.model_name or "", data.tokenizer_id)

    def get_console_url(self) -> str:
        """Return the address of the run's page in the service's console."""
        return self.holder.connection.console_url("training_runs", self.model_id)

    def get_telemetry(self) -> Telemetry | None:
        """Return the session's telemetry, or None if it is off."""
        return self.holder.telemetry

    # The names that older scripts await. Operations return their future, to be awaited in turn.
    forward_async = future_alias(forward)
    forward_backward_async = future_alias(forward_backward)
    forward_backward_custom_async = future_alias(forward_backward_custom)
    optim_step_async = future_alias(optim_step)
    save_state_async = future_alias(save_state)
    load_state_async = future_alias(load_state)
    load_state_with_optimizer_async = future_alias(load_state_with_optimizer)
    save_weights_for_sampler_async = future_alias(save_weights_for_sampler)
    save_weights_external_async = future_alias(save_weights_external)
    save_weights_and_get_sampling_client_async = result_alias(save_weights_and_get_sampling_client)
    create_sampling_client_async = result_alias(create_sampling_client)
    get_info_async = future_alias(get_info)

    def on_queue_state_change(self, queue_state: str, queue_state_reason: str | None) -> None:
        """Log, at most once a minute, that training is paused, with the service's reason."""
        self._run.log_pause(queue_state, queue_state_reason)

    async def _rebind(self, other: TrainingClient) -> None:
        """Make this the client of another client's run. Used by `Recovery`.

        Sampling clients that were created from this client follow. One of a checkpoint samples from
        that checkpoint again. One of an unnamed save, which ended with its session, samples from
        the run's current weights. If its checkpoint no longer exists, a sampling client is left as
        it is, and fails: other weights in their place would go unnoticed.

        Raises:
            TinkerError: a sampling client could not be created for another reason.
        """
        self._run = other._run
        for sampler, path in list(self._sampling_clients.items()):
            if path is None:
                sampler._rebind(await self.save_weights_and_get_sampling_client())
                continue
            try:
                sampler._rebind(await self.create_sampling_client(path))
            except (NotFoundError, BadRequestError) as error:
                _log.warning("can no longer sample from %s: %s", path, error)

    def _load(
        self, path: str, token: str | None, *, optimizer: bool
    ) -> APIFuture[types.LoadWeightsResponse]:
        return self._submit(
            "LoadWeights",
            "/load_weights",
            lambda model_id, seq_id: types.LoadWeightsRequest(
                model_id=model_id,
                seq_id=seq_id,
                path=path,
                optimizer=optimizer,
                weights_access_token=token,
            ),
            types.LoadWeightsResponse,
        )

    def _submit(
        self, request_type: str, path: str, build: BuildRequest, answer: type[ops.Answer]
    ) -> APIFuture[ops.Answer]:
        return self._run.submit(request_type, path, build, answer, self.on_queue_state_change)
