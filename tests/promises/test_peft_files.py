"""Saved files are PEFT's: loaded by PEFT on the base model they give the service's logprobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import everstep
from everstep.vault import Vault
from everstep.vault.export import export
from everstep.wire.paths import parse_path
from tests.conftest import Service
from tests.scenario import MODEL, connect, data, train

pytestmark = pytest.mark.slow


def logprobs(module: Any, datum: Any) -> np.ndarray[Any, Any]:
    tokens = torch.tensor([datum.model_input.to_ints()])
    targets = torch.from_numpy(datum.loss_fn_inputs["target_tokens"].to_numpy()).unsqueeze(1)
    with torch.no_grad():
        rows = torch.log_softmax(module(tokens).logits[0].float(), -1)
    return rows.gather(1, targets)[:, 0].numpy()


def test_checkpoints_of_both_kinds_load_in_peft_with_the_same_logprobs(
    service: Service, tmp_path: Path
) -> None:
    client = connect(everstep, service.url)
    run = client.create_lora_training_client(MODEL, rank=4, seed=3).result()
    batch = data(everstep)
    base = run.forward(batch, "cross_entropy").result()
    train(everstep, run, 3)
    passed = run.forward(batch, "cross_entropy").result()
    expected = [each["logprobs"].to_numpy() for each in passed.loss_fn_outputs]
    assert np.abs(base.loss_fn_outputs[0]["logprobs"].to_numpy() - expected[0]).max() > 0.1
    vault = Vault(service.home / "vault", writer=False)
    for saved in (run.save_state("peft"), run.save_weights_for_sampler("peft")):
        at = parse_path(saved.result().path)
        files = tmp_path / at.kind
        export(vault, vault.manifest(at.kind, at.run_id, at.name), files)
        module = AutoModelForCausalLM.from_pretrained(service.home / "models" / MODEL)
        loaded = peft.PeftModel.from_pretrained(module, files)
        for datum, row in zip(batch, expected, strict=True):
            np.testing.assert_allclose(logprobs(loaded, datum), row, atol=1e-5)
