"""ServiceClient: where a script begins."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from everstep.client import _local, _operations
from everstep.client._credentials import LOCAL, api_key, service_url
from everstep.client._futures import APIFuture, ClientFuture
from everstep.client._hooks import Hook
from everstep.client._http import Http
from everstep.client._session import Session, session_request
from everstep.client.rest_client import RestClient
from everstep.client.sampling_client import SamplingClient
from everstep.client.training_client import TrainingClient
from everstep.wire import types


class ServiceClient:
    """A connection to a service: creates training, sampling and REST clients.

    Nothing is sent before it is needed. Without ``base_url`` and ``TINKER_BASE_URL``, or with
    ``base_url="local"``, it starts an embedded service that lives as long as its clients.

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
        user_metadata: Mapping[str, Any] | None = None,
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
        self._http = Http(url, _key(api_key, url), default_headers_overrides)
        project = project_id or os.environ.get("TINKER_PROJECT_ID")
        tags = [tag for tag in os.environ.get("TINKER_TAGS", "").split(",") if tag]
        request = session_request(user_metadata, project, display_name, tags)
        self._session = Session(self._http, request, hooks)
        self._closed = False

    @property
    def base_url(self) -> str:
        """Where the service is."""
        return self._http.base_url

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
    ) -> ClientFuture[TrainingClient]:
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
        number = self._session.next_id("model")

        async def work() -> TrainingClient:
            request = types.CreateModelRequest(
                session_id=await self._session.id(),
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
            future = await _operations.submit(self._session, "/create_model", body=request)
            created = await _operations.json_result(
                self._session, future, types.CreateModelResponse
            )
            return await self._training_client(created.model_id)

        return self._created("CreateModel", number, work())

    def create_training_client_from_state(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: Mapping[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: types.OptimizerConfigBase | None = None,
    ) -> ClientFuture[TrainingClient]:
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
    ) -> ClientFuture[TrainingClient]:
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
    ) -> ClientFuture[SamplingClient]:
        """Sample from a checkpoint or a base model.

        Raises:
            ValueError: neither was given, or the path is none.
        """
        return SamplingClient.create(self._session, model_path=model_path, base_model=base_model)

    def create_rest_client(self) -> RestClient:
        """A client for what is there: runs, checkpoints, models."""
        return RestClient(self._http)

    def get_server_capabilities(self) -> APIFuture[types.GetServerCapabilitiesResponse]:
        """The models that are served."""
        return self.create_rest_client().get_server_capabilities()

    async def create_lora_training_client_async(self, *args: Any, **kw: Any) -> TrainingClient:
        """`create_lora_training_client`; gives the client itself."""
        return await self.create_lora_training_client(*args, **kw)

    async def create_training_client_from_state_async(
        self, *args: Any, **kw: Any
    ) -> TrainingClient:
        """`create_training_client_from_state`; gives the client itself."""
        return await self.create_training_client_from_state(*args, **kw)

    async def create_training_client_from_state_with_optimizer_async(
        self, *args: Any, **kw: Any
    ) -> TrainingClient:
        """`create_training_client_from_state_with_optimizer`; gives the client itself."""
        return await self.create_training_client_from_state_with_optimizer(*args, **kw)

    async def create_sampling_client_async(self, *args: Any, **kw: Any) -> SamplingClient:
        """`create_sampling_client`; gives the client itself."""
        return await self.create_sampling_client(*args, **kw)

    async def get_server_capabilities_async(self) -> types.GetServerCapabilitiesResponse:
        """`get_server_capabilities`; gives the result itself."""
        return await self.get_server_capabilities()

    def close(self, status: str = "success", detail: str | None = None) -> APIFuture[None]:
        """End the session and give the embedded service back.

        Args:
            status: ``success``, ``errored`` or ``interrupted``.
            detail: says more.
        """

        async def work() -> None:
            if not self._closed:
                self._closed = True
                await self._session.finish(status, detail)
                await self._http.close()

        future = APIFuture.of(work())
        if self._local is not None:
            future.result()
            _local.release(self._local)
            self._local = None
        return future

    def __enter__(self) -> ServiceClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close("success").result()
        else:
            status = "interrupted" if issubclass(kind, KeyboardInterrupt) else "errored"
            self.close(status, repr(error)).result()

    def _from_state(
        self,
        path: str,
        base_model: str | None,
        user_metadata: Mapping[str, str] | None,
        token: str | None,
        *,
        optimizer: bool,
        **extra: Any,
    ) -> ClientFuture[TrainingClient]:
        number = self._session.next_id("model")

        async def work() -> TrainingClient:
            request = types.LoadWeightsRequest(
                session_id=await self._session.id(),
                model_seq_id=number,
                base_model=base_model,
                user_metadata=dict(user_metadata) if user_metadata else None,
                path=path,
                optimizer=optimizer,
                weights_access_token=token,
                **extra,
            )
            future = await _operations.submit(self._session, "/load_weights", body=request)
            loaded = await _operations.json_result(self._session, future, types.LoadWeightsResponse)
            run_id = loaded.model_id or future.model_id
            return await self._training_client(run_id or f"{request.session_id}:train:{number}")

        return self._created("LoadWeights", number, work())

    def _created(self, request_type: str, number: int, work: Any) -> ClientFuture[TrainingClient]:
        told = _operations.told(self._session, request_type, None, number, work)
        return ClientFuture(APIFuture.of(told).future())

    async def _training_client(self, model_id: str) -> TrainingClient:
        info = await self._http.call(
            "POST", "/get_info", types.GetInfoResponse, json={"model_id": model_id}
        )
        return TrainingClient(self._session, info)


def _key(given: str | None, url: str) -> str | None:
    return api_key(given, url)
