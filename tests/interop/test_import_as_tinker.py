"""A script for the official SDK gives the same bits with `import everstep as tinker`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.conftest import Service

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SCRIPT = """
import asyncio
import tinker

service = tinker.ServiceClient(base_url=URL, api_key="tml-test")
training = service.create_lora_training_client(
    base_model="everstep/pico", rank=8, seed=11, train_unembed=False, user_metadata={"try": "1"}
)
if isinstance(training, tinker.APIFuture):
    training = training.result()
tokenizer = training.get_tokenizer()


def datum(text):
    tokens = tokenizer.encode(text)
    return tinker.types.Datum(
        model_input=tinker.types.ModelInput.from_ints(tokens=tokens[:-1]),
        loss_fn_inputs=dict(weights=[1.0] * (len(tokens) - 1), target_tokens=tokens[1:]),
    )


data = [datum(text) for text in ("Every step is kept.", "No step is lost.", "To the bit.")]
numbers = []
for step in range(3):
    passed = training.forward_backward(data, "cross_entropy")
    stepped = training.optim_step(tinker.AdamParams(learning_rate=1e-2, weight_decay=0.1))
    output = passed.result()
    numbers.append([output.metrics, stepped.result().metrics])
    numbers.append([row["logprobs"].tolist() for row in output.loss_fn_outputs])

saved = training.save_state(name="middle").result().path
sampler = training.save_weights_and_get_sampling_client()
if isinstance(sampler, tinker.APIFuture):
    sampler = sampler.result()
prompt = tinker.types.ModelInput.from_ints(tokens=tokenizer.encode("Every "))
params = tinker.types.SamplingParams(max_tokens=12, temperature=0.7, top_p=0.9, seed=5, stop=["."])
answer = sampler.sample(prompt=prompt, sampling_params=params, num_samples=3).result()
numbers.append([[s.tokens, s.logprobs, s.stop_reason] for s in answer.sequences])
numbers.append(sampler.compute_logprobs(prompt).result())


def margin(batch, logprobs):
    loss = -sum((row * row).sum() for row in logprobs)
    return loss, {"own:sum": float(loss.detach())}


reinforce = tinker.Datum(
    model_input=tinker.ModelInput.from_ints([7, 8, 9]),
    loss_fn_inputs={
        "target_tokens": [8, 9, 10],
        "logprobs": [-3.0, -2.0, -1.0],
        "advantages": [1.0, -0.5, 0.25],
    },
)
config = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}
numbers.append(training.forward_backward([reinforce], "ppo", config).result().metrics)
numbers.append(training.forward_backward_custom(data, margin).result().metrics)
training.optim_step(tinker.AdamParams(learning_rate=1e-3, grad_clip_norm=1.0)).result()
numbers.append(training.forward(data, "cross_entropy").result().metrics)


async def restore():
    found = []
    for restored in (
        await service.create_training_client_from_state_async(saved),
        await service.create_training_client_from_state_with_optimizer_async(saved),
    ):
        passed = await restored.forward_backward_async(data, "cross_entropy")
        stepped = await restored.optim_step_async(tinker.AdamParams(learning_rate=1e-2))
        found.append([(await passed).metrics, (await stepped).metrics])
        found.append((await restored.forward(data, "cross_entropy")).metrics)
    return found


numbers.append(asyncio.run(restore()))
try:
    training.load_state("tinker://nobody/weights/nothing").result()
except tinker.RequestFailedError as error:
    numbers.append([error.category, "nobody" in str(error)])
rest = service.create_rest_client()
info = rest.get_weights_info_by_tinker_path(saved).result()
numbers.append([info.base_model, info.lora_rank, info.train_unembed, info.train_mlp])
listed = rest.list_checkpoints(training.model_id).result().checkpoints
numbers.append([[c.checkpoint_id, c.checkpoint_type, c.size_bytes, c.public] for c in listed])
service.close("success").result()
"""


def run(text: str, url: str) -> list[Any]:
    scope: dict[str, Any] = {"URL": url, "__name__": "script"}
    exec(compile(text, "script.py", "exec"), scope)
    return list(scope["numbers"])


def test_script_for_the_official_sdk_gives_the_same_numbers_with_ours(service: Service) -> None:
    ours = SCRIPT.replace("import tinker\n", "import everstep as tinker\n")
    assert ours != SCRIPT
    theirs = run(SCRIPT, service.url)
    assert exact(run(ours, service.url)) == exact(theirs)


def exact(numbers: list[Any]) -> list[str]:
    """Return the numbers as JSON, which writes a float so that it reads back as the same bits."""
    assert len(numbers) == 15
    return [json.dumps(each, sort_keys=True) for each in numbers]
