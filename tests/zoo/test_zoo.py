"""The zoo: every causal family of transformers is served exactly, or refused with the reason.

Each family is a tiny random model (`configs`) whose weights are all shaken, so that a wrong
attention, a wrong router or an adapter on the wrong module shows. transformers and PEFT are the
reference. docs/models.md is the committed result; `make models` writes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from everstep.engine import AdamParams, RunState, SampleSpec, optim_step
from everstep.engine import adapter_files as files
from everstep.engine.models.lora import features
from everstep.engine.models.lora_targets import ROUTERS
from everstep.engine.models.pico import write_pico
from everstep.interchange.base import BaseModel
from everstep.interchange.merge import merge
from everstep.interchange.peft_config import PeftAdapter
from everstep.vault import Vault
from everstep.worker.import_adapter import write_import
from everstep.worker.protocol.messages import ImportAdapter
from tests.engine import helpers
from tests.zoo import table
from tests.zoo.configs import EXPERTS, FAMILIES
from tests.zoo.peft_reference import Arrays, PeftReference, base_logprobs, base_model, write_adapter
from tests.zoo.specimens import Specimen, specimen

DATA = helpers.examples(1, (9, 30, 5))  # past the sliding windows of 8
STEPS = 5
SMOOTH = AdamParams(learning_rate=0.01, eps=1e-3)
"""With a tiny eps, the first steps of a gradient of almost zero go by the sign of its noise."""
CLOSE = 1e-4


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("pico") / "pico"
    write_pico(directory)
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()
    transformers.logging.set_verbosity_warning()


@pytest.fixture(scope="module", params=FAMILIES)
def any_family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any
) -> Specimen:
    return specimen(request.param, tmp_path_factory.mktemp("zoo") / "model", tokenizer)


@pytest.fixture(scope="module", params=table.served())
def kept(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any
) -> Specimen:
    return specimen(request.param, tmp_path_factory.mktemp("zoo") / "model", tokenizer)


def scores(kept: Specimen, state: RunState) -> Arrays:
    """Compute the data's logprobs with the engine."""
    return [
        np.asarray(each["logprobs"]) for each in helpers.forward(kept.served, state, DATA).outputs
    ]


def check_close(found: Arrays, expected: Arrays) -> None:
    assert len(found) == len(expected) == len(DATA)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=CLOSE, atol=CLOSE)


def test_the_documentation_says_which_families_are_served(any_family: Specimen) -> None:
    assert table.committed()[any_family.family] == any_family.row, "run `make models`"


def test_the_documentation_names_every_family_once() -> None:
    rows = re.findall(r"^\| `", table.PAGE.read_text(), re.MULTILINE)
    assert len(rows) == len(FAMILIES)
    assert sorted(table.committed()) == sorted(FAMILIES)


def test_routers_are_not_adapted(kept: Specimen) -> None:
    model, targets = kept.served, kept.run().layout.widths
    assert targets
    for name in targets:
        width = features(model.module.get_submodule(name))[1]
        assert width not in (1, EXPERTS, EXPERTS + 2), name
        assert not re.search(r"router|\.gate\b|\bwg\b", name), name
    routed = "routed experts" in model.info.projections.never
    assert routed == (ROUTERS in model.info.projections.never) or kept.family == "gemma3n_text"


def test_an_exported_adapter_is_peft_s_in_loss_gradients_and_steps(
    kept: Specimen, tmp_path: Path
) -> None:
    state = kept.run()
    base = base_model(kept.directory)
    plain = base_logprobs(base, DATA)
    reference = PeftReference(base, write_adapter(state, tmp_path / "adapter"))

    assert reference.unplaced == []
    expected = scores(kept, state)
    check_close(base_logprobs(reference.model, DATA), expected)
    assert max(np.abs(one - other).max() for one, other in zip(plain, expected, strict=True)) > 0.01

    optimizer = reference.optimizer(SMOOTH)
    for _ in range(STEPS):
        loss = reference.loss(DATA)
        loss.backward()  # type: ignore[no-untyped-call]
        found = helpers.backward(kept.served, state, DATA)
        assert found.metrics["loss:sum"] == pytest.approx(loss.item(), rel=CLOSE)
        check_tensors(kept, state, "grads", {k: v.grad for k, v in reference.tensors().items()})
        optim_step(state, SMOOTH)
        optimizer.step()
        optimizer.zero_grad()
    check_tensors(kept, state, "params", dict(reference.tensors()))


def check_tensors(kept: Specimen, state: RunState, buffer: str, theirs: dict[Any, Any]) -> None:
    """Check that a buffer of a run equals PEFT's tensors."""
    ours = state.layout.weights(state.arena.views(buffer))
    assert {(name, side) for name in ours for side in "AB"} == set(theirs)
    for name, pair in ours.items():
        for side, tensor in zip("AB", pair, strict=True):
            expected = theirs[name, side].detach()
            bound = CLOSE * max(1.0, float(expected.abs().max()))
            assert float((tensor - expected).abs().max()) < bound, (kept.family, name, side)


def test_a_merged_model_gives_the_engine_s_logprobs(kept: Specimen, tmp_path: Path) -> None:
    state = kept.run()
    adapter = PeftAdapter.open(write_adapter(state, tmp_path / "adapter"))
    (tmp_path / "merged").mkdir()
    merge(BaseModel.open(kept.directory), adapter, "fp32", tmp_path / "merged")

    merged, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged",
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not any(report[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    check_close(base_logprobs(merged, DATA), scores(kept, state))


def test_samples_have_the_trainer_s_logprobs(kept: Specimen) -> None:
    model = kept.served
    used = helpers.adapter(model, kept.run())
    prompt = DATA[0].tokens
    spec = SampleSpec(prompt, 2, max_tokens=12, use_eos=False, prompt_logprobs=True, seed=1)
    output = helpers.sample(model, spec, used)
    assert output.prompt_logprobs is not None
    for sequence in output.sequences:
        tokens = np.concatenate([prompt, sequence.tokens])
        found = np.concatenate([output.prompt_logprobs[1:], sequence.logprobs])
        with torch.no_grad(), model.binding.bind(used.bind()):
            logits = model.logits(model.hidden(torch.from_numpy(tokens)[None]))
        expected = torch.log_softmax(logits[0], -1).numpy()[np.arange(len(tokens) - 1), tokens[1:]]
        np.testing.assert_allclose(found, expected, rtol=CLOSE, atol=CLOSE)


def test_a_run_restored_with_pending_gradients_goes_on_to_the_bit(kept: Specimen) -> None:
    state = kept.run()
    helpers.backward(kept.served, state, DATA)
    optim_step(state, SMOOTH)
    helpers.backward(kept.served, state, DATA[:2])
    contents, meta = helpers.files(state, optimizer=True)
    assert files.GRADIENTS in contents

    restored = kept.served.new_run(state.layout.config)
    restored.restore(contents, meta, optimizer=True)
    assert helpers.buffers(restored) == helpers.buffers(state)
    for each in (state, restored):
        helpers.backward(kept.served, each, DATA[2:])
        optim_step(each, SMOOTH)
    assert helpers.buffers(restored) == helpers.buffers(state)


def test_an_adapter_saved_by_peft_is_imported(kept: Specimen, tmp_path: Path) -> None:
    state = kept.run()
    reference = PeftReference(
        base_model(kept.directory), write_adapter(state, tmp_path / "adapter")
    )
    reference.model.save_pretrained(tmp_path / "saved", save_embedding_layers=False)

    vault = Vault(tmp_path / "vault", writer=True)
    draft = {
        "kind": "training",
        "run_id": "run",
        "name": "imported",
        "base_model": kept.family,
        "base_fingerprint": kept.served.info.fingerprint,
        "expires_at": None,
        "request_id": None,
        "optimizer": None,
        "position": 0,
    }
    command = ImportAdapter(kept.family, str(tmp_path / "saved"), 0, 5, None, draft)
    write_import(vault, kept.served, command, {})
    manifest = vault.manifest("training", "run", "imported")
    written = vault.read(manifest, files.ADAPTER)
    assert bytes(written) == helpers.files(state, optimizer=False)[0][files.ADAPTER]
