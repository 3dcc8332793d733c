"""stable_reinforce trains on the logprobs recorded at sampling, whatever became of their record."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from everstep.cli.app import app
from everstep.engine import Model
from everstep.ledger import Ledger
from tests.runtime.local import Local
from tests.waiting import eventually

PROMPT = [5, 6, 7, 8, 9]
MARK = "stable_reinforce/everstep_topr:max"
STEP = {"learning_rate": 0.05}
Body = dict[str, Any]
Change = Callable[[Body], None]


class Sampled:
    """A sampled sequence, as a client has it."""

    def __init__(self, name: str, prompt: list[int], sequence: Body) -> None:
        self.name = name
        self.prompt = prompt
        self.tokens: list[int] = sequence["tokens"]
        self.logprobs: list[float] = sequence["logprobs"]

    def prompt_span(self, offset: int = 0, length: int | None = None) -> Body:
        whole = len(self.prompt) - offset if length is None else length
        span = {"sequence_id": self.name, "offset": offset, "length": whole}
        return {"prompt_tokens": span}

    def span(self, offset: int = 0, length: int | None = None) -> Body:
        whole = len(self.tokens) - offset if length is None else length
        span = {"sequence_id": self.name, "offset": offset, "length": whole}
        return {"sampled_tokens": span}


def sampler_of(service: Local, run: str, kind: str = "snapshot", number: int = 0) -> str:
    body = {"sampling_session_seq_id": number, "kind": kind}
    return str(service.do(run, "save_weights_for_sampler", **body)["sampling_session_id"])


def draw(
    service: Local, sampler: str, seq_id: int = 0, prompt: list[int] = PROMPT, **more: Any
) -> list[Sampled]:
    """Two recorded sequences of a prompt."""
    body = {
        "sampling_session_id": sampler,
        "seq_id": seq_id,
        "num_samples": 2,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": prompt}]},
        "sampling_params": {"max_tokens": 6, "seed": 3 + seq_id, "stop": []},
        "record_stability_info": True,
        **more,
    }
    future = service.post("asample", **body)
    sequences = service.result(future["request_id"])["sequences"]
    names = future["sample_sequence_ids"]
    return [Sampled(n, prompt, each) for n, each in zip(names, sequences, strict=True)]


def tensor(values: list[Any], dtype: str = "float32") -> Body:
    return {"data": values, "dtype": dtype, "shape": [len(values)]}


def datum(sampled: Sampled, advantage: float) -> Body:
    """A prompt and its sequence, as the cookbook's ``rl_loop`` sends them."""
    before = len(sampled.prompt) - 1
    tokens = [*sampled.prompt, *sampled.tokens[:-1]]
    return {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": tokens}]},
        "loss_fn_inputs": {
            "target_tokens": tensor([0] * before + sampled.tokens, "int64"),
            "advantages": tensor([0.0] * before + [advantage] * len(sampled.tokens)),
            "logprobs": tensor([0.0] * before + sampled.logprobs),
        },
        "model_input_spans": [
            sampled.prompt_span(),
            sampled.span(length=len(sampled.tokens) - 1),
        ],
        "loss_fn_input_spans": [sampled.prompt_span(offset=1), sampled.span()],
    }


def passed(*datums: Body, **config: float) -> Body:
    return {"data": list(datums), "loss_fn": "stable_reinforce", "loss_fn_config": config}


def train(service: Local, run: str, *datums: Body, **config: float) -> list[Any]:
    """A pass and a step, and what they gave."""
    return [
        service.do(run, "forward_backward", forward_backward_input=passed(*datums, **config)),
        service.do(run, "optim_step", adam_params=STEP),
    ]


def expected_loss(result: Body, sequences: list[Sampled], advantages: list[float]) -> float:
    """The paper's loss of datums with one sequence each, from the result's logprobs."""
    total = 0.0
    for output, sampled, advantage in zip(
        result["loss_fn_outputs"], sequences, advantages, strict=True
    ):
        logp = np.array(output["logprobs"]["data"])[-len(sampled.tokens) :]
        ratio = np.exp((logp - np.array(sampled.logprobs)).sum())
        weight = min(ratio, 1.0) if advantage < 0 else 1.0
        total -= weight * advantage * logp.sum()
    return total


@pytest.fixture
def service(home: Path, pico: Model) -> Any:
    with Local(home, pico) as running:
        yield running


# What it computes


def test_pass_trains_on_the_recorded_logprobs(service: Local) -> None:
    run = service.new_run()
    service.train(run, 0)
    sequences = draw(service, sampler_of(service, run))
    advantages = [1.0, -1.0]
    datums = [datum(*each) for each in zip(sequences, advantages, strict=True)]
    first, _ = train(service, run, *datums)
    assert first["metrics"]["loss:sum"] == pytest.approx(
        expected_loss(first, sequences, advantages), rel=1e-5
    )
    assert first["metrics"][MARK] == 1.0
    assert first["metrics"]["stable_reinforce/negative_sequences:sum"] == 1.0
    assert first["metrics"]["stable_reinforce/negative_weight:sum"] == pytest.approx(1, abs=1e-3)
    for each in datums:  # what a client sends as logprobs does not matter
        each["loss_fn_inputs"]["logprobs"]["data"] = [-9.0] * len(
            each["loss_fn_inputs"]["logprobs"]["data"]
        )
    later, _ = train(service, run, *datums)
    assert later["metrics"]["stable_reinforce/negative_weight:sum"] < 0.9, "it has become unlikely"
    assert later["metrics"]["loss:sum"] == pytest.approx(
        expected_loss(later, sequences, advantages), rel=1e-5
    )


def test_forward_gives_the_loss_and_no_gradient(service: Local) -> None:
    run, reference = service.new_run(), service.new_run()
    one = datum(draw(service, sampler_of(service, run))[0], -0.5)
    forward = service.do(run, "forward", forward_input=passed(one))
    sampler_of(service, reference)
    assert service.do(reference, "forward", forward_input=passed(one)) == forward
    assert forward["metrics"][MARK] == 1.0
    assert service.train(run, 0) == service.train(reference, 0), "and left no gradient"


def test_sequence_may_be_used_in_part_and_in_several_datums(service: Local) -> None:
    run = service.new_run()
    sampled = draw(service, sampler_of(service, run))[0]
    whole = service.do(run, "forward", forward_input=passed(datum(sampled, -1.0)))
    cut, keep = datum(sampled, -1.0), len(sampled.tokens) - 2
    length = len(PROMPT) - 1 + keep
    cut["model_input"]["chunks"][0]["tokens"] = cut["model_input"]["chunks"][0]["tokens"][:length]
    for name, each in cut["loss_fn_inputs"].items():
        dtype = "int64" if name == "target_tokens" else "float32"
        cut["loss_fn_inputs"][name] = tensor(each["data"][:length], dtype)
    cut["model_input_spans"] = [sampled.prompt_span(), sampled.span(length=keep - 1)]
    cut["loss_fn_input_spans"] = [sampled.prompt_span(offset=1), sampled.span(length=keep)]
    part = service.do(run, "forward", forward_input=passed(cut))
    assert 0 < -part["metrics"]["loss:sum"] < -whole["metrics"]["loss:sum"]
    both = service.do(run, "forward", forward_input=passed(datum(sampled, -1.0), cut))
    assert both["metrics"]["loss:sum"] == pytest.approx(
        whole["metrics"]["loss:sum"] + part["metrics"]["loss:sum"]
    )


def conversation(service: Local, sampler: str, signs: tuple[float, float]) -> Body:
    """Two turns: the second prompt is the first conversation and three more tokens."""
    first = draw(service, sampler, 0)[0]
    asked = [*PROMPT, *first.tokens, 40, 41, 42]
    second = draw(service, sampler, 1, asked)[1]
    tokens = [*asked, *second.tokens]
    zeros, after = [0.0] * (len(PROMPT) - 1), [0.0] * 3
    return {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": tokens[:-1]}]},
        "loss_fn_inputs": {
            "target_tokens": tensor(tokens[1:], "int64"),
            "advantages": tensor(
                zeros + [signs[0]] * len(first.tokens) + after + [signs[1]] * len(second.tokens)
            ),
        },
        "model_input_spans": [
            first.prompt_span(),
            first.span(),
            second.prompt_span(offset=len(asked) - 3),
            second.span(length=len(second.tokens) - 1),
        ],
        "loss_fn_input_spans": [
            first.prompt_span(offset=1),
            first.span(),
            second.prompt_span(offset=len(asked) - 3),
            second.span(),
        ],
    }


def test_each_turn_of_a_conversation_has_its_own_ratio(service: Local) -> None:
    run = service.new_run()
    sampler = sampler_of(service, run)
    talk = conversation(service, sampler, (-1.0, 1.0))
    metrics = service.do(run, "forward", forward_input=passed(talk))["metrics"]
    assert metrics["stable_reinforce/negative_sequences:sum"] == 1.0
    assert metrics["stable_reinforce/negative_weight:sum"] == pytest.approx(1, abs=1e-3)


def test_inflight_sequence_keeps_the_logprobs_of_its_weights(service: Local) -> None:
    run = service.new_run()
    service.train(run, 0)
    sampler = sampler_of(service, run, "inflight")
    old = draw(service, sampler, 0)[0]
    service.train(run, 1, 2)
    assert sampler_of(service, run, "inflight", 1) != sampler
    new = draw(service, sampler, 1)[0]
    result = service.do(run, "forward", forward_input=passed(datum(old, -1.0), datum(new, -1.0)))
    assert result["metrics"]["loss:sum"] == pytest.approx(
        expected_loss(result, [old, new], [-1.0, -1.0]), rel=1e-5
    )
    drift = [
        abs(np.sum(np.array(each["logprobs"]["data"])[-6:] - np.array(sampled.logprobs)))
        for each, sampled in zip(result["loss_fn_outputs"], (old, new), strict=True)
    ]
    assert drift[0] > 1e-3 > drift[1]


# What it refuses


def failed(service: Local, run: str, *datums: Body, **config: float) -> str:
    answer = service.do(run, "forward_backward", forward_backward_input=passed(*datums, **config))
    assert answer.get("category") == "user", answer
    return str(answer["error"])


def change_input_token(each: Body) -> None:
    each["model_input"]["chunks"][0]["tokens"][1] += 1


def change_sampled_input_token(each: Body) -> None:
    each["model_input"]["chunks"][0]["tokens"][len(PROMPT)] ^= 1


def change_target(each: Body) -> None:
    each["loss_fn_inputs"]["target_tokens"]["data"][-1] ^= 1


def give_the_prompt_an_advantage(each: Body) -> None:
    each["loss_fn_inputs"]["advantages"]["data"][0] = 0.5


def drop_spans(each: Body) -> None:
    del each["model_input_spans"], each["loss_fn_input_spans"]


def shorten_spans(each: Body) -> None:
    each["loss_fn_input_spans"].pop()


def exceed_the_sequence(each: Body) -> None:
    each["loss_fn_input_spans"][-1]["sampled_tokens"]["offset"] = 3


def rename(name: str) -> Change:
    def change(each: Body) -> None:
        for spans in (each["model_input_spans"], each["loss_fn_input_spans"]):
            for span in spans:
                (content,) = span.values()
                content["sequence_id"] = name.format(content["sequence_id"].partition(":")[0])

    return change


def name_a_token_twice(each: Body) -> None:
    (span,) = each["loss_fn_input_spans"][-1].values()
    halves = [{**span, "length": 3}, {**span, "offset": 2, "length": span["length"] - 3}]
    targets = each["loss_fn_inputs"]["target_tokens"]["data"]
    sampled = targets[-span["length"] :]
    targets[-span["length"] :] = sampled[:3] + sampled[2:-1]
    each["loss_fn_input_spans"][-1:] = [{"sampled_tokens": half} for half in halves]


WRONG: list[tuple[Change, str]] = [
    (change_input_token, "model_input: the token at position 1 is 7, but prompt token 1 of"),
    (change_sampled_input_token, "but sampled token 0 of sequence"),
    (change_target, "target_tokens: the token at position 9 is"),
    (give_the_prompt_an_advantage, "'advantages'] is 0.5 at position 0, which is not a sampled"),
    (drop_spans, "has no provenance"),
    (shorten_spans, "the spans of loss_fn_input cover 4 positions, but there are 10"),
    (exceed_the_sequence, "a span covers sampled tokens 3 to 8 of sequence"),
    (name_a_token_twice, "twice"),
    (rename("nothing"), "'nothing' was not sampled in this run's session"),
    (rename("{}:7"), ":7' was sampled without record_stability_info=True"),
    (rename("{}:-1"), "does not exist in its sample"),
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, pico: Model) -> Any:
    with Local(tmp_path_factory.mktemp("refusals") / "home", pico) as running:
        run = running.new_run()
        yield running, run, draw(running, sampler_of(running, run))


@pytest.mark.parametrize(("change", "text"), WRONG, ids=lambda v: getattr(v, "__name__", None))
def test_untrue_provenance_fails_with_the_datum_and_position(
    shared: tuple[Local, str, list[Sampled]], change: Change, text: str
) -> None:
    service, run, sequences = shared
    bad = datum(sequences[1], 1.0)
    change(bad)
    message = failed(service, run, datum(sequences[0], 1.0), bad)
    assert text in message
    assert message.startswith("datum 1")
    failure = service.do(run, "optim_step", adam_params=STEP)
    assert failure["metrics"].get("grad_norm", 0.0) == 0.0, "it left no gradient"


def test_sequence_of_another_session_fails(service: Local, pico: Model) -> None:
    theirs = draw(service, sampler_of(service, service.new_run()))[0]
    service._session, service._runs = None, 0
    run = service.new_run()
    text = failed(service, run, datum(theirs, 1.0))
    assert "was not sampled in this run's session" in text
    assert theirs.name not in text.replace(repr(theirs.name), ""), "and nothing else is said"


def test_sequence_without_a_record_fails(service: Local) -> None:
    run = service.new_run()
    sampled = draw(service, sampler_of(service, run), record_stability_info=False)[0]
    text = failed(service, run, datum(sampled, 1.0))
    assert "was sampled without record_stability_info=True" in text
    assert "expired" not in text


def test_setting_restores_the_refusal(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        sampled = draw(service, sampler_of(service, run))[0]
        done = service.send(
            run, "forward_backward", forward_backward_input=passed(datum(sampled, 1.0))
        )
        result = service.result(done)
        listed = service.http.get("get_server_capabilities").json()["losses"]
        assert "not the hosted service's" in listed["stable_reinforce"]
        assert listed["ppo"] == "tinker"
    with service.after(stable_reinforce="refuse") as service:
        assert service.result(done) == result
        text = failed(service, run, datum(sampled, 1.0))
        assert text.startswith(
            "Loss 'stable_reinforce' is not supported here: its definition is not public. Use one "
            "of cross_entropy,"
        )
        assert text.count("stable_reinforce") == 1
        assert (
            "stable_reinforce" not in service.http.get("get_server_capabilities").json()["losses"]
        )
        assert "error" not in service.train(run, 0)[0], "the run goes on"


def test_definition_is_logged_once_per_run(
    service: Local, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "everstep.losses")
    runs = [service.new_run(), service.new_run()]
    sampled = draw(service, sampler_of(service, runs[0]))[0]
    for run in (*runs, *runs):
        service.do(run, "forward", forward_input=passed(datum(sampled, 1.0)))
    lines = [each.message for each in caplog.records if each.name == "everstep.losses"]
    assert len(lines) == 2
    for line, run in zip(lines, runs, strict=True):
        assert "Everstep's own definition, not the hosted service's" in line
        assert f"run={run!r}" in line
        assert "2503.14286" in line


# How long it is kept


def test_replay_is_exact_after_the_record_is_gone(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run, reference = service.new_run(), service.new_run()
        sampler = sampler_of(service, run)
        sampler_of(service, reference)
        first, second = draw(service, sampler), draw(service, sampler, 1)

        def datums(pair: list[Sampled]) -> list[Body]:
            return [datum(pair[0], 1.0), datum(pair[1], -1.0)]

        expected = [
            train(service, reference, *datums(pair), kl_coeff=0.1) for pair in (first, second)
        ]
    with service.after().killed() as service:
        assert train(service, run, *datums(first), kl_coeff=0.1) == expected[0]
    asyncio.run(forget(home, keep=second[0].name))
    with service.after() as service:
        assert train(service, run, *datums(second), kl_coeff=0.1) == expected[1]
        assert "restore" in {kind for kind, _ in service.finished}


async def forget(home: Path, keep: str = "") -> None:
    """Remove all records but one."""
    ledger = await Ledger.open(home / "ledger.sqlite")
    kept = keep.partition(":")[0]
    statement = f"DELETE FROM recorded_samples WHERE request_id != '{kept}'"
    await ledger._store.run(lambda c: c.exec_driver_sql(statement).rowcount)
    await ledger.close()


def test_retry_after_the_record_is_gone_finds_its_operation(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        sampled = draw(service, sampler_of(service, run))[0]
        body: Body = {
            "model_id": run,
            "seq_id": 2,
            "forward_backward_input": passed(datum(sampled, 1.0)),
        }
        first = service.post("forward_backward", **body)
        result = service.result(first["request_id"])
        unknown = {**body, "seq_id": 3, "forward_backward_input": passed(datum(sampled, 1.0))}
        rename("nothing")(unknown["forward_backward_input"]["data"][0])
        refused = service.post("forward_backward", **unknown)
    asyncio.run(forget(home))
    with service.after() as service:
        for sent, answer in ((body, first), (unknown, refused)):
            assert service.post("forward_backward", **sent) == answer
        assert service.result(first["request_id"]) == result
        other = {**body, "forward_backward_input": passed(datum(sampled, 2.0))}
        status, text = service.refused("forward_backward", **other)
        assert (status, "was used before" in text) == (400, True)


def test_record_expires_a_time_after_its_last_use(home: Path, pico: Model) -> None:
    async def last_use() -> list[str]:
        ledger = await Ledger.open(home / "ledger.sqlite")
        query = "SELECT last_used_at FROM recorded_samples"
        found = await ledger._store.run(lambda c: c.exec_driver_sql(query).scalars().all())
        assert await ledger.find_damaged_rows() == []
        await ledger.close()
        return [str(each) for each in found]

    with Local(home, pico) as service:
        run = service.new_run()
        sampled = draw(service, sampler_of(service, run))[0]
    (recorded,) = asyncio.run(last_use())
    with service.after() as service:
        failed(service, run, datum(sampled, float(10**9)), alpha=-1)
    assert asyncio.run(last_use()) == [recorded], "a pass that fails does not count"
    with service.after() as service:
        service.do(run, "forward", forward_input=passed(datum(sampled, 1.0)))
    (used,) = asyncio.run(last_use())
    assert used > recorded
    with service.after(recorded_sample_seconds=0.0) as service:
        text = failed(service, run, datum(sampled, 1.0))
        assert "its record has expired: records are kept for 0 h after their last use" in text


def test_records_are_part_of_a_backup(home: Path, tmp_path: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        sampled = draw(service, sampler_of(service, run))[0]
        service.do(run, "save_weights", path="a")
        expected = service.do(run, "forward", forward_input=passed(datum(sampled, -1.0)))
    for command in (
        ("backup", str(tmp_path / "backup"), "--home", str(home)),
        ("restore", str(tmp_path / "backup"), "--home", str(tmp_path / "restored")),
    ):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
    service.home = tmp_path / "restored"
    with service.after() as service:
        found = service.do(run, "forward", forward_input=passed(datum(sampled, -1.0)))
        assert found == expected


def test_unused_records_are_collected(
    home: Path, pico: Model, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "everstep.maintenance")
    with Local(home, pico) as service:
        sampler = sampler_of(service, service.new_run())
        for seq_id in range(3):
            draw(service, sampler, seq_id)
    with service.after(collect_interval_seconds=0.05, recorded_sample_seconds=0.0):
        eventually("the records are removed", lambda: "recorded_samples=3" in caplog.text)
