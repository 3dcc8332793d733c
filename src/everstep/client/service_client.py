"""ServiceClient: where a script begins."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

from everstep.client import _local, _operations
from everstep.client._credentials import LOCAL, service_url
from everstep.client._futures import (
    APIFuture,
    BackcompatSamplingClientFuture,
    BackcompatTrainingClientFuture,
    submit,
)
from everstep.client._hooks import Hook
from everstep.client._polling import Asked
from everstep.client._queue import PauseLog
from everstep.client._session import Connection, Session, session_request
from everstep.client._telemetry import Telemetry
from everstep.client._twins import gives_result
from everstep.client.loss_handle import LossHandle, PerDatumLossFn, encode, trace
from everstep.client.rest_client import RestClient
from everstep.client.sampling_client import SamplingClient
from everstep.client.training_client import TrainingClient
from everstep.wire import types


class ServiceClient:
    """A connection to a service: creates training, sampling and REST clients.

    Nothing is sent before it is needed. Without ``base_url`` and ``TINKER_BASE_URL``, or with
    ``base_url="local"``, it starts an embedded service that lives as long as its clients, and is
    started again when it ends before them.

    Args:
        user_metadata: kept with the session.
        project_id: of the session; else ``TINKER_PROJECT_ID``.
        display_name: of the session.
        base_url: of the service.
        api_key: else ``TINKER_API_KEY``; a service on this machine needs none.
        default_headers_overrides: sent with every request.
        hooks: called with a `RequestEvent` for every operation.
        home: where an embedded service keeps everything; else ``EVERSTEP_HOME``.
        models: ``NAME=PATH_OR_HUB_ID`` of what an embedded service serves.
        kwargs: ignored, with a warning.

    Raises:
        TinkerError: no API key, or one that can't be one.
        LocalServiceError: the embedded service did not start.
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
        self._local: _local.LocalService | None = None
        url = service_url(base_url)
        if url == LOCAL:
            where = Path(home).expanduser() if home is not None else _local.default_home()
            self._local = _local.acquire(where, tuple(models))
            url = self._local.address
        self._project = project_id or os.environ.get("TINKER_PROJECT_ID")
        self._connection = Connection(url, api_key, default_headers_overrides)
        request = session_request(user_metadata, self._project, display_name)
        self.holder = Session(self._connection, request, hooks)
        self._closed = False

    @property
    def base_url(self) -> str:
        """Where the service is."""
        return self.holder.http.base_url

    @property
    def local_pid(self) -> int | None:
        """Process id of the embedded service as it runs now; None: another service is used."""
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
            base_model: one that the service serves.
            rank: of the adapter.
            seed: of its initialisation; None: the service chooses, and keeps it.
            train_mlp: adapt the MLPs.
            train_attn: adapt the attention.
            train_unembed: adapt the output head.
            user_metadata: kept with the run.
            optimizer: its family; AdamW when not given.

        Raises:
            AssertionError: nothing is to be trained.
            RequestFailedError: the service can't create it; the text says why.
        """
        assert train_mlp or train_attn or train_unembed, "at least one train_* flag must be True"
        number = self.holder.next_id("model")

        asked = _asked("CreateModel", base_model)

        async def work() -> TrainingClient:
            request = types.CreateModelRequest(
                session_id=await self.holder.id(),
                model_seq_id=number,
                base_model=base_model,
                user_metadata=dict(user_metadata) if user_metadata else None,
                lora_config=types.LoraConfig(
                    rank=rank,
                    seed=seed,
                    train_unembed=train_unembed,
                    train_mlp=train_mlp,
                    train_attn=train_attn,
                ),
                optimizer_config=optimizer or types.AdamOptimizerConfig(),
            )
            _, created = await _operations.create(
                self.holder, "/create_model", request, asked, types.CreateModelResponse
            )
            return await self._training_client(number, created.model_id)

        return self._created("CreateModel", number, work())

    def create_training_client_from_state(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: Mapping[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: types.OptimizerConfigBase | None = None,
    ) -> BackcompatTrainingClientFuture[TrainingClient]:
        """Create a run from a checkpoint's weights; its optimizer begins afresh.

        Rank, seed and what is trained come from the checkpoint.

        Args:
            path: of the checkpoint, ``tinker://…``.
            base_model: if given, has to be the checkpoint's.
            user_metadata: kept with the new run.
            weights_access_token: for checkpoints of another account.
            optimizer: the new run's optimizer family.

        Raises:
            RequestFailedError: there is no such checkpoint, or it can't be read.

        Example:
            >>> client = service.create_training_client_from_state(path).result()
        """
        extra = {"optimizer_config": optimizer} if optimizer is not None else {}
        return self._from_state(
            path, base_model, user_metadata, weights_access_token, optimizer=False, **extra
        )

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: Mapping[str, str] | None = None,
        weights_access_token: str | None = None,
    ) -> BackcompatTrainingClientFuture[TrainingClient]:
        """Create a run from a checkpoint that goes on exactly where the checkpoint was saved.

        Weights, optimizer state, step and pending gradients are restored, bit for bit.

        Args:
            path: of a checkpoint that `save_state` made.
            base_model: if given, has to be the checkpoint's.
            user_metadata: kept with the new run.
            weights_access_token: for checkpoints of another account.

        Raises:
            RequestFailedError: there is no such checkpoint, or it holds no optimizer state.
        """
        return self._from_state(
            path, base_model, user_metadata, weights_access_token, optimizer=True
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
            base_model: one that the service serves.
            retry_config: has no effect; kept for scripts that pass one.
            record_stability_info: see `SamplingClient`.

        Raises:
            ValueError: neither was given, or the path is none.
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
        """Trace a loss of one's own, for ``forward_backward_custom``.

        It is evaluated by the service where that is able to, else here.

        Args:
            fn: called once a datum, with its logprobs and the ``loss_fn_inputs`` that its further
                parameters name; returns a scalar loss and metrics, ``custom/<name>:sum`` or
                ``custom/<name>:mean``, all tensors. It may call torch and math only.
            input_ranks: rank of each parameter: 0 a scalar, 1 [T], 2 [T, K].

        Raises:
            ValueError: it can't be traced, or does what it may not.
        """
        traced = trace(fn, input_ranks, session_id="")  # here, so that the caller gets its errors

        async def work() -> LossHandle:
            session_id = await self.holder.id()
            handle = replace(traced, session_id=session_id)
            if not self.holder.config.custom_loss_server_side:
                return handle
            number = self.holder.next_id("custom_loss")
            request = types.CreateCustomLossRequest(
                session_id=session_id,
                custom_loss_seq_id=number,
                name=handle.name,
                inputs=list(handle.inputs),
                graph=encode(handle),
            )
            asked = Asked("CreateCustomLoss", monotonic())
            answer = types.CreateCustomLossResponse
            created = _operations.create(self.holder, "/create_custom_loss", request, asked, answer)
            told = _operations.told(self.holder, asked.request_type, None, number, created)
            return replace(handle, loss_id=(await told)[1].loss_id)

        return APIFuture.of(work())

    def copy_weights(
        self, path: str, *, ttl_seconds: int | None = None, weights_access_token: str | None = None
    ) -> APIFuture[str]:
        """Copy a checkpoint into this client's project; see `RestClient.copy_weights`."""
        return self.create_rest_client().copy_weights(
            path,
            self._project,
            ttl_seconds=ttl_seconds,
            weights_access_token=weights_access_token,
        )

    def create_rest_client(self) -> RestClient:
        """A client for what is there: runs, checkpoints, models."""
        return RestClient(self._connection)

    def get_server_capabilities(self) -> APIFuture[types.GetServerCapabilitiesResponse]:
        """The models that are served."""
        return self.create_rest_client().get_server_capabilities()

    def get_console_url(self) -> str:
        """Where a person can look at the session; opens it."""
        return self._connection.console_url("sessions", submit(self.holder.id()).result())

    def get_telemetry(self) -> Telemetry | None:
        """The session's telemetry, once the session is open; None where it is off."""
        return self.holder.telemetry

    create_lora_training_client_async = gives_result(create_lora_training_client)
    create_training_client_from_state_async = gives_result(create_training_client_from_state)
    create_training_client_from_state_with_optimizer_async = gives_result(
        create_training_client_from_state_with_optimizer
    )
    create_sampling_client_async = gives_result(create_sampling_client)
    get_server_capabilities_async = gives_result(get_server_capabilities)

    def close(self, status: str = "success", detail: str | None = None) -> APIFuture[None]:
        """End the session and give the embedded service back.

        Args:
            status: ``success``, ``errored`` or ``interrupted``.
            detail: says more.
        """

        async def work() -> None:
            if not self._closed:
                self._closed = True
                try:
                    await self.holder.finish(status, detail)
                finally:
                    await self.holder.http.close()

        future = APIFuture.of(work())
        if self._local is not None:
            try:
                future.result()
            finally:
                _local.release(self._local)
                self._local = None
        return future

    def __enter__(self) -> ServiceClient:
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
            status = "interrupted" if issubclass(exc_type, KeyboardInterrupt) else "errored"
            self.close(status, repr(exc_value)).result()

    def _from_state(
        self,
        path: str,
        base_model: str | None,
        user_metadata: Mapping[str, str] | None,
        token: str | None,
        *,
        optimizer: bool,
        **extra: Any,
    ) -> BackcompatTrainingClientFuture[TrainingClient]:
        number = self.holder.next_id("model")

        asked = _asked("LoadWeights", path)

        async def work() -> TrainingClient:
            request = types.LoadWeightsRequest(
                session_id=await self.holder.id(),
                model_seq_id=number,
                base_model=base_model,
                user_metadata=dict(user_metadata) if user_metadata else None,
                path=path,
                optimizer=optimizer,
                weights_access_token=token,
                **extra,
            )
            future, loaded = await _operations.create(
                self.holder, "/load_weights", request, asked, types.LoadWeightsResponse
            )
            run_id = loaded.model_id or future.model_id
            return await self._training_client(
                number, run_id or f"{request.session_id}:train:{number}"
            )

        return self._created("LoadWeights", number, work())

    def _created(
        self, request_type: str, number: int, work: Any
    ) -> BackcompatTrainingClientFuture[TrainingClient]:
        told = _operations.told(self.holder, request_type, None, number, work)
        return BackcompatTrainingClientFuture.of(told)

    async def _training_client(self, number: int, model_id: str) -> TrainingClient:
        info = await self.holder.http.call(
            "POST",
            "/get_info",
            types.GetInfoResponse,
            json={"model_id": model_id, "type": "get_info"},
        )
        return TrainingClient(self.holder, number, model_id, info=info)


def _asked(request_type: str, source: str) -> Asked:
    """A creation that is being asked for; the log says when the service lets it wait."""
    return Asked(request_type, monotonic(), PauseLog(f"Creation of a run from {source}"))
