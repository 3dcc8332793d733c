"""Benchmarks' ``--device``: refused with the reason where there is no such device.

What they do on a GPU runs here on the CPU, with small models.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.devices import settings_of

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Import a script of the benchmarks."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def parser(script: Callable[[str], Any]) -> argparse.ArgumentParser:
    devices = script("devices")
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


@pytest.mark.parametrize("name", ["sampling", "checkpoints", "training"])
def test_benchmark_has_the_option(name: str) -> None:
    text = (BENCHMARKS / f"{name}.py").read_text()
    assert "add_device_option(parser)" in text
    assert "arguments.device" in text


@pytest.mark.slow
@pytest.mark.long(reason="imports peft, and loads the model four times")
def test_training_compares_what_a_gpu_is_measured_by(
    script: Callable[[str], Any], tmp_path: Path
) -> None:
    training, models = script("training"), script("random_models")
    case = training.Case("small", "bfloat16", "4x8..16", share=0.5)
    models.write_random_model(tmp_path / "small", "small", dtype="bfloat16")
    with settings_of("cpu"):
        steps = {
            name: training.engine_step(case, tmp_path, "cpu", name) for name in training.VARIANTS
        }
        steps["peft"] = training.peft_step(case, tmp_path, "cpu")
        losses = {
            name: [step() for _ in range(training.WARM_UP + 1)] for name, step in steps.items()
        }
    turns = {name: [(0.5, 1.0, loss) for loss in found] for name, found in losses.items()}
    turns["gemm"] = [(2.0, 1.0, training.gemm_step(case, tmp_path, "cpu")())] * 3
    figures = list(training.compare(case, tmp_path, turns, "cpu"))
    peers = ["PEFT", "PEFT", "GEMM", "engine, products in base dtype", "engine, determinism off"]
    assert [each.peer for each in figures] == peers
    assert all(figure.ratio > 0 for figure in figures)
    assert losses["engine"] != losses["engine, products in base dtype"]


def test_sampling_compares_what_a_gpu_is_measured_by(
    script: Callable[[str], Any], tmp_path: Path
) -> None:
    sampling, models = script("sampling"), script("random_models")
    with settings_of("cpu"):
        subject = sampling.Subject(tmp_path / "m", models.SIZES["small"], "bfloat16", "cpu")
        found = sampling.compare(subject, 32, 4, 1)
    assert found.keys() == {"base", "generate", "adapter", "passes", "bandwidth"}
    assert all(each > 0 for each in found.values())


@pytest.mark.slow
@pytest.mark.long(reason="a service, its saves and its loads")
def test_checkpoints_are_measured_with_a_model_of_a_gpu(
    script: Callable[[str], Any], tmp_path: Path
) -> None:
    checkpoints = script("checkpoints")
    parser = argparse.ArgumentParser()
    checkpoints.add_options(parser)
    options = ["--dir", str(tmp_path), "--model", "small", "--rank", "4"]
    arguments = parser.parse_args(options, argparse.Namespace(quick=True))
    measured = checkpoints.measure(arguments)
    figures = list(islice(measured, 4))
    measured.close()
    assert "save_state of 0 MB, durable" in [each.what for each in figures]
