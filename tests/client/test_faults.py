"""Faults of the service: nothing is applied twice, and nothing waits for ever."""

from __future__ import annotations

import concurrent.futures
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

import everstep
from everstep import backoff
from everstep.client._transport import http
from everstep.wire.codecs.proto import PROTOBUF
from tests.client.fake_service import (
    GIVE_UP_SECONDS,
    MODEL,
    Answered,
    FakeService,
    Fault,
    Held,
    Lost,
    Recorded,
    Refused,
    Reply,
    failed,
    logprob,
    metadata,
    try_again,
)
from tests.client.fixtures import Clock

T = GIVE_UP_SECONDS
ADAM = everstep.AdamParams(learning_rate=0.1)
TRANSIENT: list[Fault] = [
    Lost(),
    Lost(cut=True),
    Lost(applied=False),
    Refused(408),
    Refused(409),
    Refused(429),
    Refused(500),
    Refused(503),
    Refused(400, body=None),
]


@pytest.fixture(autouse=True)
def _backoff_without_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff._random, "uniform", lambda low, high: high)


def data(count: int = 1) -> list[everstep.Datum]:
    return [
        everstep.Datum(
            model_input=everstep.ModelInput.from_ints([index, 1, 2]),
            loss_fn_inputs={"target_tokens": [1, 2, index], "weights": [1.0, 1.0, 0.0]},
        )
        for index in range(count)
    ]


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "/forward_backward": lambda run: run.forward_backward(data(), "cross_entropy"),
    "/optim_step": lambda run: run.optim_step(ADAM),
    "/save_weights": lambda run: run.save_state("a"),
    "/load_weights": lambda run: run.load_state_with_optimizer("tinker://r/weights/a"),
    "/save_weights_for_sampler": lambda run: run.save_weights_for_sampler("a"),
}


def has_seq_id(seq_id: int) -> Callable[[Recorded], bool]:
    return lambda request: request.seq_id == seq_id


def same_request(requests: list[Recorded]) -> bool:
    first = requests[0]
    return first.key is not None and all(
        (request.key, request.seq_id, request.body) == (first.key, first.seq_id, first.body)
        for request in requests
    )


# Submits


@pytest.mark.parametrize("fault", TRANSIENT, ids=repr)
@pytest.mark.parametrize("path", OPERATIONS)
def test_transient_failure_resends_the_same_request(
    fake: FakeService, run: Any, clock: Clock, path: str, fault: Fault
) -> None:
    fake.script(path, fault)
    OPERATIONS[path](run).result(T)
    run.optim_step(ADAM).result(T)
    sent = [request for request in fake.to(path) if request.seq_id == 1]
    assert len(sent) == 2 and same_request(sent)
    assert [request.headers["x-stainless-retry-count"] for request in sent] == ["0", "1"]
    assert clock.waits == [0.5]
    assert fake.applied_ids()[-2:] == [1, 2]
    assert len(fake.applied) == 3  # with create_model


def test_submit_is_retried_until_a_reply_arrives(fake: FakeService, run: Any, clock: Clock) -> None:
    fake.script("/optim_step", *[Lost()] * 7)
    assert run.optim_step(ADAM).result(T).metrics == {"step:max": 1.0}
    assert len(fake.to("/optim_step")) == 8 and same_request(fake.to("/optim_step"))
    assert fake.applied_ids()[1:] == [1]
    assert clock.waits == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "20", "retry-after": "9"}, 0.02),
        ({"retry-after": "61"}, 0.5),
        ({"retry-after": "-1"}, 0.5),
        ({"retry-after": "nan"}, 0.5),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, 0.5),
    ],
)
def test_retry_after_header_sets_the_delay(
    fake: FakeService, run: Any, clock: Clock, headers: dict[str, str], wait: float
) -> None:
    fake.script("/optim_step", Refused(429, headers=headers))
    run.optim_step(ADAM).result(T)
    assert clock.waits == [pytest.approx(wait)]


def test_should_retry_header_overrides_the_status(fake: FakeService, run: Any) -> None:
    fake.script("/optim_step", Refused(503, headers={"x-should-retry": "false"}, consumes=True))
    with pytest.raises(everstep.InternalServerError):
        run.optim_step(ADAM).result(T)
    fake.script("/optim_step", Refused(404, headers={"x-should-retry": "true"}))
    run.optim_step(ADAM).result(T)
    assert fake.submits() == [("/optim_step", 1), ("/optim_step", 2), ("/optim_step", 2)]


def test_submit_fails_after_five_minutes_of_errors(
    fake: FakeService, run: Any, clock: Clock
) -> None:
    fake.script("/optim_step", *[Refused(503, consumes=True)] * 100)
    with pytest.raises(everstep.InternalServerError, match="503"):
        run.optim_step(ADAM).result(T)
    assert 300 < sum(clock.waits) <= 310
    run.save_state("a").result(T)  # the next operation is sent all the same


def test_unpaid_bill_is_retried(fake: FakeService, run: Any, clock: Clock) -> None:
    fake.script("/optim_step", *[Refused(402)] * 100)
    fake.script("/retrieve_future", *[Refused(402)] * 3, where=fake.polls_of(1))
    run.optim_step(ADAM).result(T)
    assert clock.waits == [5.0] * 103 and same_request(fake.to("/optim_step"))


def test_unpaid_bill_fails_after_an_hour(fake: FakeService, run: Any, clock: Clock) -> None:
    fake.script("/optim_step", *[Refused(402, consumes=True)] * 800)
    with pytest.raises(everstep.BillingError):
        run.optim_step(ADAM).result(T)
    assert 3600 < sum(clock.waits) <= 3610


def test_retries_create_one_session_and_one_run(fake: FakeService, client: Any) -> None:
    fake.script("/create_session", Lost(), Lost(cut=True))
    fake.script("/create_model", Lost(), Refused(503))
    run = client.create_lora_training_client(MODEL).result(T)
    assert run.model_id == "session-0:train:0"
    assert same_request(fake.to("/create_session")) and len(fake.to("/create_session")) == 3
    assert same_request(fake.to("/create_model")) and len(fake.applied) == 1
    fake.script("/load_weights", Lost())
    resumed = client.create_training_client_from_state("tinker://r/weights/a").result(T)
    assert resumed.model_id == "session-0:train:1" and len(fake.applied) == 2


def test_retries_create_one_sampler(fake: FakeService, client: Any) -> None:
    fake.script("/create_sampling_session", Lost(), Refused(500))
    sampler = client.create_sampling_client(base_model=MODEL).result(T)
    assert same_request(fake.to("/create_sampling_session"))
    other = client.create_sampling_client(base_model=MODEL).result(T)
    ids = [sampler.sampling_session_id, other.sampling_session_id]
    assert ids == ["session-0:sample:0", "session-0:sample:1"]


# The submit queue


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 413, 422])
def test_refused_operation_lets_later_ones_through(
    fake: FakeService, run: Any, status: int
) -> None:
    fake.script("/optim_step", Refused(status, consumes=True))
    first, second, third = run.optim_step(ADAM), run.save_state("a"), run.optim_step(ADAM)
    with pytest.raises(everstep.APIStatusError, match="scripted") as caught:
        first.result(T)
    assert caught.value.status_code == status
    second.result(T)
    third.result(T)
    assert [seq_id for _, seq_id in fake.submits()] == [1, 2, 3]


def test_invalid_response_lets_later_operations_through(fake: FakeService, run: Any) -> None:
    fake.script("/optim_step", Answered(Reply(200, b"<html>", {}, "text/html")), Lost())
    first, second = run.optim_step(ADAM), run.optim_step(ADAM)
    with pytest.raises(everstep.APIResponseValidationError):
        first.result(T)
    fake.arrived("/optim_step", 3)
    assert not second.done() and fake.submits() == [("/optim_step", n) for n in (1, 2, 2)]


def test_failed_operation_does_not_stop_later_ones(fake: FakeService, run: Any) -> None:
    fake.script("/retrieve_future", failed("too long"), where=fake.polls_of(1))
    first, second = run.forward_backward(data(), "cross_entropy"), run.optim_step(ADAM)
    with pytest.raises(everstep.RequestFailedError, match="too long"):
        first.result(T)
    assert second.result(T).metrics == {"step:max": 2.0}


def test_operation_waits_for_the_previous_acknowledgement(fake: FakeService, run: Any) -> None:
    held = Held()
    fake.script("/optim_step", held, where=lambda request: request.seq_id == 1)
    futures = [run.optim_step(ADAM) for _ in range(3)]
    held.wait_for_arrival()
    assert fake.submits() == [("/optim_step", 1)]
    held.release()
    assert [future.result(T).metrics["step:max"] for future in futures] == [1.0, 2.0, 3.0]
    assert fake.submits() == [("/optim_step", n) for n in (1, 2, 3)]


def test_submits_follow_the_order_of_calls_from_many_threads(fake: FakeService, run: Any) -> None:
    threads, calls = 8, 10
    start = threading.Barrier(threads)
    held = Held()
    fake.script("/optim_step", held, where=lambda request: request.seq_id == 1)

    def work(number: int) -> list[Any]:
        start.wait(T)
        chance = random.Random(number)
        names = [chance.choice(["/optim_step", "/save_weights"]) for _ in range(calls)]
        return [(name, OPERATIONS[name](run)) for name in names]

    first = run.optim_step(ADAM)
    held.wait_for_arrival()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        mine = list(pool.map(work, range(threads)))
    held.release()
    first.result(T)
    for futures in mine:
        for _, future in futures:
            future.result(T)
    assert [seq_id for _, seq_id in fake.submits()] == list(range(1, threads * calls + 2))
    assert fake.applied_ids()[1:] == list(range(1, threads * calls + 2))
    for futures in mine:  # the steps of one thread keep their order
        steps = [f.result().metrics["step:max"] for name, f in futures if name == "/optim_step"]
        assert steps == sorted(steps)


@pytest.mark.parametrize("moment", ["at once", "while it waits", "while it is sent"])
def test_cancelled_operation_does_not_block_later_ones(
    fake: FakeService, run: Any, moment: str
) -> None:
    held = Held()
    seq_id = 2 if moment == "while it is sent" else 1
    fake.script("/optim_step", held, where=lambda request: request.seq_id == seq_id)
    first = run.optim_step(ADAM)
    if moment == "while it waits":
        held.wait_for_arrival()
    cancelled = run.optim_step(ADAM)
    if moment == "while it is sent":
        held.wait_for_arrival()
    assert cancelled.future().cancel()
    last = run.optim_step(ADAM)
    held.wait_for_arrival()
    held.release()
    first.result(T)
    assert last.result(T).metrics == {"step:max": 3.0}
    assert fake.submits() == [("/optim_step", n) for n in (1, 2, 3)]
    with pytest.raises(concurrent.futures.CancelledError):
        cancelled.result(T)


def test_results_arrive_in_any_order(fake: FakeService, run: Any) -> None:
    held = Held()
    fake.script("/retrieve_future", held, where=fake.polls_of(1))
    first, second = run.optim_step(ADAM), run.optim_step(ADAM)
    assert second.result(T).metrics == {"step:max": 2.0}
    assert not first.done()
    held.release()
    assert first.result(T).metrics == {"step:max": 1.0}


WRONG_CALLS: dict[str, Callable[[Any], Any]] = {
    "ttl": lambda run: run.save_state("a", ttl_seconds="never"),
    "metadata": lambda run: run.save_weights_for_sampler("a", user_metadata={"a": object()}),
    "path": lambda run: run.load_state(object()),
    "params": lambda run: run.optim_step({"warmup": 1.0}),
    "number": lambda run: run.optim_step(everstep.AdamParams(learning_rate=float("nan"))),
    "kind": lambda run: run.save_weights_and_get_sampling_client(kind="new"),
    "loss": lambda run: run.forward_backward(data(), object()),
    "config": lambda run: run.forward_backward(data(3), "ppo", {"beta": object()}),
    "chunk": lambda run: run.forward_backward(
        [
            everstep.Datum(
                model_input=everstep.ModelInput(
                    chunks=[everstep.types.ImageAssetPointerChunk(location="x", format="png")]
                )
            )
        ],
        "cross_entropy",
    ),
    "targets": lambda run: run.forward_backward_custom(
        [everstep.Datum(model_input=everstep.ModelInput.from_ints([1]))], custom
    ),
}


@pytest.mark.parametrize("call", WRONG_CALLS)
def test_invalid_call_claims_no_sequence_id(fake: FakeService, run: Any, call: str) -> None:
    """A claimed sequence id that is never sent would block all later operations."""
    with pytest.raises((ValueError, TypeError)):
        WRONG_CALLS[call](run).result(T)
    assert run.optim_step(ADAM).result(1.0).metrics["step:max"] >= 1.0
    ids = sorted({seq_id for _, seq_id in fake.submits()})
    assert ids == list(range(1, len(ids) + 1))


# Chunks


def test_first_chunk_is_sent_last_and_before_the_next_operation(
    fake: FakeService, client: Any
) -> None:
    fake.config = {"fwdbwd_max_chunk_len": 2}
    run = client.create_lora_training_client(MODEL).result(T)
    held = Held()
    fake.script("/forward_backward", held, where=lambda request: request.seq_id == 3)
    passed = run.forward_backward(data(7), "cross_entropy")
    step = run.optim_step(ADAM)
    held.wait_for_arrival()
    fake.arrived("/forward_backward", 3)  # in parallel, each on its own connection
    assert sorted(fake.submits()) == [("/forward_backward", n) for n in (2, 3, 4)]
    held.release()
    output = passed.result(T)
    step.result(T)
    assert fake.submits()[3:] == [("/forward_backward", 1), ("/optim_step", 5)]
    assert fake.applied_ids()[1:] == [1, 2, 3, 4, 5]
    assert [o["logprobs"].tolist()[2] for o in output.loss_fn_outputs] == [
        logprob(index) for index in range(7)
    ]
    assert output.metrics["size:max"] == 2.0 and output.metrics["size:mean"] == 13 / 7


def test_chunks_are_sent_sequentially_if_the_service_asks(fake: FakeService, client: Any) -> None:
    fake.config = {"fwdbwd_max_chunk_len": 2, "parallel_fwdbwd_chunks": False}
    run = client.create_lora_training_client(MODEL).result(T)
    run.forward_backward(data(7), "cross_entropy").result(T)
    assert [seq_id for _, seq_id in fake.submits()] == [1, 2, 3, 4]


def test_retried_chunks_are_applied_once(fake: FakeService, client: Any) -> None:
    fake.config = {"fwdbwd_max_chunk_len": 1}
    run = client.create_lora_training_client(MODEL).result(T)
    for seq_id in (1, 2, 4):
        fake.script("/forward_backward", Lost(), where=has_seq_id(seq_id))
    run.forward_backward(data(5), "cross_entropy").result(T)
    assert fake.unused_faults() == 0 and fake.applied_ids()[1:] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("seq_id", [1, 2, 4])
def test_refused_chunk_leaves_no_gap_in_sequence_ids(
    fake: FakeService, client: Any, seq_id: int, parallel: bool
) -> None:
    fake.config = {"fwdbwd_max_chunk_len": 1, "parallel_fwdbwd_chunks": parallel}
    run = client.create_lora_training_client(MODEL).result(T)
    fake.script("/forward_backward", Refused(400, consumes=True), where=has_seq_id(seq_id))
    passed, step = run.forward_backward(data(4), "cross_entropy"), run.optim_step(ADAM)
    with pytest.raises(everstep.BadRequestError):
        passed.result(T)
    assert step.result(T).metrics == {"step:max": 5.0}
    assert {seq_id for _, seq_id in fake.submits()} == {1, 2, 3, 4, 5}
    assert fake.submits()[-1] == ("/optim_step", 5)


# Custom losses


def custom(_data: Any, logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
    return -sum(row.sum() for row in logprobs), {"rows:sum": float(len(logprobs))}


def test_custom_loss_claims_sequence_ids_when_called(fake: FakeService, client: Any) -> None:
    fake.config = {"fwdbwd_max_chunk_len": 1}
    run = client.create_lora_training_client(MODEL).result(T)
    passed, step = run.forward_backward_custom(data(2), custom), run.optim_step(ADAM)
    output = passed.result(T)
    step.result(T)
    assert [seq_id for _, seq_id in fake.submits()] == [2, 1, 4, 3, 5]
    passes = {request.seq_id: request.body for request in fake.to("/forward_backward")}
    assert [passes[n]["forward_only"] for n in (1, 2, 3, 4)] == [True, True, False, False]
    assert passes[3]["data"][0]["loss_fn_inputs"]["weights"] == [1.0, 1.0, 1.0]
    loss = -sum(logprob(token) for token in (1, 2, 0, 1, 2, 1))
    assert output.metrics["loss:sum"] == pytest.approx(loss)
    assert output.metrics["surrogate_loss:sum"] == pytest.approx(loss)
    assert output.metrics["rows:sum"] == 2.0


class Own(Exception):
    """An error of the caller's loss."""


def test_raising_loss_leaves_no_gradient_and_no_gap(fake: FakeService, run: Any) -> None:
    def wrong(_data: Any, _logprobs: Any) -> Any:
        raise Own("no")

    passed, step = run.forward_backward_custom(data(2), wrong), run.optim_step(ADAM)
    with pytest.raises(Own):
        passed.result(T)
    assert step.result(T).metrics == {"step:max": 3.0}
    passes = fake.to("/forward_backward")
    assert len(passes) == 2 and all(request.body["forward_only"] for request in passes)


def test_error_of_a_loss_is_raised_even_if_the_service_fails_too(
    fake: FakeService, run: Any
) -> None:
    def wrong(_data: Any, _logprobs: Any) -> Any:
        fake.script("/forward_backward", Refused(400, consumes=True))
        raise Own("no")

    passed, step = run.forward_backward_custom(data(), wrong), run.optim_step(ADAM)
    with pytest.raises(Own):
        passed.result(T)
    step.result(T)


def test_loss_can_use_the_client(fake: FakeService, run: Any) -> None:
    """A loss does not run on the client's own event loop, where it would wait for itself."""
    seen = []

    def loss(rows: Any, logprobs: Any) -> Any:
        seen.append(run.get_info().model_id)
        seen.append(sampler.compute_logprobs(everstep.ModelInput.from_ints([1, 2])).result(T))
        return custom(rows, logprobs)

    sampler = run.save_weights_and_get_sampling_client().result(T)
    run.forward_backward_custom(data(), loss).result(T)
    assert seen == [run.model_id, [None, -0.5]]


# Polls


def test_lost_result_is_polled_again(fake: FakeService, run: Any, clock: Clock) -> None:
    fake.script("/retrieve_future", *[Lost()] * 3, Lost(cut=True), where=fake.polls_of(1))
    assert run.optim_step(ADAM).result(T).metrics == {"step:max": 1.0}
    assert clock.waits == [1.0, 2.0, 4.0, 8.0]
    assert fake.applied_ids()[1:] == [1]


def test_polls_back_off_without_limit_while_the_service_is_unreachable(
    fake: FakeService, run: Any, clock: Clock
) -> None:
    fake.script("/retrieve_future", *[Lost(applied=False)] * 40, where=fake.polls_of(1))
    run.optim_step(ADAM).result(T)
    assert clock.waits == [1.0, 2.0, 4.0, 8.0, 16.0] + [30.0] * 35


def test_any_response_resets_the_backoff(fake: FakeService, run: Any, clock: Clock) -> None:
    for answer in (Refused(502), try_again(408), try_again(200), metadata()):
        fake.script("/retrieve_future", Lost(), Lost(), answer, where=fake.polls_of(1))
    run.optim_step(ADAM).result(T)
    assert clock.waits == [1.0, 2.0] * 4


def test_429_backs_off_and_5xx_is_polled_again_immediately(
    fake: FakeService, run: Any, clock: Clock
) -> None:
    fake.script("/retrieve_future", *[Refused(429)] * 3, where=fake.polls_of(1))
    run.optim_step(ADAM).result(T)
    assert clock.waits == [1.0, 2.0, 4.0]
    clock.waits.clear()
    fake.script("/retrieve_future", Refused(500), *[Refused(503)] * 4, where=fake.polls_of(2))
    run.optim_step(ADAM).result(T)
    assert clock.waits == []


def test_persistent_5xx_backs_off(fake: FakeService, run: Any, clock: Clock) -> None:
    fake.script("/retrieve_future", *[Refused(502)] * 30, where=fake.polls_of(1))
    run.optim_step(ADAM).result(T)
    assert len(clock.waits) == 22 and clock.waits == sorted(clock.waits)
    assert max(clock.waits) == 30.0


def test_unfinished_operation_is_polled_again_immediately(
    fake: FakeService, run: Any, clock: Clock
) -> None:
    fake.script("/retrieve_future", try_again(), try_again(408), where=fake.polls_of(1))
    run.optim_step(ADAM).result(T)
    polls = [r for r in fake.to("/retrieve_future") if fake.polls_of(1)(r)]
    assert [r.headers["x-tinker-request-iteration"] for r in polls] == ["0", "1", "2"]
    timed = ["x-tinker-create-promise-roundtrip-time" in r.headers for r in polls]
    assert timed == [True, False, False]
    assert clock.waits == []


def test_large_result_is_fetched_after_its_size(fake: FakeService, run: Any) -> None:
    fake.script("/retrieve_future", metadata(), where=fake.polls_of(1))
    run.forward_backward(data(), "cross_entropy").result(T)
    polls = [r.body for r in fake.to("/retrieve_future") if fake.polls_of(1)(r)]
    assert [body["allow_metadata_only"] for body in polls] == [True, False]


NO_RESULTS: list[Fault] = [
    Answered(Reply(200, b"<html>", {}, "text/html")),
    Answered(Reply(200, [1])),
    Answered(Reply(200, {"metrics": "many"})),
    Answered(Reply(200, b"\xff\xff", {}, PROTOBUF)),
]


@pytest.mark.parametrize("path", ["/optim_step", "/forward_backward"])
@pytest.mark.parametrize("fault", NO_RESULTS, ids=repr)
def test_malformed_result_raises_a_validation_error(
    fake: FakeService, run: Any, path: str, fault: Fault
) -> None:
    fake.script("/retrieve_future", fault, where=fake.polls_of(1))
    with pytest.raises(everstep.APIResponseValidationError):
        OPERATIONS[path](run).result(T)


def test_repeated_size_raises_a_validation_error(fake: FakeService, run: Any) -> None:
    fake.script("/retrieve_future", metadata(), metadata(), where=fake.polls_of(1))
    with pytest.raises(everstep.APIResponseValidationError, match="size"):
        run.optim_step(ADAM).result(T)


def test_poll_retries_400_three_times(fake: FakeService, run: Any, clock: Clock) -> None:
    fake.script("/retrieve_future", *[Refused(400)] * 3, where=fake.polls_of(1))
    run.optim_step(ADAM).result(T)
    fake.script("/retrieve_future", *[Refused(400)] * 4, where=fake.polls_of(2))
    with pytest.raises(everstep.BadRequestError):
        run.optim_step(ADAM).result(T)
    assert clock.waits == [] and fake.unused_faults() == 0


@pytest.mark.parametrize("status", [401, 403, 404, 410, 422])
def test_refused_poll_raises_and_later_operations_continue(
    fake: FakeService, run: Any, status: int
) -> None:
    fake.script("/retrieve_future", Refused(status), where=fake.polls_of(1))
    first, second = run.forward_backward(data(), "cross_entropy"), run.optim_step(ADAM)
    with pytest.raises(everstep.APIStatusError) as caught:
        first.result(T)
    assert caught.value.status_code == status
    second.result(T)
    assert len(fake.to("/forward_backward")) == 1


@pytest.mark.parametrize(
    ("sent", "category"),
    [
        ("user", "user"),
        ("server", "server"),
        ("unknown", "unknown"),
        ("?", "unknown"),
        (None, "unknown"),
    ],
)
def test_failure_has_category_and_request_id(
    fake: FakeService, run: Any, sent: str | None, category: str
) -> None:
    fake.script("/retrieve_future", failed("token 999", sent), where=fake.polls_of(1))
    with pytest.raises(everstep.RequestFailedError, match="token 999") as caught:
        run.forward_backward(data(), "cross_entropy").result(T)
    assert caught.value.category == category
    assert caught.value.request_id == "request-1"  # request-0 created the run
    assert len([r for r in fake.to("/retrieve_future") if fake.polls_of(1)(r)]) == 1


def test_error_without_text_is_a_failure(fake: FakeService, run: Any) -> None:
    fake.script("/retrieve_future", Answered(Reply(200, {"error": None})))
    with pytest.raises(everstep.RequestFailedError):
        run.optim_step(ADAM).result(T)


# Samples


@pytest.fixture(name="sampler")
def sampler_fixture(client: Any) -> Any:
    return client.create_sampling_client(base_model=MODEL).result(T)


def sample(sampler: Any) -> Any:
    prompt = everstep.ModelInput.from_ints([1, 2, 3])
    return sampler.sample(prompt, 1, everstep.SamplingParams(max_tokens=3))


def sent_seq_ids(fake: FakeService) -> list[int | None]:
    return [request.seq_id for request in fake.to("/asample")]


@pytest.mark.parametrize("fault", [f for f in TRANSIENT if f != Refused(429)], ids=repr)
def test_retried_sample_is_drawn_once(fake: FakeService, sampler: Any, fault: Fault) -> None:
    fake.script("/asample", fault)
    assert sample(sampler).result(T).sequences[0].tokens == [0, 1, 2]
    assert sent_seq_ids(fake) == [0, 0] and same_request(fake.to("/asample"))
    assert len(fake.applied) == 1


def test_busy_service_gets_the_same_sample_again(fake: FakeService, sampler: Any) -> None:
    fake.script("/asample", *[Refused(429)] * 3)
    sample(sampler).result(T)
    sample(sampler).result(T)
    assert sent_seq_ids(fake) == [0, 0, 0, 0, 1] and len(fake.applied) == 2


def test_expired_sample_is_drawn_again(fake: FakeService, sampler: Any) -> None:
    fake.script("/retrieve_future", Refused(410), Refused(410))
    assert sample(sampler).result(T).sequences[0].tokens == [0, 1, 2]
    assert sent_seq_ids(fake) == [0, 1, 2]
    keys = {request.key for request in fake.to("/asample")}
    assert len(keys) == 3
    sample(sampler).result(T)
    assert sent_seq_ids(fake) == [0, 1, 2, 3]


def test_failed_sample_is_not_drawn_again(fake: FakeService, sampler: Any) -> None:
    fake.script("/retrieve_future", failed("too long", "user"))
    with pytest.raises(everstep.RequestFailedError, match="too long"):
        sample(sampler).result(T)
    assert sent_seq_ids(fake) == [0]


@pytest.mark.parametrize("status", [400, 404, 422])
def test_refused_sample_raises(fake: FakeService, sampler: Any, status: int) -> None:
    fake.script("/asample", Refused(status))
    with pytest.raises(everstep.APIStatusError):
        sample(sampler).result(T)
    sample(sampler).result(T)


# Time


def test_timeout_does_not_cancel(fake: FakeService, run: Any) -> None:
    fake.hold_result(1)
    future = run.optim_step(ADAM)
    fake.arrived("/optim_step")
    for timeout in (0, 0.01):
        with pytest.raises(TimeoutError):
            future.result(timeout)
    assert not future.done()
    fake.release_result(1)
    assert future.result(T).metrics == {"step:max": 1.0}
    assert fake.submits() == [("/optim_step", 1)]


def test_submit_is_sent_again_after_a_timeout(
    fake: FakeService, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held()
    fake.script("/optim_step", held)
    send = http.Http.send

    async def impatient(self: Any, method: str, path: str, **arguments: Any) -> Any:
        if path == "/optim_step" and not held.arrived.is_set():
            arguments["timeout"] = 0.2
        return await send(self, method, path, **arguments)

    monkeypatch.setattr(http.Http, "send", impatient)
    future = run.optim_step(ADAM)
    held.wait_for_arrival()
    assert future.result(T).metrics == {"step:max": 1.0}
    held.release()
    assert same_request(fake.to("/optim_step")) and fake.applied_ids()[1:] == [1]
