"""Decoders: the direct one computes what the modules of transformers compute, to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

from everstep.engine import Model, SampleSpec, SamplingBatch, load_model
from everstep.engine.models import (
    decoder_checks,
    direct_decoder,
    frozen_product,
    projection_group,
)
from everstep.engine.models.attention import CachedRows
from everstep.engine.models.decoder import Decoder, ModuleDecoder
from everstep.engine.models.direct_decoder import DirectDecoder
from everstep.engine.models.frozen_product import FEW_ROWS, ROW_MULTIPLE, FrozenProduct
from everstep.engine.models.kv_cache import KvCache
from everstep.engine.models.projection_group import _StackedB
from everstep.engine.run_state import Adapter
from everstep.engine.sampling.batch import MIN_ROWS
from tests.engine.conftest import GROUPED, SMALL, WINDOW
from tests.engine.helpers import OperationCount, prompt, random_adapter, sample

LARGE: dict[str, Any] = {
    **SMALL,
    "hidden_size": 256,
    "intermediate_size": 512,
    "vocab_size": 1024,
    "num_key_value_heads": 2,
}
"""Sizes at which products are computed by oneDNN, and from packed copies."""
CONFIGS = {
    "llama": LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "llama, large": LlamaConfig(**LARGE, tie_word_embeddings=True),
    "llama, biases": LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True),
    "llama, scaled rotary": LlamaConfig(
        **GROUPED,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": MistralConfig(**GROUPED, head_dim=8, sliding_window=WINDOW),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen2, large": Qwen2Config(**LARGE),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "qwen3, large": Qwen3Config(**LARGE, head_dim=32),
}
_STEPS = 2 * WINDOW + 4
Requests = Sequence[tuple[int, Adapter | None]]


@pytest.fixture(scope="module", params=[(n, d) for n in CONFIGS for d in ("float32", "bfloat16")])
def direct(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any
) -> Model:
    """A model of a family that is decoded directly, its norms shaken."""
    name, dtype = request.param
    torch.manual_seed(7)
    module = AutoModelForCausalLM.from_config(CONFIGS[name])
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    directory: Path = tmp_path_factory.mktemp("direct") / "model"
    module.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return load_model(name, str(directory), device="cpu", dtype=dtype)


def decode(
    model: Model, decoder: Decoder, requests: Requests, multiple: int, seed: int = 0
) -> list[list[torch.Tensor]]:
    """Decode steps of requests together, past a sliding window.

    Args:
        model: the base model.
        decoder: what decodes.
        requests: number of sequences, and adapter, of each.
        multiple: each request's rows are padded to it.
        seed: decides the tokens. Request i has the same ones wherever it stands.

    Returns:
        Logits by step and request.
    """
    caches = [KvCache() for _ in requests]
    results = []
    with torch.no_grad():
        for step in range(_STEPS):
            tokens: list[int] = []
            cached, adapters = [], []
            for (rows, adapter), cache in zip(requests, caches, strict=True):
                begin = len(tokens)
                random = np.random.default_rng((seed, step, rows))
                tokens += random.integers(0, model.info.vocab_size, rows).tolist()
                cached.append(CachedRows(slice(begin, len(tokens)), cache))
                tokens += [0] * (-rows % multiple)
                adapters.append((adapter, slice(begin, len(tokens))))
            positions = np.full(len(tokens), step, dtype=np.int64)
            logits = decoder.logits(np.array(tokens), positions, cached, adapters)
            results.append([logits[each.rows] for each in cached])
    return results


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_equal(found: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]) -> None:
    assert len(found) == len(expected) == _STEPS
    for some, others in zip(found, expected, strict=True):
        for one, other in zip(some, others, strict=True):
            assert torch.equal(one, other)


def test_both_decoders_give_the_same_bits(direct: Model) -> None:
    assert direct.info.decoder == direct.decoder.name == "direct"
    requests: Requests = [(3, None), (17, None), (1, None)]
    found = decode(direct, direct.decoder, requests, ROW_MULTIPLE)
    check_equal(found, decode(direct, ModuleDecoder(direct), requests, ROW_MULTIPLE))


def test_both_decoders_agree_on_adapters(direct: Model) -> None:
    first, second = random_adapter(direct, 1), random_adapter(direct, 2)
    requests: Requests = [(3, first), (17, None), (1, second)]
    found = decode(direct, direct.decoder, requests, ROW_MULTIPLE)
    expected = decode(direct, ModuleDecoder(direct), requests, ROW_MULTIPLE)
    plain = decode(direct, direct.decoder, [(3, None), (17, None), (1, None)], ROW_MULTIPLE)
    relative = 1e-5 if direct.info.dtype == "float32" else 0.05
    for some, others, without in zip(found, expected, plain, strict=True):
        for index, (one, other) in enumerate(zip(some, others, strict=True)):
            assert float((one - other).abs().max()) <= relative * float(other.abs().max())
            changed = float((one - without[index]).abs().max()) > 2 * relative
            assert changed == (requests[index][1] is not None)


def test_a_request_keeps_its_bits_among_others_at_its_own_multiple(direct: Model) -> None:
    first, second = random_adapter(direct, 1), random_adapter(direct, 2)
    for adapter in (None, first):
        multiple = direct.decoder.row_multiple(adapter)
        alone = decode(direct, direct.decoder, [(1, adapter)], multiple)
        among = decode(
            direct, direct.decoder, [(5, adapter), (1, adapter), (9, second), (30, None)], multiple
        )
        check_equal([step[1:2] for step in among], alone)


def test_packed_copies_have_the_weights_bits(
    direct: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: Requests = [(2, None), (9, random_adapter(direct, 1))]
    copied = decode(direct, direct.decoder, requests, ROW_MULTIPLE)
    monkeypatch.setattr(direct_decoder, "MAX_COPIED_BYTES", 0)
    info = direct.info
    plain = load_model(info.name, info.source, device="cpu", dtype=info.dtype)
    assert isinstance(plain.decoder, DirectDecoder)
    assert isinstance(direct.decoder, DirectDecoder)
    check_equal(decode(plain, plain.decoder, requests, ROW_MULTIPLE), copied)
    if "large" in info.name:
        assert any(group.copied for group in direct.decoder._groups)
    assert not any(group.copied for group in plain.decoder._groups)


def adapters_with_stacked_b(model: Model, adapter: Adapter) -> int:
    assert isinstance(model.decoder, DirectDecoder)
    groups = model.decoder._stack(adapter).groups.values()
    return sum(group._stacked is not None for group in groups)


def test_b_in_one_operation_have_the_bits_of_one_matrix(
    direct: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, stacked = random_adapter(direct, 1), random_adapter(direct, 1)
    expected = decode(direct, direct.decoder, [(3, plain), (1, None), (40, plain)], ROW_MULTIPLE)
    assert adapters_with_stacked_b(direct, plain) == 0
    monkeypatch.setattr(projection_group, "_MIN_ZERO_BYTES", -1)
    among: Requests = [(3, stacked), (1, None), (40, stacked)]
    check_equal(decode(direct, direct.decoder, among, ROW_MULTIPLE), expected)
    assert adapters_with_stacked_b(direct, stacked) >= direct.module.config.num_hidden_layers


def test_other_bits_of_b_in_one_operation_are_found(
    direct: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = _StackedB._parts
    monkeypatch.setattr(projection_group, "_MIN_ZERO_BYTES", -1)
    monkeypatch.setattr(_StackedB, "_parts", lambda b, inner: parts(b, inner * (1 + 2**-23)))
    adapter = random_adapter(direct, 1)
    assert adapters_with_stacked_b(direct, adapter) == 0


@pytest.mark.parametrize("width", [64, 768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_keep_rows_at_every_multiple_that_was_found(
    width: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(3)
    product = FrozenProduct(torch.randn(500, width, dtype=dtype))
    multiple = product.row_multiple()
    x = torch.randn(400, width, dtype=dtype)
    together = product(x)
    for rows in range(multiple, len(x), multiple):
        assert torch.equal(product(x[:rows].clone()), together[:rows]), rows
    product.pack()
    assert torch.equal(product(x), together)


@pytest.mark.parametrize("dependent", [*FEW_ROWS, ROW_MULTIPLE])
def test_products_that_depend_on_the_rows_are_found(
    dependent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = frozen_product._linear

    def other_for_few(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        y: torch.Tensor = linear(x, *arguments)
        return y * (1 + 2**-23) if len(x) % (2 * dependent) == dependent else y

    first, second = (FrozenProduct(torch.randn(300, 256)) for _ in range(2))
    if not first.uses_onednn:
        pytest.skip("this processor's products are torch's")
    monkeypatch.setattr(frozen_product, "_linear", other_for_few)
    more = [each for each in (*FEW_ROWS, ROW_MULTIPLE) if each > dependent]
    assert frozen_product.check_rows([first, second]) == (more[0] if more else ROW_MULTIPLE)
    assert first.uses_onednn == second.uses_onednn == bool(more)
    x = torch.randn(dependent, 256)
    if dependent == ROW_MULTIPLE:
        assert torch.equal(second(x), torch.nn.functional.linear(x, second.weight))


@pytest.mark.parametrize("shape", [(96, 64), (300, 256), (64, 600)])
def test_small_products_of_one_thread_have_the_bits_of_all(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_product, "MIN_BYTES", 1 << 20)  # torch's own product
    with threads(2):
        product = FrozenProduct(torch.randn(shape))
        multiple = product.row_multiple()
        used: list[int] = []
        linear = torch.nn.functional.linear

        def watched(*arguments: Any) -> torch.Tensor:
            used.append(torch.get_num_threads())
            return linear(*arguments)

        monkeypatch.setattr(torch.nn.functional, "linear", watched)
        for rows in range(multiple, 100, multiple):
            x = torch.randn(rows, shape[1])
            assert torch.equal(product(x), linear(x, product.weight)), rows
            work = rows * product.weight.numel()
            few = product.serial and work <= frozen_product.MAX_SERIAL_WORK
            assert used.pop() == (1 if few else 2)
            assert torch.get_num_threads() == 2


def test_small_products_of_equal_bits_are_computed_by_one_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[int] = []

    def stable(x: torch.Tensor, weight: torch.Tensor, bias: None) -> torch.Tensor:
        used.append(torch.get_num_threads())
        return x[..., :1] * weight[:, 0]

    monkeypatch.setattr(torch.nn.functional, "linear", stable)
    with threads(2):
        product = FrozenProduct(torch.randn(96, 64))
        product.row_multiple()
        used.clear()
        product(torch.randn(16, 64))
        product(torch.randn(512, 64))
        assert used == [1, 2]


def test_other_bits_of_one_thread_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = torch.nn.functional.linear

    def other_alone(*arguments: Any) -> torch.Tensor:
        return linear(*arguments) * (1 + (torch.get_num_threads() == 1) * 2**-23)

    monkeypatch.setattr(torch.nn.functional, "linear", other_alone)
    with threads(2):
        product = FrozenProduct(torch.randn(96, 64))
        product.row_multiple()
        assert not product.serial
        x = torch.randn(16, 64)
        assert torch.equal(product(x), linear(x, product.weight))


@pytest.mark.parametrize("shape", [(96, 64), (300, 256), (2304, 32), (64, 2048)])
@pytest.mark.parametrize("packed", [False, True])
def test_a_product_adds_what_two_operations_add(shape: tuple[int, int], *, packed: bool) -> None:
    torch.manual_seed(6)
    product = FrozenProduct(torch.randn(shape))
    multiple = product.row_multiple()
    if packed:
        product.pack()
    product.fuse()
    for rows in range(multiple, 300, 3 * multiple):
        x, y = torch.randn(rows, shape[1]), torch.randn(rows, shape[0])
        expected = y + product(x)
        assert torch.equal(product.add(y.clone(), x), expected), rows
        half = y.bfloat16()
        assert torch.equal(product.add(half.clone(), x), half + product(x).bfloat16())


def test_other_bits_of_a_product_that_adds_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    add = FrozenProduct._multiply_add

    def other(self: FrozenProduct, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return add(self, y, x) * (1 + 2**-23)

    monkeypatch.setattr(FrozenProduct, "_multiply_add", other)
    product = FrozenProduct(torch.randn(96, 64))
    product.fuse()
    assert not product.fused
    x, y = torch.randn(16, 64), torch.randn(16, 96)
    assert torch.equal(product.add(y.clone(), x), y + product(x))


@pytest.mark.parametrize("shape", [(64, 32), (99, 33), (500, 768)])
def test_another_order_of_additions_is_found_in_half_precision(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(4)
    product = FrozenProduct(torch.randn(shape, dtype=torch.bfloat16))
    product.use_torch()

    def other_for_few(x: torch.Tensor, narrow: torch.Tensor, *_: Any) -> torch.Tensor:
        wide, weight, half = x.float(), narrow.float(), shape[1] // 3
        if len(x) % 16:
            y = wide[:, :half] @ weight[:, :half].t() + wide[:, half:] @ weight[:, half:].t()
        else:
            y = wide @ weight.t()
        return y.to(x.dtype)

    plain = torch.randn(4, shape[1]).bfloat16()
    whole = other_for_few(torch.cat([plain] * 4), product.weight)
    hidden = other_for_few(plain, product.weight) == whole[:4]
    assert hidden.float().mean() > 0.99, "rounding hides it in most numbers"
    monkeypatch.setattr(torch.nn.functional, "linear", other_for_few)
    assert product.row_multiple() == ROW_MULTIPLE


def test_a_model_whose_layers_do_more_keeps_the_modules(llama: Model) -> None:
    assert llama.decoder.name == "direct"
    layer = llama.module.model.layers[0]
    forward = layer.mlp.forward
    layer.mlp.forward = lambda x: forward(x) * (1 + 2**-20)
    try:
        assert decoder_checks.choose_decoder(llama).name == "transformers"
    finally:
        del layer.mlp.forward
    assert decoder_checks.choose_decoder(llama).name == "direct"


def test_a_family_that_is_not_known_keeps_the_modules(model: Model, family: str) -> None:
    known = model.is_llama_like
    assert known == (family.startswith(("llama", "qwen3")))
    assert model.decoder.name == model.info.decoder == ("direct" if known else "transformers")


def test_a_lone_request_is_not_padded_to_sixteen_rows(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    logits = llama.decoder.logits

    def watched(tokens: Any, *arguments: Any) -> Any:
        rows.append(len(tokens))
        return logits(tokens, *arguments)

    monkeypatch.setattr(llama.decoder, "logits", watched)
    few = llama.decoder.row_multiple(None)
    sample(llama, SampleSpec(prompt(), max_tokens=5, use_eos=False))
    assert rows == [max(few, MIN_ROWS)] * 4
    assert few in (*FEW_ROWS, ROW_MULTIPLE)


# What a token costs, counted


@pytest.mark.parametrize(("adapted", "most"), [(False, 34), (True, 48)])
def test_a_token_of_many_sequences_takes_few_operations(
    llama: Model, *, adapted: bool, most: int
) -> None:
    batch = SamplingBatch(llama)
    spec = SampleSpec(prompt(), 32, max_tokens=20, use_eos=False)
    batch.add("it", spec, random_adapter(llama, 1) if adapted else None)
    batch.step()
    batch.step()
    tokens = 8
    with OperationCount() as counted:
        for _ in range(tokens):
            assert batch.step() == []
    layers = llama.module.config.num_hidden_layers
    assert 0 < counted.calls <= tokens * most * layers
    cache = 32 * 2 * 64 * 8 * 4  # rows, key heads, capacity, their width, bytes
    assert counted.largest < cache, "caches grow by doubling, and are not copied for a token"
