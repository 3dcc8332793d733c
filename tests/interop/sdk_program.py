"""One program for every release of the official SDK: the calls that all of them have.

    python sdk_program.py URL ACT ARGUMENTS

An act is a function below; its arguments and what it tells, the last line, are JSON. Where releases
differ, it is in how a result is waited for (`done`) and what a client is made by.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import io
import json
import sys
import tarfile
import urllib.request
import warnings
from typing import Any

import tinker

from tests.scenario import MODEL, data

warnings.simplefilter("ignore")
ADAM = tinker.types.AdamParams(learning_rate=0.01, beta1=0.9, beta2=0.95, eps=1e-12)
PROMPT = [7, 14, 21, 28]


def done(given: Any) -> Any:
    """A client or a response, whether the release returns it or a future of it."""
    return given.result() if hasattr(given, "result") else given


async def settled(given: Any) -> Any:
    """The same for asynchronous calls, which return a response, or a future in an awaitable."""
    while inspect.isawaitable(given):
        given = await given
    return given


def numbers(output: Any) -> list[float]:
    """A pass's loss and logprobs."""
    logprobs = [out["logprobs"].to_numpy().tolist() for out in output.loss_fn_outputs]
    return [output.metrics["loss:sum"], *(value for each in logprobs for value in each)]


def train(run: Any, steps: int, shift: int = 0) -> list[list[float]]:
    seen = []
    for step in range(steps):
        future = run.forward_backward(data(tinker, shift=shift + step), "cross_entropy")
        run.optim_step(ADAM).result()
        seen.append(numbers(future.result()))
    return seen


async def train_async(run: Any, steps: int, shift: int = 0) -> list[list[float]]:
    seen = []
    for step in range(steps):
        datums = data(tinker, shift=shift + step)
        output = await settled(run.forward_backward_async(datums, "cross_entropy"))
        await settled(run.optim_step_async(ADAM))
        seen.append(numbers(output))
    return seen


class Session:
    """A service client and a client of its lists."""

    def __init__(self, url: str) -> None:
        self.service = tinker.ServiceClient(base_url=url, api_key="tml-test")
        self.rest = self.service.create_rest_client()

    def listed(self, run_id: str) -> list[str]:
        return [
            each.tinker_path for each in self.rest.list_checkpoints(run_id).result().checkpoints
        ]

    def warm(self, path: str) -> list[list[float]]:
        create = self.service.create_training_client_from_state_with_optimizer
        return train(done(create(path)), 2, shift=2)

    def cold(self, path: str) -> list[list[float]]:
        return train(done(self.service.create_training_client_from_state(path)), 2, shift=2)

    async def warm_async(self, path: str) -> list[list[float]]:
        create = self.service.create_training_client_from_state_with_optimizer_async
        return await train_async(await settled(create(path)), 2, shift=2)


def life(url: str) -> dict[str, Any]:
    """Train, save, restore in every way, sample, list, delete."""
    session = Session(url)
    run = done(session.service.create_lora_training_client(MODEL, rank=4, seed=3))
    first = train(run, 2)
    saved = run.save_state("mid").result().path
    sampler = run.save_weights_for_sampler("mid").result().path
    told: dict[str, Any] = {
        "model_id": run.model_id,
        "model_name": run.get_info().model_data.model_name,
        "models": [
            each.model_name for each in session.service.get_server_capabilities().supported_models
        ],
        "path": saved,
        "sampler_path": sampler,
        "downloads": _downloads(session, run, sampler),
        "samples": _samples(session, run, sampler),
        "passes": _passes(run),
        "first": first,
        "uninterrupted": train(run, 2, shift=2),
        "warm": session.warm(saved),
        "warm_async": asyncio.run(session.warm_async(saved)),
        "cold": session.cold(saved),
    }
    run.load_state_with_optimizer(saved).result()
    told["loaded_warm"] = train(run, 2, shift=2)
    run.load_state(saved).result()
    told["loaded_cold"] = train(run, 2, shift=2)
    told["tokens"] = _tokens(session, run)
    told["lists"] = _lists(session, run.model_id, saved)
    return told


def _samples(session: Session, run: Any, path: str) -> dict[str, Any]:
    """The same draw from a named sampler and an unnamed one, and the prompt's logprobs."""
    prompt = tinker.types.ModelInput.from_ints(PROMPT)
    params = tinker.types.SamplingParams(max_tokens=8, seed=4, temperature=0.8)
    draws, scores = [], []
    for sampler in (
        done(session.service.create_sampling_client(model_path=path)),
        done(run.save_weights_and_get_sampling_client()),
    ):
        drawn = sampler.sample(prompt, 2, params).result().sequences
        draws.append([[each.tokens, each.logprobs] for each in drawn])
        scores.append(sampler.compute_logprobs(prompt).result())
    return {"draws": draws, "scores": scores}


def _downloads(session: Session, run: Any, path: str) -> dict[str, Any]:
    """The files that a release's own calls fetch, by their hashes."""
    told: dict[str, Any] = {"archive": None, "external": None}
    if hasattr(session.rest, "get_checkpoint_archive_url_from_tinker_path"):
        answer = session.rest.get_checkpoint_archive_url_from_tinker_path(path).result()
        with tarfile.open(fileobj=io.BytesIO(_fetched(answer.url)), mode="r") as tar:
            files = {each.name: tar.extractfile(each).read() for each in tar.getmembers()}
        told["archive"] = {name: _sha256(content) for name, content in files.items()}
    if hasattr(run, "save_weights_external"):
        external = run.save_weights_external("mid").result().path
        urls = session.rest.get_external_weights_urls(external).result().urls
        told["external"] = {name: _sha256(_fetched(url)) for name, url in urls.items()}
        told["external_path"] = external
    return told


def _fetched(url: str) -> bytes:
    with urllib.request.urlopen(url) as answer:
        return answer.read()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _tokens(session: Session, run: Any) -> list[list[int]]:
    """A text, by each tokenizer that a release loads."""
    sampler = done(session.service.create_sampling_client(base_model=MODEL))
    clients = [each for each in (run, sampler) if hasattr(each, "get_tokenizer")]
    return [each.get_tokenizer().encode("Every step") for each in clients]


def _passes(run: Any) -> dict[str, Any]:
    """Passes that leave the run as it is: in several chunks, and with a loss of one's own."""
    tokens = list(range(5))
    datum = tinker.types.Datum(
        model_input=tinker.types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * 4},
    )
    datums = [datum] * 1025
    output = run.forward(datums, "cross_entropy").result()
    one = run.forward(datums[:1], "cross_entropy").result()

    def nothing(_data: Any, logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        return sum(each.sum() for each in logprobs) * 0.0, {"seen": float(len(logprobs))}

    custom = run.forward_backward_custom(data(tinker), nothing).result()
    return {
        "many": len(output.loss_fn_outputs),
        "apart": abs(output.metrics["loss:sum"] / 1025 - one.metrics["loss:sum"]),
        "custom_seen": custom.metrics["seen"],
    }


def _lists(session: Session, run_id: str, path: str) -> dict[str, Any]:
    """What is listed of a run, before and after a checkpoint is deleted."""
    rest = session.rest
    info = rest.get_weights_info_by_tinker_path(path).result()
    runs = rest.list_training_runs(limit=100).result().training_runs
    users = rest.list_user_checkpoints(limit=1000).result().checkpoints
    told: dict[str, Any] = {
        "weights_info": [info.base_model, info.is_lora, info.lora_rank],
        "run_listed": run_id in [each.training_run_id for each in runs],
        "run": rest.get_training_run(run_id).result().last_checkpoint.tinker_path,
        "checkpoints": session.listed(run_id),
        "user_checkpoints": [each.tinker_path for each in users],
        "sessions": len(rest.list_sessions().result().sessions),
    }
    rest.publish_checkpoint_from_tinker_path(path).result()
    rest.unpublish_checkpoint_from_tinker_path(path).result()
    sampler = path.replace("/weights/", "/sampler_weights/")
    rest.delete_checkpoint_from_tinker_path(sampler).result()
    told["left"] = session.listed(run_id)
    return told


def restore(url: str, paths: list[str], listed: str) -> dict[str, Any]:
    """Go on from checkpoints, with and without their optimizer; list another's run."""
    session = Session(url)
    run = done(session.service.create_training_client_from_state(paths[0]))
    run.forward(data(tinker), "cross_entropy").result()
    users = session.rest.list_user_checkpoints(limit=1000).result().checkpoints
    return {
        "continued": [[session.warm(path), session.cold(path)] for path in paths],
        "checkpoints": session.listed(listed),
        "user_checkpoints": [each.tinker_path for each in users],
    }


if __name__ == "__main__":
    _, url, act, arguments = sys.argv
    told = {"life": life, "restore": restore}[act](url, **json.loads(arguments))
    print(json.dumps({"version": tinker.__version__, "file": tinker.__file__, **told}))
