"""``everstep quickstart``, as it is typed."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from everstep.cli.app import app
from everstep.cli.common.errors import Refused
from everstep.cli.common.models import served_model
from everstep.cli.quickstart.run import QuickstartError
from everstep.cli.train.loop import Meter
from everstep.engine.models.pico import write_pico
from everstep.vault import Vault

SECONDS = 900
"""More than it takes on any machine, however busy it is."""


def run(home: Path, *arguments: str) -> tuple[int, str]:
    """Run the command in a process of its own. Returns its exit code and all output."""
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


@pytest.mark.long(reason="the whole quickstart")
@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 60)
def test_quickstart_restores_exactly_and_writes_adapter_and_plot(tmp_path: Path) -> None:
    code, said = run(tmp_path, "--steps", "12")

    assert code == 0, said
    assert "A = B" in said
    assert "killed the service (SIGKILL) at step 18; it restarted and resumed" in said
    assert said.count("restarting it") == 1
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
    assert re.search(r"a service runs at http://127\.0\.0\.1:\d+ and stores everything in", said)
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


@pytest.mark.long(reason="the whole quickstart on a model of its own")
@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 60)
def test_quickstart_trains_local_model_on_own_data(tmp_path: Path) -> None:
    write_pico(tmp_path / "mine")
    data = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "Ping"}, {"role": "assistant", "content": "Pong"}]
    data.write_text(json.dumps({"messages": turns}))

    code, said = run(
        tmp_path / "home", "--steps", "2", "--model", str(tmp_path / "mine"), "--data", str(data)
    )

    assert code == 0, said
    assert "mine learns from chat.jsonl" in said
    assert "A = B" in said and "A = K" in said


def test_meter_shows_steps_and_loss_in_terminal() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=100)

    with Meter(console, "training", 4) as meter:
        for loss in (3.0, 2.5):
            meter.show(loss)

    assert "training" in shown.getvalue()
    assert "2/4" in shown.getvalue()
    assert "loss 2.5000" in shown.getvalue()
    assert "━" in shown.getvalue()


def test_bad_data_is_reported_before_a_service_starts(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "p"}\n')
    home = tmp_path / "home"

    done = CliRunner().invoke(app, ["quickstart", "--data", str(data), "--home", str(home)])

    assert done.exit_code == 1
    assert "data.jsonl:1: a line is" in done.stderr
    assert not home.exists()


def test_broken_promise_exits_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quickstart = importlib.import_module("everstep.cli.quickstart.run")
    monkeypatch.setattr(quickstart, "_run", lambda *args: ["B is not A: losses differ."])

    assert CliRunner().invoke(app, ["quickstart", "--home", str(tmp_path)]).exit_code == 1

    monkeypatch.setattr(quickstart, "_run", lambda *args: [])
    assert CliRunner().invoke(app, ["quickstart", "--home", str(tmp_path)]).exit_code == 0


def test_model_is_a_name_or_a_directory(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()

    assert served_model("everstep/pico") == ("everstep/pico", "everstep/pico")
    assert served_model(f"{tmp_path}/mine/") == ("mine", f"mine={tmp_path}/mine")
    with pytest.raises(Refused, match="there is no such directory"):
        served_model(f"{tmp_path}/yours")


def test_quickstart_fails_if_the_service_survives_the_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    quickstart = importlib.import_module("everstep.cli.quickstart.run")
    killed: list[int] = []
    monkeypatch.setattr(quickstart.os, "kill", lambda pid, number: killed.append(pid))
    monkeypatch.setattr(
        quickstart, "_continue", lambda setup, client, label, sent: [sent(n) for n in range(3, 11)]
    )

    with pytest.raises(QuickstartError, match="still runs"):
        quickstart._continue_killed(
            SimpleNamespace(steps=3), SimpleNamespace(local_pid=7), None, ""
        )
    assert killed == [7]
