"""TrainingClient: one run's operations."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from time import monotonic
from typing import Any, Literal

from everstep.client import _operations as ops
from everstep.client._custom_loss import CustomLoss
from everstep.client._futures import APIFuture, BackcompatSamplingClientFuture
from everstep.client._passes import Passes
from everstep.client._polling import Asked
from everstep.client._queue import PauseLog
from everstep.client._rebinding import Samplers
from everstep.client._session import Session
from everstep.client._telemetry import Telemetry
from everstep.client._tokenizers import load_tokenizer
from everstep.client._twins import gives_future, gives_result
from everstep.client.loss_handle import LossHandle
from everstep.client.sampling_client import SamplingClient
from everstep.wire import types


class TrainingClient:
    """One training run. Every method returns at once with a future.

    Operations take their place when they are called, and are executed in that order; so a loop
    may call ``forward_backward`` and ``optim_step`` without waiting in between.

    Args:
        holder: the session.
        model_seq_id: the run's number in it.
        model_id: the run's id.
        info: the run's model.

    Attributes:
        model_id: the run's id.
    """

    def __init__(
        self, holder: Session, model_seq_id: int, model_id: str, *, info: types.GetInfoResponse
    ) -> None:
        self.model_id = model_id
        self.model_seq_id = model_seq_id
        self.holder = holder
        self._info = info
        self._turns = ops.Turns()
        self._passes = Passes(holder, self._turns, model_id, self.on_queue_state_change)
        self._pauses = PauseLog(f"Training of {model_id}")
        self._samplers = Samplers()

    # Training

    def forward(
        self,
        data: Sequence[types.Datum],
        loss_fn: str,
        loss_fn_config: dict[str, float | str] | None = None,
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """Compute a loss and the targets' logprobs, without gradients; see `forward_backward`."""
        return self._passes.run(data, loss_fn, loss_fn_config, forward_only=True)

    def forward_backward(
        self,
        data: Sequence[types.Datum],
        loss_fn: str,
        loss_fn_config: dict[str, float | str] | None = None,
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """Compute a loss and add its gradients to those that wait for `optim_step`.

        Args:
            data: examples; ``target_tokens[i]`` is predicted at position i of the input.
            loss_fn: ``cross_entropy``, ``importance_sampling``, ``ppo``, ``cispo``, ``dro``, ….
            loss_fn_config: the loss's settings.

        Returns:
            Per datum ``logprobs`` in the shape of its targets; metrics such as ``loss:sum``.

        Raises:
            RequestFailedError: the input was wrong; the text says where. No gradient was added.
        """
        return self._passes.run(data, loss_fn, loss_fn_config, forward_only=False)

    def forward_backward_custom(
        self,
        data: Sequence[types.Datum],
        loss_fn: CustomLoss | LossHandle,
        *,
        loss_type_input: Literal["logprobs"] | None = None,
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """Compute gradients of a loss of one's own; it is evaluated here, with torch.

        Args:
            data: examples; their ``target_tokens`` say which logprobs the loss gets.
            loss_fn: called with the data and a list of logprob tensors, one a datum; returns the
                loss, a scalar tensor, and metrics. Or a loss of `ServiceClient.create_custom_loss`,
                which a service may evaluate itself.
            loss_type_input: ``logprobs``, which is what a loss gets.

        Raises:
            ValueError: the loss belongs to another session, or a datum lacks one of its inputs.
        """
        if loss_type_input not in (None, "logprobs"):
            raise ValueError(f"loss_type_input has to be 'logprobs'; got {loss_type_input!r}")
        return self._passes.run_custom(data, loss_fn)

    def optim_step(
        self,
        optim_params: types.AdamParams | types.OptimParamsBase | None = None,
        *,
        adam_params: types.AdamParams | None = None,
    ) -> APIFuture[types.OptimStepResponse]:
        """Make one step of the optimizer with the gradients that wait, and drop them.

        Args:
            optim_params: parameters of this step.
            adam_params: an older name for the same.

        Raises:
            TypeError: none of them, both, or something else was given.
        """
        params = optim_params if adam_params is None else adam_params
        if params is None or (optim_params is not None and adam_params is not None):
            raise TypeError("optim_step takes optim_params or adam_params, and exactly one of them")
        if not isinstance(params, types.AdamParams | types.OptimParamsBase):
            raise TypeError(f"optim_step takes AdamParams; got {type(params).__name__}")
        own = "adam_params" if isinstance(params, types.AdamParams) else "optimizer_params"
        return self._operation(
            "OptimStep",
            "/optim_step",
            lambda seq_id: types.OptimStepRequest(
                model_id=self.model_id, seq_id=seq_id, **{own: params}
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
        """Save weights, optimizer state and pending gradients as they are at this call's place.

        Training may go on at once; it doesn't wait for the save, nor change what is saved.

        Args:
            name: letters, digits and ``. _ - + =``, unique in the run; None takes a free one.
            ttl_seconds: the checkpoint expires after so long; None: never.
            overwrite: replace a checkpoint of that name, atomically.
            user_metadata: kept with the checkpoint.

        Returns:
            The checkpoint's ``path``, ``tinker://<run>/weights/<name>``, once it is durable.

        Raises:
            RequestFailedError: the name breaks the rule or is taken.

        Example:
            >>> path = client.save_state("step-100").result().path
        """
        return self._operation(
            "SaveWeights",
            "/save_weights",
            lambda seq_id: types.SaveWeightsRequest(
                model_id=self.model_id,
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
        """Load a checkpoint's weights into this run. The optimizer begins afresh.

        Afterwards the run is as a new one that starts from those weights: moments zero, step 0,
        no pending gradients.

        Args:
            path: of the checkpoint, ``tinker://…``.
            weights_access_token: for checkpoints of another account.

        Raises:
            RequestFailedError: there is no such checkpoint, or it doesn't fit this run; the run
                is as it was.

        Example:
            >>> client.load_state("tinker://run-id/weights/step-100").result()
        """
        return self._load(path, weights_access_token, optimizer=False)

    def load_state_with_optimizer(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[types.LoadWeightsResponse]:
        """Load weights, optimizer state and pending gradients: the run goes on from there, exactly.

        Args:
            path: of a checkpoint that `save_state` made.
            weights_access_token: for checkpoints of another account.

        Raises:
            RequestFailedError: there is no such checkpoint, it holds no optimizer state, or it
                doesn't fit this run; the run is as it was.

        Example:
            >>> client.load_state_with_optimizer("tinker://run-id/weights/step-100").result()
        """
        return self._load(path, weights_access_token, optimizer=True)

    def save_weights_for_sampler(
        self,
        name: str,
        ttl_seconds: int | None = None,
        user_metadata: dict[str, str] | None = None,
    ) -> APIFuture[types.SaveWeightsForSamplerResponse]:
        """Save weights to sample from, under ``tinker://<run>/sampler_weights/<name>``."""
        return self._operation(
            "SaveWeightsForSampler",
            "/save_weights_for_sampler",
            lambda seq_id: types.SaveWeightsForSamplerRequest(
                model_id=self.model_id,
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
            ttl_seconds: the files expire after so long; None: never.
            age_encryption_recipients: age or SSH public keys that the files are encrypted for.
        """
        return self._operation(
            "SaveWeightsExternal",
            "/save_weights_external",
            lambda seq_id: types.SaveWeightsExternalRequest(
                model_id=self.model_id,
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
        """Save the weights as they are and sample from them; kept until the session ends.

        Args:
            name: has no effect; kept for older scripts.
            retry_config: has no effect; kept for scripts that pass one.
            record_stability_info: see `SamplingClient`.
            kind: ``snapshot``, or ``inflight``: later saves of that kind update this sampler.
        """
        request_type = "SaveWeightsForSampler"
        seq_id, sent = self._place(
            request_type,
            "/save_weights_for_sampler",
            lambda seq_id: types.SaveWeightsForSamplerRequest(
                model_id=self.model_id,
                sampling_session_seq_id=self.holder.next_id("sampler"),
                kind=kind,
                seq_id=seq_id,
            ),
            types.SaveWeightsForSamplerResponseInternal,
        )

        async def work() -> SamplingClient:
            answer = await sent
            if answer.sampling_session_id is None:
                raise ValueError("the service gave no sampling session for an unnamed save")
            sampler = SamplingClient(
                self.holder,
                sampling_session_id=answer.sampling_session_id,
                base_model=self._info.model_name or self._info.model_data.model_name or "",
                retry_config=retry_config,
                record_stability_info=record_stability_info,
            )
            return self._samplers.note(sampler)

        told = ops.told(self.holder, request_type, self.model_id, seq_id, work())
        return BackcompatSamplingClientFuture.of(told)

    def create_sampling_client(
        self, model_path: str, retry_config: Any = None, record_stability_info: bool = False
    ) -> BackcompatSamplingClientFuture[SamplingClient]:
        """Sample from a checkpoint; see `ServiceClient.create_sampling_client`."""
        future = SamplingClient.create(
            self.holder,
            model_path=model_path,
            retry_config=retry_config,
            record_stability_info=record_stability_info,
        )
        self._samplers.note_created(future, model_path)
        return future

    # Facts

    def get_info(self) -> types.GetInfoResponse:
        """The run's model, as it was told at its creation."""
        return self._info

    def get_tokenizer(self) -> Any:
        """The model's tokenizer; needs transformers."""
        data = self._info.model_data
        return load_tokenizer(self.holder.http, data.model_name or "", data.tokenizer_id)

    def get_console_url(self) -> str:
        """Where a person can look at the run."""
        return self.holder.connection.console_url("training_runs", self.model_id)

    def get_telemetry(self) -> Telemetry | None:
        """The session's telemetry; None where it is off."""
        return self.holder.telemetry

    # The names that older scripts await. Operations give their future, which is awaited in turn.

    forward_async = gives_future(forward)
    forward_backward_async = gives_future(forward_backward)
    forward_backward_custom_async = gives_future(forward_backward_custom)
    optim_step_async = gives_future(optim_step)
    save_state_async = gives_future(save_state)
    load_state_async = gives_future(load_state)
    load_state_with_optimizer_async = gives_future(load_state_with_optimizer)
    save_weights_for_sampler_async = gives_future(save_weights_for_sampler)
    save_weights_external_async = gives_future(save_weights_external)
    save_weights_and_get_sampling_client_async = gives_result(save_weights_and_get_sampling_client)
    create_sampling_client_async = gives_result(create_sampling_client)
    get_info_async = gives_future(get_info)

    def on_queue_state_change(self, queue_state: str, queue_state_reason: str | None) -> None:
        """Say in the log, at most once a minute, that training is paused.

        Args:
            queue_state: what the service said while it was asked for a result.
            queue_state_reason: why.
        """
        self._pauses(queue_state, queue_state_reason)

    # Sending

    def _load(
        self, path: str, token: str | None, *, optimizer: bool
    ) -> APIFuture[types.LoadWeightsResponse]:
        return self._operation(
            "LoadWeights",
            "/load_weights",
            lambda seq_id: types.LoadWeightsRequest(
                model_id=self.model_id,
                seq_id=seq_id,
                path=path,
                optimizer=optimizer,
                weights_access_token=token,
            ),
            types.LoadWeightsResponse,
        )

    def _operation(
        self,
        request_type: str,
        path: str,
        build: Callable[[int], types.Request],
        answer: type[ops.Answer],
    ) -> APIFuture[ops.Answer]:
        seq_id, sent = self._place(request_type, path, build, answer)
        return APIFuture.of(ops.told(self.holder, request_type, self.model_id, seq_id, sent))

    def _place(
        self,
        request_type: str,
        path: str,
        build: Callable[[int], types.Request],
        answer: type[ops.Answer],
    ) -> tuple[int, Coroutine[Any, Any, ops.Answer]]:
        asked = Asked(request_type, monotonic(), self.on_queue_state_change)
        return ops.place(self.holder, self._turns, path, build, asked, answer)
