"""Where a model is placed, and in which dtype, when nobody says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from everstep.engine import load_model
from everstep.engine import model as model_module


class Placed(Exception):
    """Raised when a model is put on its device: there may be none."""


class Module:
    """A model that is only looked at."""

    def requires_grad_(self, wanted: bool) -> None:
        assert not wanted

    def eval(self) -> None:
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
def test_cuda_is_used_where_it_is_and_bfloat16_there(
    there: bool, asked: dict[str, Any], expected: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(
        model_module, "_pretrained", lambda source, kind: kinds.append(kind) or Module()
    )
    with pytest.raises(Placed) as caught:
        load_model("m", "somewhere", **asked)
    assert (caught.value.args[0], kinds[0]) == expected


def test_on_a_machine_without_cuda_it_is_the_cpu_in_float32(directories: dict[str, Path]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    info = load_model("m", str(directories["llama"])).info
    assert (info.device, info.dtype) == ("cpu", "float32")
