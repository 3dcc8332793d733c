"""TrainingClient: one run's operations."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from everstep.client import _operations as ops
from everstep.client._chunks import combine, split
from everstep.client._custom_loss import CustomLoss, custom_loss
from everstep.client._futures import APIFuture, ClientFuture
from everstep.client._polling import retrieve
from everstep.client._session import Session
from everstep.client.sampling_client import SamplingClient
from everstep.wire import types
from everstep.wire.proto import (
    PROTOBUF,
    decode_forward_backward_output,
    encode_forward_backward_request,
)

_PROTO_HEADERS = {"Content-Type": PROTOBUF}


class TrainingClient:
    """One training run. Every method returns at once with a future.

    Operations take their place when they are called, and are executed in that order; so a loop
    may call ``forward_backward`` and ``optim_step`` without waiting in between.

    Attributes:
        model_id: the run's id.
    """

    def __init__(self, session: Session, info: types.GetInfoResponse) -> None:
        self.model_id = info.model_id
        self._session = session
        self._info = info
        self._turns = ops.Turns()

    # Training

    def forward(
        self,
        data: Sequence[types.Datum],
        loss_fn: str,
        loss_fn_config: dict[str, float | str] | None = None,
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """Compute a loss and the targets' logprobs, without gradients; see `forward_backward`."""
        return self._pass(data, loss_fn, loss_fn_config, forward_only=True)

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
        return self._pass(data, loss_fn, loss_fn_config, forward_only=False)

    def forward_backward_custom(
        self, data: Sequence[types.Datum], loss_fn: CustomLoss
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """Compute gradients of a loss of one's own; it is evaluated here, with torch.

        Args:
            data: examples; their ``target_tokens`` say which logprobs the loss gets.
            loss_fn: called with the data and a list of logprob tensors, one a datum; returns the
                loss, a scalar tensor, and metrics.
        """
        chunks = self._chunks(data)
        first = self._turns.take(2 * len(chunks))

        async def work() -> types.ForwardBackwardOutput:
            last = first + len(chunks)
            try:
                forward = await self._run_chunks(chunks, "cross_entropy", None, first, True)
                weighted, metrics = custom_loss(data, forward, loss_fn)
            except BaseException:
                # The backward's places are taken: what changes nothing goes there, so that later
                # operations don't wait for them.
                await self._run_chunks(chunks, "cross_entropy", None, last, True)
                raise
            again = self._same_chunks(chunks, weighted)
            backward = await self._run_chunks(again, "cross_entropy", None, last, False)
            surrogate = backward.metrics["loss:sum"]
            kept = {k: v for k, v in backward.metrics.items() if k != "loss:sum"}
            return types.ForwardBackwardOutput(
                forward.loss_fn_output_type,
                forward.loss_fn_outputs,
                {**kept, **metrics, "surrogate_loss:sum": surrogate},
            )

        return self._told("ForwardBackward", first, work())

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
        seq_id = self._turns.take()
        request = types.OptimStepRequest(model_id=self.model_id, seq_id=seq_id, **{own: params})
        return self._operation("OptimStep", "/optim_step", seq_id, request, types.OptimStepResponse)

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
        seq_id = self._turns.take()
        request = types.SaveWeightsRequest(
            model_id=self.model_id,
            path=name,
            seq_id=seq_id,
            ttl_seconds=ttl_seconds,
            overwrite=overwrite,
            user_metadata=user_metadata,
        )
        return self._operation(
            "SaveWeights", "/save_weights", seq_id, request, types.SaveWeightsResponse
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
        seq_id = self._turns.take()
        request = types.SaveWeightsForSamplerRequest(
            model_id=self.model_id,
            path=name,
            seq_id=seq_id,
            ttl_seconds=ttl_seconds,
            user_metadata=user_metadata,
        )
        return self._operation(
            "SaveWeightsForSampler",
            "/save_weights_for_sampler",
            seq_id,
            request,
            types.SaveWeightsForSamplerResponse,
        )

    def save_weights_and_get_sampling_client(
        self, name: str | None = None, retry_config: Any = None, kind: str = "snapshot"
    ) -> ClientFuture[SamplingClient]:
        """Save the weights as they are and sample from them; kept until the session ends.

        Args:
            name: has no effect; kept for older scripts.
            retry_config: has no effect; kept for scripts that pass one.
            kind: ``snapshot``; ``inflight`` is served as a snapshot.
        """
        seq_id = self._turns.take()
        number = self._session.next_id("sampler")
        request = types.SaveWeightsForSamplerRequest.model_validate(
            {
                "model_id": self.model_id,
                "sampling_session_seq_id": number,
                "kind": kind,
                "seq_id": seq_id,
            }
        )

        async def work() -> SamplingClient:
            answer = await self._send(
                "/save_weights_for_sampler",
                seq_id,
                request,
                types.SaveWeightsForSamplerResponseInternal,
            )
            if answer.sampling_session_id is None:
                raise ValueError("the service gave no sampling session for an unnamed save")
            base_model = self._info.model_name or ""
            return SamplingClient(self._session, answer.sampling_session_id, base_model)

        return ClientFuture(self._told("SaveWeightsForSampler", seq_id, work()).future())

    def create_sampling_client(
        self, model_path: str, retry_config: Any = None
    ) -> ClientFuture[SamplingClient]:
        """Sample from a checkpoint."""
        return SamplingClient.create(self._session, model_path=model_path)

    # Facts

    def get_info(self) -> types.GetInfoResponse:
        """The run's model, as it was told at its creation."""
        return self._info

    def get_tokenizer(self) -> Any:
        """The model's tokenizer; needs transformers."""
        data = self._info.model_data
        return ops.tokenizer(data.tokenizer_id or data.model_name or "")

    # The same for coroutines: `await` gives the future, as in the official SDK.

    async def forward_async(self, *args: Any, **kw: Any) -> APIFuture[types.ForwardBackwardOutput]:
        """`forward`."""
        return self.forward(*args, **kw)

    async def forward_backward_async(
        self, *args: Any, **kw: Any
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """`forward_backward`."""
        return self.forward_backward(*args, **kw)

    async def forward_backward_custom_async(
        self, *args: Any, **kw: Any
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """`forward_backward_custom`."""
        return self.forward_backward_custom(*args, **kw)

    async def optim_step_async(self, *args: Any, **kw: Any) -> APIFuture[types.OptimStepResponse]:
        """`optim_step`."""
        return self.optim_step(*args, **kw)

    async def save_state_async(self, *args: Any, **kw: Any) -> APIFuture[types.SaveWeightsResponse]:
        """`save_state`."""
        return self.save_state(*args, **kw)

    async def load_state_async(self, *args: Any, **kw: Any) -> APIFuture[types.LoadWeightsResponse]:
        """`load_state`."""
        return self.load_state(*args, **kw)

    async def load_state_with_optimizer_async(
        self, *args: Any, **kw: Any
    ) -> APIFuture[types.LoadWeightsResponse]:
        """`load_state_with_optimizer`."""
        return self.load_state_with_optimizer(*args, **kw)

    async def save_weights_for_sampler_async(
        self, *args: Any, **kw: Any
    ) -> APIFuture[types.SaveWeightsForSamplerResponse]:
        """`save_weights_for_sampler`."""
        return self.save_weights_for_sampler(*args, **kw)

    async def save_weights_and_get_sampling_client_async(
        self, *args: Any, **kw: Any
    ) -> SamplingClient:
        """`save_weights_and_get_sampling_client`; gives the client itself."""
        return await self.save_weights_and_get_sampling_client(*args, **kw)

    async def create_sampling_client_async(self, *args: Any, **kw: Any) -> SamplingClient:
        """`create_sampling_client`; gives the client itself."""
        return await self.create_sampling_client(*args, **kw)

    async def get_info_async(self) -> types.GetInfoResponse:
        """`get_info`."""
        return self._info

    # Sending

    def _load(
        self, path: str, token: str | None, *, optimizer: bool
    ) -> APIFuture[types.LoadWeightsResponse]:
        seq_id = self._turns.take()
        request = types.LoadWeightsRequest(
            model_id=self.model_id,
            seq_id=seq_id,
            path=path,
            optimizer=optimizer,
            weights_access_token=token,
        )
        return self._operation(
            "LoadWeights", "/load_weights", seq_id, request, types.LoadWeightsResponse
        )

    def _operation(
        self,
        request_type: str,
        path: str,
        seq_id: int,
        request: types.Request,
        answer: type[ops.Answer],
    ) -> APIFuture[ops.Answer]:
        return self._told(request_type, seq_id, self._send(path, seq_id, request, answer))

    def _told(self, request_type: str, seq_id: int, work: Any) -> APIFuture[Any]:
        return APIFuture.of(ops.told(self._session, request_type, self.model_id, seq_id, work))

    async def _send(
        self, path: str, seq_id: int, request: types.Request, answer: type[ops.Answer]
    ) -> ops.Answer:
        future = await ops.in_turn(
            self._turns, seq_id, 1, lambda: ops.submit(self._session, path, body=request)
        )
        return await ops.json_result(self._session, future, answer)

    def _pass(
        self,
        data: Sequence[types.Datum],
        loss_fn: str,
        config: dict[str, float | str] | None,
        *,
        forward_only: bool,
    ) -> APIFuture[types.ForwardBackwardOutput]:
        chunks = self._chunks(data)
        first = self._turns.take(len(chunks))
        kind = "Forward" if forward_only else "ForwardBackward"
        return self._told(
            kind, first, self._run_chunks(chunks, loss_fn, config, first, forward_only)
        )

    def _chunks(self, data: Sequence[types.Datum]) -> list[list[types.Datum]]:
        config = self._session.config
        return split(data, config.fwdbwd_max_chunk_len, config.fwdbwd_max_chunk_bytes_count)

    @staticmethod
    def _same_chunks(
        chunks: list[list[types.Datum]], data: Sequence[types.Datum]
    ) -> list[list[types.Datum]]:
        left = iter(data)
        return [[next(left) for _ in chunk] for chunk in chunks]

    async def _run_chunks(
        self,
        chunks: list[list[types.Datum]],
        loss_fn: str,
        config: dict[str, float | str] | None,
        first: int,
        forward_only: bool,
    ) -> types.ForwardBackwardOutput:
        """Send the chunks in one turn, the first one last, and put their results together."""

        async def send(index: int) -> types.UntypedAPIFuture:
            body = types.ForwardBackwardInput(
                data=chunks[index], loss_fn=loss_fn, loss_fn_config=config
            )
            request = types.ForwardBackwardRequest(
                forward_backward_input=body, model_id=self.model_id, seq_id=first + index
            )
            content = encode_forward_backward_request(request, forward_only=forward_only)
            return await ops.submit(
                self._session, "/forward_backward", content=content, headers=_PROTO_HEADERS
            )

        async def send_all() -> list[types.UntypedAPIFuture]:
            if not self._session.config.parallel_fwdbwd_chunks:
                return [await send(index) for index in range(len(chunks))]
            later = await asyncio.gather(*(send(index) for index in range(1, len(chunks))))
            return [await send(0), *later]

        futures = await ops.in_turn(self._turns, first, len(chunks), send_all)
        results = await asyncio.gather(
            *(
                retrieve(
                    self._session.http, future.request_id, decode_forward_backward_output, None
                )
                for future in futures
            )
        )
        return combine(results)
