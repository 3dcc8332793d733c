"""Seeds: runs and samples that were asked for without one can be repeated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from everstep.engine import Model
from tests.runtime.local import Local
from tests.scenario import MODEL


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, pico: Model) -> Iterator[Local]:
    with Local(tmp_path_factory.mktemp("service"), pico) as opened:
        yield opened


def create(local: Local, **lora: Any) -> dict[str, Any]:
    """Create a run. Returns the result of its creation."""
    local._runs += 1
    body: Any = {"session_id": local.session(), "model_seq_id": local._runs, "base_model": MODEL}
    made = local.post("create_model", **body, lora_config={"rank": 4, **lora})
    return dict(local.result(made["request_id"]))


def test_run_without_a_seed_returns_the_one_it_got(local: Local) -> None:
    made = create(local)
    seed = made["lora_seed"]
    run = made["model_id"]
    assert local.post("get_info", model_id=run)["lora_seed"] == seed
    first = local.do(run, "save_weights", path="a")["path"]
    assert local.post("weights_info", tinker_path=first)["lora_seed"] == seed
    again = create(local, seed=seed)
    assert again["lora_seed"] == seed
    assert local.train(again["model_id"], 0, 1) == local.train(run, 0, 1)
    other = create(local)
    assert other["lora_seed"] != seed


def test_given_seed_is_returned(local: Local) -> None:
    assert create(local, seed=7)["lora_seed"] == 7


def test_sample_without_a_seed_returns_the_one_it_got(local: Local) -> None:
    body: Any = {"session_id": local.session(), "sampling_session_seq_id": 0, "base_model": MODEL}
    sampler = local.post("create_sampling_session", **body)["sampling_session_id"]

    def sample(seq_id: int, **params: Any) -> tuple[int, list[Any]]:
        made = local.post(
            "asample",
            sampling_session_id=sampler,
            seq_id=seq_id,
            num_samples=2,
            prompt={"chunks": [{"tokens": [1, 2, 3]}]},
            sampling_params={"max_tokens": 8, "temperature": 1.0, "stop": [], **params},
        )
        sequences = local.result(made["request_id"])["sequences"]
        return made["sample_seed"], [each["tokens"] for each in sequences]

    seed, tokens = sample(0)
    assert sample(0) == (seed, tokens), "a retry"
    assert sample(1, seed=seed) == (seed, tokens)
    other, drawn = sample(2)
    assert other != seed and drawn != tokens
