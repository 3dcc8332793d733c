"""The cookbook's renderers and helpers, whose objects are the official SDK's, with our client."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import everstep
from tests.conftest import Service
from tests.interop import sdks
from tests.scenario import MODEL

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
TALK = [
    {"role": "user", "content": "Is every step kept?"},
    {"role": "assistant", "content": "To the bit."},
]


@pytest.fixture
def cookbook(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cookbook's directory, on the path."""
    directory = sdks.directory("cookbook")
    monkeypatch.syspath_prepend(str(directory))
    return directory


def test_cookbook_renders_for_our_client(service: Service, cookbook: Path) -> None:
    renderers: Any = import_module("tinker_cookbook.renderers")
    conversation_to_datum = import_module("tinker_cookbook.supervised.data").conversation_to_datum
    with everstep.ServiceClient(base_url=service.url, api_key="tml-test") as client:
        run = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
        renderer = renderers.get_renderer("role_colon", run.get_tokenizer())
        which = renderers.TrainOnWhat.ALL_ASSISTANT_MESSAGES
        datum: Any = conversation_to_datum(TALK, renderer, 256, which)
        assert type(datum).__module__.partition(".")[0] == "tinker"
        passed = run.forward_backward([datum], "cross_entropy").result()
        own = everstep.Datum(
            model_input=everstep.ModelInput.from_ints(datum.model_input.to_ints()),
            loss_fn_inputs={k: v.to_torch() for k, v in datum.loss_fn_inputs.items()},
        )
        assert run.forward([own], "cross_entropy").result().metrics == passed.metrics
        prompt = renderer.build_generation_prompt(TALK[:1])
        assert type(prompt).__module__.partition(".")[0] == "tinker"
        params = everstep.SamplingParams(max_tokens=8, seed=1, stop=renderer.get_stop_sequences())
        sampler = run.save_weights_and_get_sampling_client().result()
        (sequence,) = sampler.sample(prompt, 1, params).result().sequences
        assert 1 <= len(sequence.tokens) <= 8
        message, _ = renderer.parse_response(sequence.tokens)
        assert message["role"] == "assistant"
