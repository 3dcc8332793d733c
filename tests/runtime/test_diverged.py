"""Diverged runs, from the request to the answer: steps, passes, saves, samples and completions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from everstep.engine import Model, RunState
from everstep.engine.errors import Diverged
from everstep.vault import Vault
from everstep.worker.protocol.tokenizer_files import write_tokenizer
from tests.runtime.local import Local, batch
from tests.scenario import MODEL

WORDS = "This adapter has diverged: its weights hold NaN or infinity"
TOO_LARGE = "This adapter has diverged: the model's logits with it are not finite"
BAD = {"learning_rate": 1e38}
GOOD = {"learning_rate": 0.01, "weight_decay": 0.1}


def failed(local: Local, run: str, route: str, **body: Any) -> str:
    """The error of an operation that fails for its user."""
    answer = local.do(run, route, **body)
    assert answer["category"] == "user", answer
    return str(answer["error"])


def diverge(local: Local, run: str, **params: float) -> None:
    """Make a step that makes a run diverge."""
    local.do(run, "forward_backward", forward_backward_input=batch())
    assert "error" not in local.do(run, "optim_step", adam_params={**BAD, **params})


def saved(local: Local, run: str, name: str) -> str:
    return str(local.do(run, "save_weights_for_sampler", path=name)["path"])


# Steps


def test_a_step_that_diverges_leaves_the_run_as_it_was(home: Path, pico: Model) -> None:
    with Local(home, pico) as local:
        run, other = local.new_run(), local.new_run()
        assert local.train(run, 1) == local.train(other, 1)
        for each in (run, other):
            local.do(each, "forward_backward", forward_backward_input=batch(2))
        error = failed(local, run, "optim_step", adam_params=BAD)
        assert "would make the run diverge" in error
        assert "pending gradients are as before" in error
        steps = [local.do(each, "optim_step", adam_params=GOOD) for each in (run, other)]
        assert steps[0] == steps[1]
        assert local.train(run, 3, 4) == local.train(other, 3, 4)


def test_a_failed_step_is_replayed_as_failed(home: Path, pico: Model) -> None:
    with Local(home, pico).killed() as first:
        run, other = first.new_run(), first.new_run()
        for each in (run, other):
            first.train(each, 1)
            first.do(each, "forward_backward", forward_backward_input=batch(2))
        failed(first, run, "optim_step", adam_params=BAD)
    with first.after() as second:
        steps = [second.do(each, "optim_step", adam_params=GOOD) for each in (run, other)]
        assert "error" not in steps[0]
        assert steps[0] == steps[1]
        assert second.train(run, 3) == second.train(other, 3)


def test_an_allowed_step_is_replayed_where_it_is_allowed_no_more(home: Path, pico: Model) -> None:
    with Local(home, pico, allow_diverged=True).killed() as first:
        run = first.new_run()
        diverge(first, run)
    with first.after() as second:
        assert WORDS in failed(second, run, "optim_step", adam_params=GOOD)
        assert WORDS in failed(second, run, "forward", forward_input=batch())
        assert WORDS in failed(second, run, "save_weights", path="no")
        assert WORDS in failed(second, run, "save_weights_for_sampler", path="no")
    vault = Vault(home / "vault")  # it was snapshotted all the same
    snapshots = [vault.manifest("snapshot", *each) for each in vault.names("snapshot", run)]
    assert [each.diverged for each in snapshots] == [True]
    with second.after() as third:
        assert WORDS in failed(third, run, "forward", forward_input=batch())


def test_a_replay_trusts_the_record_more_than_the_check(
    home: Path, pico: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an older release accepted is no corruption."""
    with Local(home, pico).killed() as first:
        run = first.new_run()
        first.train(run, 1)
        first.do(run, "forward_backward", forward_backward_input=batch(2))

    def refuse(_: RunState) -> None:
        raise Diverged("This adapter has diverged")

    monkeypatch.setattr(RunState, "check_weights", refuse)
    with first.after() as second:
        assert "error" not in second.do(run, "optim_step", adam_params=GOOD)
        assert "has diverged" in failed(second, run, "forward", forward_input=batch())


def test_an_earlier_checkpoint_brings_a_diverged_run_back(home: Path, pico: Model) -> None:
    with Local(home, pico, allow_diverged=True) as local:
        run, other = local.new_run(), local.new_run()
        for each in (run, other):
            local.train(each, 1)
        path = local.do(run, "save_weights", path="sound")["path"]
        diverge(local, run)
        assert WORDS in failed(local, run, "forward_backward", forward_backward_input=batch())
        assert "error" not in local.do(run, "load_weights", path=path, optimizer=True)
        assert local.train(run, 2) == local.train(other, 2)


# What is saved of them


@pytest.fixture(scope="module")
def diverged(tmp_path_factory: pytest.TempPathFactory, pico: Model) -> Any:
    """A service with two diverged checkpoints: of infinite weights, and of too large ones."""
    home = tmp_path_factory.mktemp("diverged")
    write_tokenizer(home, MODEL, pico.tokenizer, pico.info.source)
    with Local(home, pico, allow_diverged=True) as local:
        run, large = local.new_run(), local.new_run()
        diverge(local, run)
        diverge(local, large, learning_rate=1e30)
        yield local, saved(local, run, "infinite"), saved(local, large, "large")


def test_details_and_verification_say_that_it_diverged(diverged: Any) -> None:
    local, infinite, large = diverged
    for route in ("details", "verify"):
        found = [
            local.post(f"everstep/checkpoints/{route}", tinker_path=path)
            for path in (infinite, large)
        ]
        assert [each["diverged"] for each in found] == [True, False]
        assert all(each.get("ok", True) for each in found)


@pytest.mark.parametrize("of", [0, 1], ids=["infinite", "too large"])
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"prompt_logprobs": True},
        {"topk_prompt_logprobs": 2},
        {"sampling_params": {"max_tokens": 0}, "prompt_logprobs": True},
        {"sampling_params": {"max_tokens": 0}},
    ],
    ids=str,
)
def test_samples_of_it_name_it(diverged: Any, asked: dict[str, Any], of: int) -> None:
    local, path = diverged[0], diverged[1 + of]
    number = local._runs = local._runs + 1
    sampler = local.post(
        "create_sampling_session",
        session_id=local.session(),
        sampling_session_seq_id=number,
        model_path=path,
    )["sampling_session_id"]
    body = {
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7, 8]}]},
        "sampling_params": {"max_tokens": 3},
        "sampling_session_id": sampler,
        "seq_id": 0,
        **asked,
    }
    request_id = local.post("asample", **body)["request_id"]
    assert (WORDS, TOO_LARGE)[of] in local.result(request_id)["error"]
    events = local.http.get(f"everstep/samples/{request_id}/events").text
    assert "event: failed" in events
    assert "This adapter has diverged" in events


@pytest.mark.parametrize("of", [0, 1], ids=["infinite", "too large"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "asked",
    [
        {"prompt": "Every step", "max_tokens": 3},
        {"prompt": "Every step", "max_tokens": 3, "seed": 1, "logprobs": 2},
        {"prompt": "Every step", "max_tokens": 0, "echo": True, "logprobs": 1},
        {"prompt": "Every step", "max_tokens": 0, "echo": True},
        {"prompt": "Every step", "max_tokens": 1, "echo": True, "logprobs": 1},
        {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3},
        {"messages": [{"role": "user", "content": "Hello"}], "logprobs": True, "top_logprobs": 2},
    ],
    ids=str,
)
def test_completions_of_it_name_it(
    diverged: Any, asked: dict[str, Any], stream: bool, of: int
) -> None:
    local, path = diverged[0], diverged[1 + of]
    route = "chat/completions" if "messages" in asked else "completions"
    answer = local.http.post(
        f"http://test/v1/{route}", json={"model": path, "stream": stream, **asked}
    )
    assert answer.status_code in ((200, 400) if stream else (400,)), answer.text
    assert (WORDS, TOO_LARGE)[of] in answer.text
    assert '"error"' in answer.text
    assert "token_logprobs" not in answer.text


# Seeds


@pytest.mark.parametrize("seed", [2**63, 2**64, -(2**63) - 1, 10**30])
def test_seeds_out_of_bounds_are_refused(diverged: Any, seed: int) -> None:
    local = diverged[0]
    answer = local.http.post(
        "http://test/v1/completions", json={"model": MODEL, "prompt": "a", "seed": seed}
    )
    assert answer.status_code == 400
    assert "seed: Input should be" in answer.text
    assert str(2**63) in answer.text
    local._runs += 1
    made = local.http.post(
        "create_model",
        json={
            "session_id": local.session(),
            "model_seq_id": local._runs,
            "base_model": MODEL,
            "lora_config": {"rank": 4, "seed": seed},
        },
    )
    assert made.status_code in (400, 422)
    assert "lora_config.seed: Input should be" in made.text


def test_each_seed_of_64_bits_has_its_own_tokens(diverged: Any) -> None:
    def text(seed: int) -> str:
        body = {"model": MODEL, "prompt": "a", "seed": seed, "max_tokens": 8}
        return str(diverged[0].http.post("http://test/v1/completions", json=body).json()["choices"])

    seeds = (-(2**63), -1, 0, 1, 2**63 - 1)
    assert len({text(seed) for seed in seeds}) == len(seeds)
    assert text(-1) == text(-1)
