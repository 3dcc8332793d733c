"""Determinism: settings that CUDA needs before its first computation, as errors. No GPU is used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from everstep.engine import AdamParams, AdapterConfig, Model, SampleSpec, optim_step
from everstep.engine.determinism import FIXED_WORKSPACES, WORKSPACE, configure
from everstep.engine.errors import ModelUnsupported
from tests.engine.helpers import backward, examples, prompt, sample

CASES: dict[str, tuple[str, bool, Mapping[str, str]]] = {
    "cuda": ("cuda:0", True, {}),
    "own workspace": ("cuda", True, {WORKSPACE: ":16:8"}),
    "off": ("cuda", False, {}),
    "cpu": ("cpu", True, {}),
}
"""Device, whether deterministic, and variables."""

_PROGRAM = """
import json, os, sys
import torch
from everstep.engine import load_model
from everstep.engine.models import load, pretrained

class Moved(Exception):
    pass

class Module:
    experts = None
    def requires_grad_(self, wanted): pass
    def eval(self): pass
    def set_experts_implementation(self, name): self.experts = name
    def to(self, device):
        cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
        print(json.dumps([sys.argv[1], {
            "initialised": torch.cuda.is_initialized(),
            "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
            "mode": torch.get_deterministic_debug_mode(),
            "tf32": [cuda.matmul.allow_tf32, cudnn.allow_tf32],
            "reduced": [
                cuda.matmul.allow_bf16_reduced_precision_reduction,
                cuda.matmul.allow_fp16_reduced_precision_reduction,
            ],
            "cudnn": [cudnn.benchmark, cudnn.deterministic, cuda.cudnn_sdp_enabled()],
            "attention": [
                cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()
            ],
            "filled": torch.utils.deterministic.fill_uninitialized_memory,
            "experts": self.experts,
        }]), flush=True)
        raise Moved

pretrained.read_pretrained = lambda source, kind: Module()
load._compute_fingerprint = lambda module, source: ""
for name, (device, deterministic, variables) in json.loads(sys.stdin.read()).items():
    if os.fork():  # nothing of one case reaches another
        assert os.wait()[1] == 0
        continue
    sys.argv[1:] = [name]
    os.environ.update(variables)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    try:
        load_model("m", "somewhere", device=device, deterministic=deterministic)
    except Moved:
        os._exit(0)
"""


@pytest.fixture(scope="module")
def at_first_use() -> dict[str, dict[str, Any]]:
    """Settings of new processes at the moment when the weights are moved to a device, by case."""
    clean = {name: value for name, value in os.environ.items() if name != WORKSPACE}
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env={**clean, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        input=json.dumps(CASES),
        capture_output=True,
        text=True,
        check=True,
    )
    found = dict(json.loads(line) for line in run.stdout.splitlines())
    assert found.keys() == CASES.keys()
    return found


def test_cuda_has_every_setting_before_its_first_use(
    at_first_use: dict[str, dict[str, Any]],
) -> None:
    assert at_first_use["cuda"] == {
        "initialised": False,
        "workspace": ":4096:8",
        "mode": 2,  # errors
        "tf32": [False, False],
        "reduced": [False, False],
        "cudnn": [False, True, False],
        "attention": [True, True, True],
        "filled": False,
        "experts": "eager",
    }


def test_a_fixed_workspace_of_the_users_is_kept(at_first_use: dict[str, dict[str, Any]]) -> None:
    assert at_first_use["own workspace"]["workspace"] == ":16:8"


def test_determinism_off_leaves_cuda_as_it_is(at_first_use: dict[str, dict[str, Any]]) -> None:
    found = at_first_use["off"]
    assert (found["workspace"], found["mode"], found["experts"]) == (None, 0, None)
    assert found["cudnn"][0] is True


def test_a_cpu_needs_no_variable_and_warns_as_before(
    at_first_use: dict[str, dict[str, Any]],
) -> None:
    found = at_first_use["cpu"]
    assert (found["workspace"], found["mode"], found["experts"]) == (None, 1, None)
    assert found["tf32"][0] is True, "flags of CUDA are left alone"


@pytest.mark.parametrize("value", [":0:0", ":8192:4", "COMPATIBLE"])
def test_a_workspace_that_is_not_fixed_is_refused(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(WORKSPACE, value)
    before = torch.get_deterministic_debug_mode()
    with pytest.raises(ModelUnsupported, match="--set determinism=off") as caught:
        configure("cuda")
    assert FIXED_WORKSPACES[0] in str(caught.value)
    assert "P1" in str(caught.value), "the promise that would be given up is named"
    assert torch.get_deterministic_debug_mode() == before


# Operations that raise on CUDA under these settings (torch's documentation of
# `use_deterministic_algorithms`), as far as a language model could call them.
_FLOATS_ONLY = {"cumsum"}
_RAISES = {"histc", "median", "put", "bincount", "nll_loss2d_forward", "_embedding_bag", "kthvalue"}


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the operations that CUDA has no deterministic form of."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self.raising: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        self.count += 1
        floats = (
            isinstance(args[0], torch.Tensor) and args[0].is_floating_point() if args else False
        )
        if name in _RAISES or (name in _FLOATS_ONLY and floats):
            self.raising.add(name)
        return func(*args, **(kwargs or {}))


def test_no_operation_of_a_step_or_a_sample_raises_on_cuda(model: Model) -> None:
    state = model.new_run(AdapterConfig(rank=4, seed=1))
    with Operations() as operations:
        backward(model, state, examples())
        optim_step(state, AdamParams(learning_rate=0.01, grad_clip_norm=0.1))
        sample(model, SampleSpec(prompt(), seed=1, max_tokens=2, prompt_logprobs=True))
    assert operations.count > 100
    assert operations.raising == set()


def test_operations_are_seen() -> None:
    with Operations() as operations:
        torch.rand(3).cumsum(0)
        torch.tensor([1, 2]).cumsum(0)
        torch.histc(torch.rand(3))
    assert operations.raising == {"cumsum", "histc"}
