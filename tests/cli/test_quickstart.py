"""``everstep quickstart``, as it is typed."""

import importlib
import io
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import peft
import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from everstep.cli import app
from everstep.cli.errors import Refused
from everstep.cli.models import served_model
from everstep.cli.quickstart import QuickstartError
from everstep.cli.training_loop import Meter
from everstep.engine.pico import write_pico
from everstep.vault import Vault

SECONDS = 900
"""More than it takes on any machine, however busy that is with other things."""


def run(home, *arguments):
    """The command in a process of its own; its exit code and all it said."""
    done = subprocess.run(
        [sys.executable, "-m", "everstep.cli", "quickstart", "--home", str(home), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "COLUMNS": "100", "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 60)
def test_trains_restores_exactly_and_leaves_a_checkpoint_and_a_plot(tmp_path):
    code, said = run(tmp_path, "--steps", "12")

    assert code == 0, said
    assert "A = B" in said
    assert "killed the service (SIGKILL) at step 18; it came back and went on" in said
    assert said.count("it is started again") == 1
    assert "A = K" in said
    assert "C ≠ A" in said
    losses = [float(loss) for loss in re.findall(r"training: step \d+/12, loss (\S+)", said)]
    assert losses[-1] < losses[0] - 1
    adapter = tmp_path / "quickstart" / "adapter"
    assert str(adapter) in said
    assert sorted(path.name for path in adapter.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "everstep" / "pico")
    assert peft.PeftModel.from_pretrained(base, adapter).peft_config["default"].r == 32
    assert "a sample, before training" in said and "a sample, after training" in said
    assert re.search(r"a service runs at http://127\.0\.0\.1:\d+ and keeps everything in", said)
    assert str(tmp_path / "quickstart" / "loss.png") in said
    assert (tmp_path / "quickstart" / "loss.png").stat().st_size > 10_000
    vault = Vault(tmp_path / "vault", writer=False)
    saved = sorted(vault.manifests(kind="training"), key=lambda manifest: manifest.created_at)
    assert [(each.name, each.step) for each in saved] == [
        ("quickstart", 12),
        ("quickstart-continued", 20),
        ("quickstart-continued", 20),
        ("quickstart-continued", 20),
        ("quickstart-continued", 8),
    ]
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        a, b, k, c = (each.files[name] for each in saved[1:])
        assert a == b == k != c


TURNS = [{"role": "user", "content": "Ping"}, {"role": "assistant", "content": "Pong"}]


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat.jsonl", json.dumps({"messages": TURNS})),
        ("pairs.jsonl", json.dumps({"prompt": "Ping", "completion": "Pong"})),
        ("book.txt", "Ping, said the one. Pong, said the other.\n" * 9),
    ],
)
def test_trains_a_model_of_a_directory_on_data_of_ones_own(tmp_path, name, content):
    write_pico(tmp_path / "mine")
    data = tmp_path / name
    data.write_text(content)

    code, said = run(
        tmp_path / "home", "--steps", "2", "--model", str(tmp_path / "mine"), "--data", str(data)
    )

    assert code == 0, said
    assert f"mine learns from {name}" in said
    assert "A = B" in said and "A = K" in said


def test_where_there_is_a_terminal_a_bar_shows_steps_and_loss():
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=100)

    with Meter(console, "training", 4) as meter:
        for loss in (3.0, 2.5):
            meter.show(loss)

    assert "training" in shown.getvalue()
    assert "2/4" in shown.getvalue()
    assert "loss 2.5000" in shown.getvalue()
    assert "━" in shown.getvalue()


def test_bad_data_ends_it_before_anything_starts(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "p"}\n')
    home = tmp_path / "home"

    done = CliRunner().invoke(app, ["quickstart", "--data", str(data), "--home", str(home)])

    assert done.exit_code == 1
    assert "data.jsonl:1: a line is" in done.stderr
    assert not home.exists()


def test_a_broken_promise_is_exit_code_1(tmp_path, monkeypatch):
    quickstart = importlib.import_module("everstep.cli.quickstart")
    monkeypatch.setattr(quickstart, "_run", lambda *args: ["B is not A: losses differ."])

    assert CliRunner().invoke(app, ["quickstart", "--home", str(tmp_path)]).exit_code == 1

    monkeypatch.setattr(quickstart, "_run", lambda *args: [])
    assert CliRunner().invoke(app, ["quickstart", "--home", str(tmp_path)]).exit_code == 0


def test_a_model_is_a_name_or_a_directory(tmp_path):
    (tmp_path / "mine").mkdir()

    assert served_model("everstep/pico") == ("everstep/pico", "everstep/pico")
    assert served_model(f"{tmp_path}/mine/") == ("mine", f"mine={tmp_path}/mine")
    with pytest.raises(Refused, match="there is no such directory"):
        served_model(f"{tmp_path}/yours")


def test_a_service_that_was_not_killed_proves_nothing(monkeypatch):
    quickstart = importlib.import_module("everstep.cli.quickstart")
    killed = []
    monkeypatch.setattr(quickstart.os, "kill", lambda pid, number: killed.append(pid))
    monkeypatch.setattr(
        quickstart, "_continue", lambda setup, client, label, sent: [sent(n) for n in range(3, 11)]
    )

    with pytest.raises(QuickstartError, match="came to no harm"):
        quickstart._continue_killed(
            SimpleNamespace(steps=3), SimpleNamespace(local_pid=7), None, ""
        )
    assert killed == [7]
