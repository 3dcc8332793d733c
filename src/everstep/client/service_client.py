"""ServiceClient: the entry point of the client."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Self

from everstep.client._operations import submit as ops
from everstep.client._operations.async_aliases import result_alias
from everstep.client._operations.loss_handle import LossHandle, PerDatumLossFn, trace
from everstep.client._operations.loss_upload import upload
from everstep.client._transport import embedded_service
from everstep.client._transport.credentials import LOCAL, service_url
from everstep.client._transport.futures import (
    APIFuture,
    BackcompatSamplingClientFuture,
    BackcompatTrainingClientFuture,
)
from everstep.client._transport.long_poll import RequestInfo
from everstep.client._transport.queue_state import PauseLog
from everstep.client._transport.request_events import Hook
from everstep.client._transport.session import Connection, Session, session_request
from everstep.client._transport.telemetry import Telemetry
from everstep.client.rest_client import RestClient
from everstep.client.sampling_client import SamplingClient
from everstep.client.training_client import TrainingClient
from everstep.wire import types
from everstep.wire.messages.optimizers import to_optimizer_config


class ServiceClient:
    """A connection to a service: creates training, sampling and REST clients.

    It sends no request until one is needed. Without ``base_url`` and ``TINKER_BASE_URL``, or with
    ``base_url="local"``, it uses the service that runs on the home, and starts one if none does.
    Other processes share it. It ends with the last of them, and is restarted if it exits before.

    Args:
        user_metadata: stored with the session.
        project_id: of the session, by default ``TINKER_PROJECT_ID``.
        display_name: of the session.
        base_url: of the service.
        api_key: by default ``TINKER_API_KEY``. A service on this machine needs none.
        default_headers_overrides: sent with every request.
        hooks: called with a `RequestEvent` for every operation.
        home: home directory of a local service, by default ``EVERSTEP_HOME``.
        models: ``NAME=PATH_OR_HUB_ID`` of the models that the local service has to serve.
        kwargs: ignored, with a warning.

    Raises:
        TinkerError: there is no API key, or it is malformed.
        LocalServiceError: the local service did not start, or serves other models.
    """

    def __init__(
        self,
        user_metadata: Mapping[str, str] | None = None,
        project_id: str | None = None,
        *,
        display_name: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        default_headers_overrides: Mapping[str, str] | None = None,
        hooks: Sequence[Hook] = (),
        home: Path | str | None = None,
        models: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        for name in kwargs:
            warnings.warn(f"ServiceClient ignores {name!r}", FutureWarning, stacklevel=2)
        self._local: embedded_service.EmbeddedService | None = None
        url = service_url(base_url)
        if url == LOCAL:
            where = Path(home).expanduser() if home is not None else embedded_service.default_home()
            self._local = embedded_service.acquire(where, tuple(models))
            url = self._local.address
        self._project = project_id or os.environ.get("TINKER_PROJECT_ID")
        self._connection = Connection(url, api_key, default_headers_overrides)
        request = session_request(user_metadata, self._project, display_name)
        self._session = Session(self._connection, request, hooks)
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"session {self._session.opened or 'not opened yet'}"
        return f"<ServiceClient {self.base_url}: {state}>"

    @property
    def holder(self) -> Session:
        """The session. Raises RuntimeError once this client is closed."""
        self._check_open()
        return self._session

    @holder.setter
    def holder(self, session: Session) -> None:
        self._session = session

    @property
    def base_url(self) -> str:
        """The service's address."""
        return self._connection.http.base_url

    @property
    def local_pid(self) -> int | None:
        """Process id of the local service's current process, or None for other services."""
        return None if self._local is None else self._local.pid

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: Mapping[str, str] | None = None,
        optimizer: types.OptimizerConfigBase | None = None,
    ) -> BackcompatTrainingClientFuture[TrainingClient]:
        """Create a run: a LoRA adapter on a base model.

        Args:
            base_model: a model that the service serves.
            rank: of the adapter.
            seed: of the adapter's initialisation. None: the service chooses and stores it.
            train_mlp: adapt the MLPs.
            train_attn: adapt the attention.
            train_unembed: adapt the output head.
            user_metadata: stored with the run.
            optimizer: optimizer family, AdamW by default.

        Raises:
            AssertionError: all train_* flags are False.
            RequestFailedError: the service can't create the run. The message says why.
        """
        assert train_mlp or train_attn or train_unembed, "at least one train_* flag must be True"
        family = (
            types.AdamOptimizerConfig() if optimizer is None else to_optimizer_config(optimizer)
        )
        seq_id = self.holder.next_id("model")
        request_info = _creation("CreateModel", base_model)

        async def work() -> TrainingClient:
            request = types.CreateModelRequest(
                session_id=await self.holder.id(),
                model_seq_id=seq_id,
                base_model=base_model,
                user_metadata=dict(user_metadata) if user_metadata else None,
                lora_config=types.LoraConfig(
                    rank=rank,
                    seed=seed,
                    train_unembed=train_unembed,
                    train_mlp=train_mlp,
                    train_attn=train_attn,
                ),
                optimizer_config=family,
            )
            _, created = await ops.create(
                self.holder, "/create_model", request, request_info, types.CreateModelResponse
            )
            return await self._training_client(seq_id, created.model_id)

        return self._created("CreateModel", seq_id, work())

    def create_training_client_from_state(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: Mapping[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: types.OptimizerConfigBase | None = None,
    ) -> BackcompatTrainingClientFuture[TrainingClient]:
        """Create a run from a checkpoint's weights, with a new optimizer.

        Rank, seed and the trained modules are the checkpoint's.

        Args:
            path: of the checkpoint, ``tinker://…``.
            base_model: if given, has to be the checkpoint's.
            user_metadata: stored with the new run.
            weights_access_token: for checkpoints of another account.
            optimizer: the new run's optimizer family.

        Raises:
            RequestFailedError: the checkpoint doesn't exist, or can't be read.

        Example:
            >>> client = service.create_training_client_from_state(path).result()
        """
        family = None if optimizer is None else to_optimizer_config(optimizer)
        return self._from_state(path, base_model, user_metadata, weights_access_token, family)

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: Mapping[str, str] | None = None,
        weights_access_token: str | None = None,
    ) -> BackcompatTrainingClientFuture[TrainingClient]:
        """Create a run that resumes exactly where a checkpoint was saved.

        Weights, optimizer state, step and pending gradients are restored, bit for bit.

        Args:
            path: of a checkpoint that `save_state` made.
            base_model: if given, has to be the checkpoint's.
            user_metadata: stored with the new run.
            weights_access_token: for checkpoints of another account.

        Raises:
            RequestFailedError: the checkpoint doesn't exist, or holds no optimizer state.
        """
        return self._from_state(
            path, base_model, user_metadata, weights_access_token, None, optimizer=True
        )

    def create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
    ) -> BackcompatSamplingClientFuture[SamplingClient]:
        """Sample from a checkpoint or a base model.

        Args:
            model_path: of the checkpoint, ``tinker://…``.
            base_model: a model that the service serves.
            retry_config: has no effect. Kept for scripts that pass one.
            record_stability_info: see `SamplingClient`.

        Raises:
            ValueError: neither was given, or the path is not a ``tinker://`` one.
        """
        return SamplingClient.create(
            self.holder,
            model_path=model_path,
            base_model=base_model,
            retry_config=retry_config,
            record_stability_info=record_stability_info,
        )

    def create_custom_loss(
        self, fn: PerDatumLossFn, input_ranks: Mapping[str, types.CustomLossInputRank]
    ) -> APIFuture[LossHandle]:
        """Trace a custom loss, for ``forward_backward_custom``.

        The service evaluates it if it can, otherwise this process does.

        Args:
            fn: called once per datum, with its logprobs and the ``loss_fn_inputs`` that its further
                parameters name. Returns a scalar loss and metrics, ``custom/<name>:sum`` or
                ``custom/<name>:mean``, all tensors. It may call torch and math only.
            input_ranks: rank of each parameter: 0 a scalar, 1 [T], 2 [T, K].

        Raises:
            ValueError: the loss can't be traced, or uses something that is not allowed.
        """
        traced = trace(fn, input_ranks, session_id="")  # here, so that its errors reach the caller
        return APIFuture.of(upload(self.holder, traced))

    def copy_weights(
        self, path: str, *, ttl_seconds: int | None = None, weights_access_token: str | None = None
    ) -> APIFuture[str]:
        """Copy a checkpoint into this client's project. See `RestClient.copy_weights`."""
        return self.create_rest_client().copy_weights(
            path,
            self._project,
            ttl_seconds=ttl_seconds,
            weights_access_token=weights_access_token,
        )

    def create_rest_client(self) -> RestClient:
        """Create a client for runs, checkpoints and models."""
        self._check_open()
        return RestClient(self._connection)

    def get_server_capabilities(self) -> types.GetServerCapabilitiesResponse:
        """List the models that the service serves. `RestClient` has it as a future."""
        return self.create_rest_client().get_server_capabilities().result()

    async def get_server_capabilities_async(self) -> types.GetServerCapabilitiesResponse:
        """List the models that the service serves."""
        return await self.create_rest_client().get_server_capabilities()

    def get_console_url(self) -> str:
        """Return the address of the session's page in the service's console, or of all sessions."""
        opened = self._session.opened
        return self._connection.console_url("sessions", *([opened] if opened else []))

    def get_telemetry(self) -> Telemetry | None:
        """Return the session's telemetry, once the session is open, or None if it is off."""
        return self._session.telemetry

    create_lora_training_client_async = result_alias(create_lora_training_client)
    create_training_client_from_state_async = result_alias(create_training_client_from_state)
    create_training_client_from_state_with_optimizer_async = result_alias(
        create_training_client_from_state_with_optimizer
    )
    create_sampling_client_async = result_alias(create_sampling_client)

    def close(self, status: str = "success", detail: str | None = None) -> APIFuture[None]:
        """End the session and release the embedded service.

        Args:
            status: ``success``, ``errored`` or ``interrupted``.
            detail: an explanation.
        """

        async def work() -> None:
            if not self._closed:
                self._closed = True
                try:
                    await self._session.finish(status, detail)
                finally:
                    await self._session.http.close()

        future = APIFuture.of(work())
        if self._local is not None:
            try:
                future.result()
            finally:
                embedded_service.release(self._local)
                self._local = None
        return future

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is None:
            self.close("success").result()
        else:
            status = "errored" if issubclass(exc_type, Exception) else "interrupted"
            self.close(status, repr(exc_value)).result()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("ServiceClient is closed")

    def _from_state(
        self,
        path: str,
        base_model: str | None,
        user_metadata: Mapping[str, str] | None,
        token: str | None,
        family: types.OptimizerConfigBase | None,
        *,
        optimizer: bool = False,
    ) -> BackcompatTrainingClientFuture[TrainingClient]:
        seq_id = self.holder.next_id("model")
        request_info = _creation("LoadWeights", path)

        async def work() -> TrainingClient:
            request = types.LoadWeightsRequest(
                session_id=await self.holder.id(),
                model_seq_id=seq_id,
                base_model=base_model,
                user_metadata=dict(user_metadata) if user_metadata else None,
                path=path,
                optimizer=optimizer,
                optimizer_config=family,
                weights_access_token=token,
            )
            future, loaded = await ops.create(
                self.holder, "/load_weights", request, request_info, types.LoadWeightsResponse
            )
            run_id = loaded.model_id or future.model_id
            return await self._training_client(
                seq_id, run_id or f"{request.session_id}:train:{seq_id}"
            )

        return self._created("LoadWeights", seq_id, work())

    def _created(
        self, request_type: str, seq_id: int, work: Any
    ) -> BackcompatTrainingClientFuture[TrainingClient]:
        return BackcompatTrainingClientFuture.of(
            ops.reported(self.holder, request_type, None, seq_id, work)
        )

    async def _training_client(self, seq_id: int, model_id: str) -> TrainingClient:
        body = {"model_id": model_id, "type": "get_info"}
        info = await self._session.http.call("POST", "/get_info", types.GetInfoResponse, json=body)
        return TrainingClient(self._session, seq_id, model_id, info=info)


def _creation(request_type: str, source: str) -> RequestInfo:
    """Describe the creation of a run. Pauses are logged."""
    return RequestInfo(request_type, monotonic(), PauseLog(f"Creation of a run from {source}"))
