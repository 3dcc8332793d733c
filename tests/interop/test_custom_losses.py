"""Custom losses with both clients: evaluated on the service or here, the numbers are the same."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import tinker
import torch

import everstep
from everstep.client._operations.loss_handle import LossHandle as OurHandle
from tests.conftest import Service
from tests.scenario import MODEL, connect, data, train

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SDKS = [everstep, tinker]
STEP = {"learning_rate": 0.01, "weight_decay": 0.1}


@pytest.fixture(params=SDKS, ids=["everstep", "tinker"])
def sdk(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def client(sdk: Any, service: Service) -> Any:
    return connect(sdk, service.url)


def new_run(client: Any) -> Any:
    return client.create_lora_training_client(MODEL, rank=4, seed=5).result()


@contextmanager
def chunks_of(client: Any, length: int) -> Iterator[None]:
    """Have a client split its passes into requests of a few datums."""
    holder, update = client.holder, {"fwdbwd_max_chunk_len": length}
    if isinstance(client, tinker.ServiceClient):
        config = holder.get_client_config().model_copy(update=update)
        patch = mock.patch.object(holder, "get_client_config", lambda: config)
    else:
        config = holder.config.model_copy(update=update)
        patch = mock.patch.object(holder.connection, "config", config)
    with patch:
        yield


def relative(logprobs: Any, weights: Any) -> Any:
    """A loss that reads a second input, indexes by a mask and uses lengths."""
    chosen = weights > 0
    centred = logprobs - logprobs.detach()[chosen].mean()
    loss = (-torch.sigmoid(centred) * weights).sum() + logprobs.clamp(min=-3.0).square().mean()
    return loss, {"custom/chosen:sum": chosen.sum(), "custom/level:mean": logprobs.mean()}


def numbers(output: Any) -> list[float]:
    return [x for out in output.loss_fn_outputs for x in out["logprobs"].tolist()]


def here(loss: Any) -> Any:
    """Return the same loss as a function that the client calls, without an upload."""

    def of_all(data: list[Any], logprobs: list[Any]) -> Any:
        total, sums = torch.zeros(()), {}  # type: ignore[var-annotated]
        for datum, logprob in zip(data, logprobs, strict=True):
            value, metrics = loss(logprob, datum.loss_fn_inputs["weights"].to_torch())
            total = total + value
            for key, metric in metrics.items():
                sums[key] = sums.get(key, 0.0) + float(metric.detach())
        means = {k: v / len(data) if k.endswith(":mean") else v for k, v in sums.items()}
        return total, means

    return of_all


@pytest.mark.parametrize("length", [100, 3])
def test_loss_gives_the_same_numbers_on_the_service_and_here(
    sdk: Any, client: Any, length: int
) -> None:
    there, local = new_run(client), new_run(client)
    # One object for both: a session creates a loss once.
    handle = client.create_custom_loss(
        lambda logprobs, weights: relative(logprobs, weights * (1 + length)),
        {"logprobs": 1, "weights": 1},
    ).result()
    assert handle.loss_id.endswith(":loss:0")

    def scaled(logprobs: Any, weights: Any) -> Any:
        return relative(logprobs, weights * (1 + length))

    with chunks_of(client, length):
        for shift in range(3):
            ours = there.forward_backward_custom(data(sdk, 8, shift), handle)
            steps = [there.optim_step(sdk.AdamParams(**STEP))]
            theirs = local.forward_backward_custom(data(sdk, 8, shift), here(scaled))
            steps.append(local.optim_step(sdk.AdamParams(**STEP)))
            one, other = ours.result(), theirs.result()
            # The client sends its gradients as weights: the same bits give the same gradients.
            assert numbers(one) == numbers(other)
            assert steps[0].result().metrics == steps[1].result().metrics
            assert one.metrics["loss:sum"] == pytest.approx(other.metrics["loss:sum"], rel=1e-6)
            for key in ("custom/chosen:sum", "custom/level:mean"):
                assert one.metrics[key] == pytest.approx(other.metrics[key], rel=1e-6), key
            assert "surrogate_loss:sum" in other.metrics
            assert "surrogate_loss:sum" not in one.metrics


def test_loss_combines_data_across_chunks(sdk: Any, client: Any) -> None:
    """Bradley-Terry over pairs in different requests equals all pairs in one request."""

    def pairs(_data: list[Any], logprobs: list[Any]) -> Any:
        totals = torch.stack([each.mean() for each in logprobs])
        loss = -torch.nn.functional.logsigmoid(totals[:3] - totals[3:]).sum()
        return loss, {"accuracy": float((totals[:3] > totals[3:]).float().mean())}

    whole, cut = new_run(client), new_run(client)
    expected = whole.forward_backward_custom(data(sdk, 6), pairs).result()
    with chunks_of(client, 2):
        found = cut.forward_backward_custom(data(sdk, 6), pairs).result()
    assert found.metrics["accuracy"] == expected.metrics["accuracy"]
    assert found.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], rel=1e-5)
    first, second = (run.optim_step(sdk.AdamParams(**STEP)).result() for run in (whole, cut))
    assert second.metrics["grad_norm"] == pytest.approx(first.metrics["grad_norm"], rel=1e-4)


def test_custom_cross_entropy_equals_the_builtin(sdk: Any, client: Any) -> None:
    def loss(data: list[Any], logprobs: list[Any]) -> Any:
        weights = [each.loss_fn_inputs["weights"].to_torch() for each in data]
        return -sum((p * w).sum() for p, w in zip(logprobs, weights, strict=True)), {}

    run, reference = new_run(client), new_run(client)
    run.forward_backward_custom(data(sdk), loss).result()
    reference.forward_backward(data(sdk), "cross_entropy").result()
    steps = [each.optim_step(sdk.AdamParams(**STEP)).result().metrics for each in (run, reference)]
    assert steps[0] == steps[1]
    assert train(sdk, run, 1) == train(sdk, reference, 1)


def test_loss_takes_several_targets_a_position(sdk: Any, client: Any) -> None:
    """Distillation on the K most likely tokens, on the service and here."""

    def distill(logprobs: Any, teacher: Any) -> Any:
        return -(teacher * torch.log_softmax(logprobs, dim=-1)).sum(), {}

    def datum(length: int) -> Any:
        random = torch.Generator().manual_seed(length)
        targets = torch.randint(0, 250, (length, 4), generator=random)
        teacher = torch.rand(length, 4, generator=random)
        return sdk.Datum(
            model_input=sdk.ModelInput.from_ints(list(range(length))),
            loss_fn_inputs={
                "target_tokens": sdk.TensorData.from_torch(targets),
                "teacher": sdk.TensorData.from_torch(teacher),
            },
        )

    def of_all(data: list[Any], logprobs: list[Any]) -> Any:
        teachers = [each.loss_fn_inputs["teacher"].to_torch() for each in data]
        return sum(distill(p, t)[0] for p, t in zip(logprobs, teachers, strict=True)), {}

    batch = [datum(9), datum(4)]
    there, local = new_run(client), new_run(client)
    handle = client.create_custom_loss(distill, {"logprobs": 2, "teacher": 2}).result()
    one = there.forward_backward_custom(batch, handle).result()
    other = local.forward_backward_custom(batch, of_all).result()
    assert numbers(one) == numbers(other)
    assert one.metrics["loss:sum"] == pytest.approx(other.metrics["loss:sum"], rel=1e-6)
    norms = [r.optim_step(sdk.AdamParams(**STEP)).result().metrics for r in (there, local)]
    assert norms[0] == norms[1]


def test_loss_that_fails_on_the_service_leaves_no_gradient(sdk: Any, client: Any) -> None:
    def short(logprobs: Any) -> Any:
        return logprobs[25] + logprobs.sum(), {}

    run, reference = new_run(client), new_run(client)
    handle = client.create_custom_loss(short, {"logprobs": 1}).result()
    with pytest.raises(sdk.RequestFailedError, match=r"'short' can't be computed: node 'getitem'"):
        run.forward_backward_custom(data(sdk), handle).result()
    assert train(sdk, run, 2) == train(sdk, reference, 2)


@pytest.mark.parametrize("fault", ["raises", "no tensor", "not of the logprobs"])
def test_our_client_continues_after_a_loss_that_fails_here(service: Service, fault: str) -> None:
    """The official client is unusable afterwards; ours releases its sequence ids and continues."""

    def loss(_data: list[Any], logprobs: list[Any]) -> Any:
        if fault == "raises":
            raise KeyError("mine")
        return (3.0 if fault == "no tensor" else torch.ones((), requires_grad=True)), {}

    client = connect(everstep, service.url)
    run, reference = new_run(client), new_run(client)
    with chunks_of(client, 2), pytest.raises((KeyError, ValueError)):
        run.forward_backward_custom(data(everstep, 5), loss).result()
    assert train(everstep, run, 2) == train(everstep, reference, 2)


def test_handle_runs_here_where_the_service_can_not(service: Service) -> None:
    """Older services evaluate no custom loss: the handle is not uploaded."""
    client = connect(everstep, service.url)
    run, reference = new_run(client), new_run(client)
    ranks: Any = {"logprobs": 1, "weights": 1}
    uploaded = client.create_custom_loss(relative, ranks).result()
    assert isinstance(uploaded, OurHandle)
    client.holder.config.custom_loss_server_side = False
    here_only = client.create_custom_loss(relative, ranks).result()
    assert here_only.loss_id is None
    one = run.forward_backward_custom(data(everstep), uploaded).result()
    other = reference.forward_backward_custom(data(everstep), here_only).result()
    assert numbers(one) == numbers(other)
    for key in ("loss:sum", "custom/chosen:sum", "custom/level:mean"):
        assert one.metrics[key] == pytest.approx(other.metrics[key], rel=1e-6)


def test_losses_are_created_from_a_running_event_loop(sdk: Any, client: Any) -> None:
    async def use() -> Any:
        loss = await client.create_custom_loss(
            lambda logprobs: (-logprobs.sum(), {}), {"logprobs": 1}
        )
        run = await client.create_lora_training_client(MODEL, rank=4, seed=5)
        return await run.forward_backward_custom(data(sdk), loss)

    output = asyncio.run(use())
    assert output.metrics["loss:sum"] == pytest.approx(-sum(numbers(output)), rel=1e-5)
