"""Recipes of the public tinker-cookbook, unmodified and without a network, as users start them.

Their model is a small one, served under a name that the cookbook knows a renderer for; tokenizers
come from the service at the hub's addresses, data from files in the working directory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tinker
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from everstep.engine.pico import write_pico
from tests.conftest import Service
from tests.interop import sdks
from tests.scenario import connect

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]
MODEL = "Qwen/Qwen3-8B-Base"
SL, RL = "tinker_cookbook.recipes.chat_sl.train", "tinker_cookbook.recipes.rl_loop"


def teach_to_answer(directory: Path) -> None:
    """Have the model end any prompt with one of two answers: there is something to reward."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(1)
    answers = [
        tokenizer.encode(f"\n\nAssistant: \\boxed{{{digit}}}\n\nUser:", add_special_tokens=False)
        for digit in (0, 1)
    ]
    for step in range(200):
        filler = torch.randint(32, 127, (8, 20 + step % 60), generator=draw)
        tokens = torch.cat([filler, torch.tensor(answers * 4)], dim=1)
        labels = tokens.clone()
        labels[:, : filler.shape[1] + len("\n\nAssistant:")] = -100
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2, "one bit for the digit, none for the other characters"
    model.save_pretrained(directory)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    base = tmp_path_factory.mktemp("cookbook")
    write_pico(base / "model")
    teach_to_answer(base / "model")
    service = Service(base / "home", f"{MODEL}={base / 'model'}")
    yield service
    service.stop()


class Shop:
    """A directory where recipes are run, with the data that they ask for."""

    def __init__(self, directory: Path, service: Service) -> None:
        self.directory = directory
        self.url = service.url
        self._environment = sdks.environment(
            service.url,
            "cookbook",
            HF_HOME=str(directory / "hub"),
            TINKER_API_KEY="tml-test",
            PYTHONUNBUFFERED="1",
        )

    def write_lines(self, path: str, rows: list[Any]) -> None:
        file = self.directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, recipe: str, until: str | None = None, **options: Any) -> str:
        """Run a recipe to its end, or kill it once it has written something; what it wrote."""
        told = {"base_url": self.url, "model_name": MODEL, "lora_rank": 4, **options}
        arguments = [f"{name}={value}" for name, value in told.items()]
        process = subprocess.Popen(
            [sys.executable, "-m", recipe, *arguments],
            cwd=self.directory,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        written = []
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                written.append(line)
                if until is not None and until in line:
                    process.kill()
        text = "".join(written)
        assert process.returncode == (-9 if until else 0), text
        return text

    def lines(self, path: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / path).read_text().splitlines()]


@pytest.fixture
def shop(tmp_path: Path, served: Service) -> Shop:
    return Shop(tmp_path, served)


def numbers(shop: Shop, log: str) -> list[tuple[float, float, float]]:
    """Of each step that was logged: its number, loss and gradient's norm."""
    rows = shop.lines(f"{log}/metrics.jsonl")
    return [(row["step"], row["train_mean_nll"], row["grad_norm"]) for row in rows]


@pytest.fixture
def options(shop: Shop) -> dict[str, Any]:
    """Of chat_sl: six batches of a file, from weights that all its runs begin with."""
    rows = [
        [
            {"role": "user", "content": f"Say {i}."},
            {"role": "assistant", "content": f"It is {i}. " * (1 + i % 3)},
        ]
        for i in range(48)
    ]
    shop.write_lines("talks.jsonl", [{"messages": row} for row in rows])
    run = connect(tinker, shop.url).create_lora_training_client(MODEL, rank=4).result()
    return {
        "dataset": "talks.jsonl",
        "load_checkpoint_path": run.save_state("start").result().path,
        "batch_size": 8,
        "max_length": 256,
        "learning_rate": 1e-3,
        "lr_schedule": "constant",
        "save_every": 2,
        "eval_every": 0,
        "behavior_if_log_dir_exists": "resume",
    }


def test_chat_sl_is_stopped_and_goes_on_as_if_it_had_not_been(
    shop: Shop, options: dict[str, Any]
) -> None:
    shop.run(SL, log_path="whole", num_epochs=2, **options)
    whole = numbers(shop, "whole")
    assert [step for step, _, _ in whole] == list(range(12))
    assert whole[-1][1] < whole[0][1], "it learns"

    shop.run(SL, log_path="parts", num_epochs=1, **options)
    assert numbers(shop, "parts") == whole[:6]
    shop.run(SL, log_path="parts", num_epochs=2, **options)
    assert numbers(shop, "parts") == whole


def test_chat_sl_is_killed_and_goes_on(shop: Shop, options: dict[str, Any]) -> None:
    """It submits ahead of what it saves: a checkpoint holds batches that it then does again."""
    shop.run(SL, log_path="killed", until="Step 3", **options)
    before = numbers(shop, "killed")
    resumed_at = shop.lines("killed/checkpoints.jsonl")[-1]["batch"]
    assert resumed_at in (2, 4)
    shop.run(SL, log_path="killed", **options)
    after = numbers(shop, "killed")
    assert [step for step, _, _ in after] == list(range(6)), "each step is there once"
    assert after[:resumed_at] == before[:resumed_at]
    assert shop.lines("killed/checkpoints.jsonl")[-1]["name"] == "final"


def test_rl_loop_is_stopped_and_goes_on(shop: Shop) -> None:
    """Its data is a dataset of the hub, which a directory of that name stands for."""
    told = {"config_name": "main", "data_files": [{"split": "train", "path": "train.jsonl"}]}
    shop.write_lines(
        "openai/gsm8k/train.jsonl",
        [{"question": f"How odd is {i}?", "answer": f"It is.\n#### {i % 2}"} for i in range(32)],
    )
    card = f"---\nconfigs: {json.dumps([told])}\n---\n"
    (shop.directory / "openai/gsm8k/README.md").write_text(card)
    options: dict[str, Any] = {
        "log_path": "rl",
        "loss_fn": "importance_sampling",
        "batch_size": 4,
        "group_size": 4,
        "max_tokens": 24,
        "learning_rate": 1e-3,
        "save_every": 1,
        "max_steps": 5,
    }
    shop.run(RL, until="Step 2", **options)
    before = shop.lines("rl/metrics.jsonl")
    written = shop.run(RL, **options)
    resumed = re.search(r"Resuming from batch (\d+)", written)
    assert resumed is not None and int(resumed[1]) >= 2
    rows = shop.lines("rl/metrics.jsonl")
    assert [row["step"] for row in rows[len(before) :]] == list(range(int(resumed[1]), 5))
    rewards = [row["reward/total"] for row in rows]
    assert 0 < max(rewards) <= 1, "some answers were right"
    steps = [row["grad_norm"] for row in rows if "grad_norm" in row]
    assert max(steps) > 0, "and were learnt from"
    assert shop.lines("rl/checkpoints.jsonl")[-1]["name"] == "final"
