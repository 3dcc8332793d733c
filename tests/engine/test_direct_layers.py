"""Direct layers: what the modules of transformers compute, in fewer operations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.models.llama import LlamaConfig

from everstep.engine import AdapterConfig, Model, load_model
from everstep.engine.kernels import elementwise
from everstep.engine.training import checks
from tests.engine.conftest import GROUPED, WINDOW
from tests.engine.helpers import backward, examples, trained
from tests.engine.test_decoders import CONFIGS

LENGTHS = (3 * WINDOW, 3 * WINDOW, 20, 9, 1)
MAX_OPERATIONS = 430
"""Of a pass of two layers: packing, head and loss take 120 of them."""


class Operations(TorchDispatchMode):
    """Counts the operations of a pass, without those that make a view."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def load(config: Any, directory: Path, tokenizer: Any, dtype: str = "float32") -> Model:
    """Write a model whose norms and biases are shaken, and load it."""
    torch.manual_seed(7)
    module = AutoModelForCausalLM.from_config(config)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    module.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return load_model("direct", str(directory), device="cpu", dtype=dtype)


@pytest.fixture(scope="module", params=list(CONFIGS))
def direct(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any
) -> Model:
    return load(CONFIGS[request.param], tmp_path_factory.mktemp("layers"), tokenizer)


def compare(model: Model, config: AdapterConfig, tolerance: float) -> None:
    """Compare a pass's logprobs and gradients with those of the modules."""
    assert model.layers is not None
    states = [model.new_run(config) for _ in range(2)]
    noise = 0.05 * torch.randn(states[0].arena.size, generator=torch.Generator().manual_seed(2))
    data = examples(5, LENGTHS)
    results = []
    layers = model.layers
    for state, used in zip(states, (layers, None), strict=True):
        state.arena.buffers["params"].copy_(noise)
        model.layers = used
        try:
            results.append(backward(model, state, data))
        finally:
            model.layers = layers
    ours, theirs = results
    for one, other in zip(ours.outputs, theirs.outputs, strict=True):
        apart = torch.from_numpy(one["logprobs"] - other["logprobs"])
        assert apart.abs().max() < 10 * tolerance
    found, expected = (state.arena.buffers["grads"] for state in states)
    assert expected.norm() > 1
    assert (found - expected).norm() < tolerance * expected.norm()


def test_a_pass_equals_that_of_the_modules(direct: Model) -> None:
    assert direct.info.layers == "direct"
    compare(direct, AdapterConfig(rank=4, seed=3), 1e-5)


def test_an_adapter_of_some_projections_equals_that_of_the_modules(direct: Model) -> None:
    compare(direct, AdapterConfig(4, train_mlp=False, train_unembed=False), 1e-5)
    compare(direct, AdapterConfig(4, train_attn=False), 1e-5)
    layout = direct.layout(AdapterConfig(4))
    some = [name for name in layout.widths if "layers.1" in name and "k_proj" not in name]
    compare(direct, AdapterConfig(4, modules=some), 1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3, large"])
def test_a_pass_in_bfloat16_equals_that_of_the_modules(
    name: str, tmp_path: Path, tokenizer: Any
) -> None:
    compare(load(CONFIGS[name], tmp_path, tokenizer, "bfloat16"), AdapterConfig(rank=4), 3e-2)


def test_a_pass_has_the_same_bits_each_time(direct: Model) -> None:
    passes = []
    for _ in range(2):
        state = trained(direct)
        backward(direct, state, examples(2, LENGTHS))
        passes.append(state.arena.buffers["grads"].numpy().tobytes())
    assert passes[0] == passes[1]


def test_models_that_are_built_otherwise_keep_their_modules(
    tmp_path: Path, tokenizer: Any, model: Model, family: str
) -> None:
    if family != "llama":
        assert (model.layers is not None) is family.startswith("qwen3")
        return
    gelu = LlamaConfig(**GROUPED, hidden_act="gelu")
    assert load(gelu, tmp_path, tokenizer).info.layers == "transformers"


def test_layers_with_other_numbers_are_not_used(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checks.choose_layers(llama) is not None
    with monkeypatch.context() as patch:
        patch.setattr(elementwise, "_swap_halves", lambda x: x.clone())
        assert checks.choose_layers(llama) is None
    original = elementwise.Gate.backward
    monkeypatch.setattr(
        elementwise.Gate, "backward", staticmethod(lambda *args: original(*args)[::-1])
    )
    assert checks.choose_layers(llama) is None


def test_a_pass_takes_few_operations(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    state, data = trained(llama), examples(1, (16, 16, 16))
    counts = []
    for layers in (llama.layers, None):
        monkeypatch.setattr(llama, "layers", layers)
        with Operations() as seen:
            backward(llama, state, data)
        counts.append(seen.count)
    direct, modules = counts
    assert 0 < direct <= MAX_OPERATIONS
    assert direct < 0.9 * modules


def kept_by_a_pass(model: Model) -> int:
    """Return the bytes that the backward of a pass needs, beyond weights and adapter."""
    state, data = trained(model), examples(1, (32, 32))
    kept: dict[int, torch.UntypedStorage] = {}
    known = {each.untyped_storage().data_ptr() for each in model.module.state_dict().values()}
    known.add(state.arena.buffers["params"].untyped_storage().data_ptr())

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # alive, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        backward(model, state, data)
    return sum(storage.nbytes() for storage in kept.values())


def test_a_pass_keeps_less_than_with_the_modules(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = kept_by_a_pass(llama)
    monkeypatch.setattr(llama, "layers", None)
    modules = kept_by_a_pass(llama)
    assert 0 < direct < 0.95 * modules
