"""SDK program: the calls that every release of the official SDK has.

`sdks.Releases` runs `life` and `restore` with each release on the path. Releases differ in how a
result is awaited (`done`, `done_async`) and in the methods that create clients.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import io
import tarfile
import urllib.request
import warnings
from typing import Any

import tinker

from tests.scenario import MODEL, data

warnings.simplefilter("ignore")
ADAM = tinker.types.AdamParams(learning_rate=0.01, beta1=0.9, beta2=0.95, eps=1e-12)
PROMPT = [7, 14, 21, 28]


def done(returned: Any) -> Any:
    """Return a client or a response, whether the release returned it or a future of it."""
    return returned.result() if hasattr(returned, "result") else returned


async def done_async(returned: Any) -> Any:
    """Await a client or a response; some releases return an awaitable of a future."""
    while inspect.isawaitable(returned):
        returned = await returned
    return returned


def numbers(output: Any) -> list[float]:
    """Return a pass's loss, then its logprobs."""
    logprobs = [out["logprobs"].to_numpy().tolist() for out in output.loss_fn_outputs]
    return [output.metrics["loss:sum"], *(value for each in logprobs for value in each)]


def train(run: Any, steps: int, shift: int = 0) -> list[list[float]]:
    """Train some steps; returns the numbers of each pass."""
    seen = []
    for step in range(steps):
        future = run.forward_backward(data(tinker, shift=shift + step), "cross_entropy")
        run.optim_step(ADAM).result()
        seen.append(numbers(future.result()))
    return seen


async def train_async(run: Any, steps: int, shift: int = 0) -> list[list[float]]:
    """Train with the asynchronous methods."""
    seen = []
    for step in range(steps):
        datums = data(tinker, shift=shift + step)
        output = await done_async(run.forward_backward_async(datums, "cross_entropy"))
        await done_async(run.optim_step_async(ADAM))
        seen.append(numbers(output))
    return seen


class Session:
    """A service client and its REST client."""

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
        return await train_async(await done_async(create(path)), 2, shift=2)


def life(url: str) -> dict[str, Any]:
    """Train, save, restore in every way, sample, list and delete; report every number."""
    session = Session(url)
    run = done(session.service.create_lora_training_client(MODEL, rank=4, seed=3))
    first = train(run, 2)
    saved = run.save_state("mid").result().path
    sampler = run.save_weights_for_sampler("mid").result().path
    report: dict[str, Any] = {
        **_release(),
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
    report["loaded_warm"] = train(run, 2, shift=2)
    run.load_state(saved).result()
    report["loaded_cold"] = train(run, 2, shift=2)
    report["tokens"] = _tokens(session, run)
    report["lists"] = _lists(session, run.model_id, saved)
    return report


def _release() -> dict[str, str]:
    return {"version": tinker.__version__, "file": str(tinker.__file__)}


def _samples(session: Session, run: Any, path: str) -> dict[str, Any]:
    """Sample from a named and from an unnamed sampler, with the prompt's logprobs."""
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
    """Fetch files by the release's own calls; returns their hashes by name."""
    found: dict[str, Any] = {"archive": None, "external": None}
    if hasattr(session.rest, "get_checkpoint_archive_url_from_tinker_path"):
        answer = session.rest.get_checkpoint_archive_url_from_tinker_path(path).result()
        with tarfile.open(fileobj=io.BytesIO(_fetched(answer.url)), mode="r") as tar:
            files = {}
            for each in tar.getmembers():
                member = tar.extractfile(each)
                assert member is not None
                files[each.name] = member.read()
        found["archive"] = {name: _sha256(content) for name, content in files.items()}
    if hasattr(run, "save_weights_external"):
        external = run.save_weights_external("mid").result().path
        urls = session.rest.get_external_weights_urls(external).result().urls
        found["external"] = {name: _sha256(_fetched(url)) for name, url in urls.items()}
        found["external_path"] = external
    return found


def _fetched(url: str) -> bytes:
    with urllib.request.urlopen(url) as answer:
        content: bytes = answer.read()
        return content


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _tokens(session: Session, run: Any) -> list[list[int]]:
    """Encode a text with each tokenizer that the release loads."""
    sampler = done(session.service.create_sampling_client(base_model=MODEL))
    clients = [each for each in (run, sampler) if hasattr(each, "get_tokenizer")]
    return [each.get_tokenizer().encode("Every step") for each in clients]


def _passes(run: Any) -> dict[str, Any]:
    """Run passes that don't change the run: one of several chunks, one with a custom loss."""
    tokens = list(range(5))
    inputs: Any = {"target_tokens": tokens[1:], "weights": [1.0] * 4}
    datum = tinker.types.Datum(
        model_input=tinker.types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs=inputs,
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
    """List a run and its checkpoints, before and after one is deleted."""
    rest = session.rest
    info = rest.get_weights_info_by_tinker_path(path).result()
    runs = rest.list_training_runs(limit=100).result().training_runs
    users = rest.list_user_checkpoints(limit=1000).result().checkpoints
    last = rest.get_training_run(run_id).result().last_checkpoint
    assert last is not None
    found: dict[str, Any] = {
        "weights_info": [info.base_model, info.is_lora, info.lora_rank],
        "run_listed": run_id in [each.training_run_id for each in runs],
        "run": last.tinker_path,
        "checkpoints": session.listed(run_id),
        "user_checkpoints": [each.tinker_path for each in users],
        "sessions": len(rest.list_sessions().result().sessions),
    }
    rest.publish_checkpoint_from_tinker_path(path).result()
    rest.unpublish_checkpoint_from_tinker_path(path).result()
    sampler = path.replace("/weights/", "/sampler_weights/")
    rest.delete_checkpoint_from_tinker_path(sampler).result()
    found["left"] = session.listed(run_id)
    return found


def restore(url: str, paths: list[str], listed: str) -> dict[str, Any]:
    """Continue from checkpoints, with and without their optimizer; list another release's run."""
    session = Session(url)
    run = done(session.service.create_training_client_from_state(paths[0]))
    run.forward(data(tinker), "cross_entropy").result()
    users = session.rest.list_user_checkpoints(limit=1000).result().checkpoints
    return {
        **_release(),
        "continued": [[session.warm(path), session.cold(path)] for path in paths],
        "checkpoints": session.listed(listed),
        "user_checkpoints": [each.tinker_path for each in users],
    }
