"""Recipes of the public tinker-cookbook, unmodified, as users start them, without a network.

The model is a small one, served under a name for which the cookbook has a renderer. Tokenizers come
from the service in place of the hub, data from files in the working directory.
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

from everstep.engine.models.pico import write_pico
from tests.conftest import Service
from tests.interop import sdks
from tests.scenario import connect

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]
MODEL = "Qwen/Qwen3-8B-Base"
CONTEXT = 4096  # a grader of rubrics may answer with 2048 tokens
SL, RL = "tinker_cookbook.recipes.chat_sl.train", "tinker_cookbook.recipes.rl_loop"
MATH, RUBRIC = "tinker_cookbook.recipes.math_rl.train", "tinker_cookbook.recipes.rubric.train"


def teach_to_answer(directory: Path) -> None:
    """Train the model to end any prompt with one of two answers, so that there is a reward."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, max_position_embeddings=CONTEXT
    )
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


class Workspace:
    """A directory where recipes run, with their data."""

    def __init__(self, directory: Path, service: Service) -> None:
        self.directory = directory
        self.url = service.url
        self._environment = sdks.environment(
            service.url,
            "cookbook",
            HF_HOME=str(directory / "hub"),
            TINKER_API_KEY="tml-test",
            TINKER_BASE_URL=service.url,
            PYTHONUNBUFFERED="1",
        )

    def write_lines(self, path: str, rows: list[Any]) -> None:
        file = self.directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, recipe: str, until: str | None = None, **options: Any) -> str:
        """Run a recipe to its end, or kill it once it has printed a text; returns its output."""
        chosen = {"base_url": self.url, "model_name": MODEL, "lora_rank": 4, **options}
        arguments = [f"{name}={value}" for name, value in chosen.items()]
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
def workspace(tmp_path: Path, served: Service) -> Workspace:
    return Workspace(tmp_path, served)


def numbers(workspace: Workspace, log: str) -> list[tuple[float, float, float]]:
    """Return the number, loss and gradient norm of each logged step."""
    rows = workspace.lines(f"{log}/metrics.jsonl")
    return [(row["step"], row["train_mean_nll"], row["grad_norm"]) for row in rows]


@pytest.fixture
def options(workspace: Workspace) -> dict[str, Any]:
    """Options of chat_sl: six batches of a file, from weights that all its runs share."""
    rows = [
        [
            {"role": "user", "content": f"Say {i}."},
            {"role": "assistant", "content": f"It is {i}. " * (1 + i % 3)},
        ]
        for i in range(48)
    ]
    workspace.write_lines("talks.jsonl", [{"messages": row} for row in rows])
    run = connect(tinker, workspace.url).create_lora_training_client(MODEL, rank=4).result()
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


@pytest.mark.long(reason="trains a run of the cookbook three times: whole, and in two parts")
def test_chat_sl_resumes_exactly_after_a_stop(
    workspace: Workspace, options: dict[str, Any]
) -> None:
    workspace.run(SL, log_path="whole", num_epochs=2, **options)
    whole = numbers(workspace, "whole")
    assert [step for step, _, _ in whole] == list(range(12))
    assert whole[-1][1] < whole[0][1], "it learns"

    workspace.run(SL, log_path="parts", num_epochs=1, **options)
    assert numbers(workspace, "parts") == whole[:6]
    workspace.run(SL, log_path="parts", num_epochs=2, **options)
    assert numbers(workspace, "parts") == whole


def test_chat_sl_resumes_after_a_kill(workspace: Workspace, options: dict[str, Any]) -> None:
    """It submits ahead of its saves: a checkpoint may include batches that it repeats."""
    workspace.run(SL, log_path="killed", until="Step 3", **options)
    before = numbers(workspace, "killed")
    resumed_at = workspace.lines("killed/checkpoints.jsonl")[-1]["batch"]
    assert resumed_at in (2, 4)
    workspace.run(SL, log_path="killed", **options)
    after = numbers(workspace, "killed")
    assert [step for step, _, _ in after] == list(range(6)), "each step once"
    assert after[:resumed_at] == before[:resumed_at]
    assert workspace.lines("killed/checkpoints.jsonl")[-1]["name"] == "final"


def write_gsm8k(workspace: Workspace) -> None:
    """Write the dataset of the hub that recipes load, in a directory of its name."""
    splits = [{"split": name, "path": f"{name}.jsonl"} for name in ("train", "test")]
    config = {"config_name": "main", "data_files": splits}
    rows = [{"question": f"How odd is {i}?", "answer": f"It is.\n#### {i % 2}"} for i in range(32)]
    workspace.write_lines("openai/gsm8k/train.jsonl", rows)
    workspace.write_lines("openai/gsm8k/test.jsonl", rows[:2])
    card = f"---\nconfigs: {json.dumps([config])}\n---\n"
    (workspace.directory / "openai/gsm8k/README.md").write_text(card)


def check_trained(rows: list[dict[str, Any]], steps: int) -> None:
    """Check the metrics of the steps: some answers were right, and gave gradients."""
    trained = [row for row in rows if "optim/lr" in row or "grad_norm" in row]
    assert [row["step"] for row in trained] == list(range(steps))
    assert max(row["grad_norm"] for row in trained) > 0


def test_rl_loop_resumes_after_a_kill(workspace: Workspace) -> None:
    """It trains with its default loss, stable_reinforce."""
    write_gsm8k(workspace)
    options: dict[str, Any] = {
        "log_path": "rl",
        "batch_size": 4,
        "group_size": 4,
        "max_tokens": 24,
        "learning_rate": 1e-3,
        "save_every": 1,
        "max_steps": 5,
    }
    workspace.run(RL, until="Step 2", **options)
    before = workspace.lines("rl/metrics.jsonl")
    written = workspace.run(RL, **options)
    resumed = re.search(r"Resuming from batch (\d+)", written)
    assert resumed is not None and int(resumed[1]) >= 2
    rows = workspace.lines("rl/metrics.jsonl")
    assert [row["step"] for row in rows[len(before) :]] == list(range(int(resumed[1]), 5))
    rewards = [row["reward/total"] for row in rows]
    assert 0 < max(rewards) <= 1, "some answers were right"
    steps = [row["grad_norm"] for row in rows if "grad_norm" in row]
    assert max(steps) > 0, "and gave gradients"
    assert workspace.lines("rl/checkpoints.jsonl")[-1]["name"] == "final"


RL_OPTIONS: dict[str, Any] = {
    "groups_per_batch": 2,
    "max_tokens": 24,
    "learning_rate": 1e-3,
    "eval_every": 0,
    "save_every": 0,
    "max_steps": 2,
}
"""Two small steps of the recipes with `tinker_cookbook.rl.train`, with their default loss."""


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_math_rl_trains_with_its_default_loss(workspace: Workspace, mode: str) -> None:
    write_gsm8k(workspace)
    options: dict[str, Any] = {"max_steps_off_policy": 1} if mode == "async" else {}
    workspace.run(MATH, log_path=mode, env="gsm8k", group_size=4, **RL_OPTIONS, **options)
    check_trained(workspace.lines(f"{mode}/metrics.jsonl"), 2)
    assert workspace.lines(f"{mode}/checkpoints.jsonl")[-1]["name"] == "final"


def test_rubric_trains_with_its_default_loss(workspace: Workspace) -> None:
    """The grader is the same model. Its score is the digit that it answers."""
    item = {
        "rubric_str": "Is it odd?",
        "extraction_regex": r"boxed\{(\d)\}",
        "grader_output_format_instruction": "Box it.",
    }
    rows = [
        {"convo": [{"role": "user", "content": f"Is {i}?"}], "rubric_items": [item]}
        for i in range(4)
    ]
    for name in ("train", "test"):
        workspace.write_lines(f"{name}.jsonl", rows)
    workspace.run(
        RUBRIC,
        log_path="rubric",
        renderer_name="role_colon",
        grader_llm_name=MODEL,
        grader_renderer_name="role_colon",
        train_group_size=4,
        train_jsonl_path="train.jsonl",
        test_jsonl_path="test.jsonl",
        **RL_OPTIONS,
    )
    check_trained(workspace.lines("rubric/metrics.jsonl"), 2)
