"""Default device and dtype of a loaded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from everstep.engine import determinism, load_model
from everstep.engine.models import load, pretrained


class Placed(Exception):
    """Raised when a model is moved to its device, which may not exist."""


class Module:
    """A model without weights."""

    def requires_grad_(self, wanted: bool) -> None:
        assert not wanted

    def eval(self) -> None:
        pass

    def set_experts_implementation(self, name: str) -> None:
        pass

    def to(self, device: str) -> None:
        raise Placed(device)


@pytest.mark.parametrize(
    ("there", "asked", "expected"),
    [
        (True, {}, ("cuda", torch.bfloat16)),
        (False, {}, ("cpu", torch.float32)),
        (True, {"device": "cpu"}, ("cpu", torch.float32)),
        (True, {"dtype": "float32"}, ("cuda", torch.float32)),
        (False, {"dtype": "bfloat16"}, ("cpu", torch.bfloat16)),
        (False, {"device": "cuda:1"}, ("cuda:1", torch.bfloat16)),
    ],
)
def test_cuda_with_bfloat16_is_the_default_where_it_is_available(
    there: bool, asked: dict[str, Any], expected: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[torch.dtype] = []

    def read(source: str, kind: torch.dtype) -> Module:
        kinds.append(kind)
        return Module()

    monkeypatch.setattr(determinism, "configure", lambda device, deterministic: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(pretrained, "read_pretrained", read)
    monkeypatch.setattr(load, "_compute_fingerprint", lambda module, source: "")
    with pytest.raises(Placed) as caught:
        load_model("m", "somewhere", **asked)
    assert (caught.value.args[0], kinds[0]) == expected


def test_the_cpu_with_float32_is_the_default_without_cuda(directories: dict[str, Path]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    info = load_model("m", str(directories["llama"])).info
    assert (info.device, info.dtype) == ("cpu", "float32")


def test_weights_are_hashed_while_they_lie_on_the_host(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Any] = []
    read = pretrained.read_pretrained

    def read_unmovable(source: str, kind: torch.dtype) -> Any:
        module = read(source, kind)
        monkeypatch.setattr(module, "to", Module().to)
        return module

    def fingerprint(module: Any, source: str) -> str:
        hashed.append(module)
        return ""

    monkeypatch.setattr(pretrained, "read_pretrained", read_unmovable)
    monkeypatch.setattr(load, "_compute_fingerprint", fingerprint)
    with pytest.raises(Placed):
        load.load_model("m", str(directories["llama"]), device="cpu")
    assert len(hashed) == 1
