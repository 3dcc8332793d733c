"""Benchmarks' ``--device``: refused with the reason where there is no such device."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def parser(monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    devices: Any = importlib.import_module("devices")
    made = argparse.ArgumentParser()
    devices.add_device_option(made)
    return made


@pytest.mark.parametrize(
    ("device", "reason"),
    [("cuda", "needs an NVIDIA GPU"), ("cuda:1", "needs an NVIDIA GPU"), ("mps", "cpu and cuda")],
)
def test_device_that_is_not_there_is_refused(
    device: str,
    reason: str,
    parser: argparse.ArgumentParser,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--device", device])
    assert caught.value.code == 2
    assert reason in capsys.readouterr().err


def test_device_that_is_there_is_taken(
    parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert parser.parse_args(["--device", "cuda:1"]).device == "cuda:1"
    assert parser.parse_args([]).device == "cpu"


@pytest.mark.parametrize("name", ["sampling", "checkpoints"])
def test_benchmark_has_the_option(name: str) -> None:
    text = (BENCHMARKS / f"{name}.py").read_text()
    assert "add_device_option(parser)" in text
    assert "arguments.device" in text
