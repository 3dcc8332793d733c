"""Cycle: one round of everything that a run can do, whose numbers don't depend on interruptions."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection
from typing import Any

import httpx
import pyrage

from tests.faults.keeper import GIVE_UP_SECONDS, Keeper
from tests.scenario import MODEL, connect, data

TRACING = threading.Lock()
"""Held while a loss is traced: torch.fx can't trace in two threads at once.

Both clients trace in the thread that calls them, and the official one doesn't lock.
"""

SAMPLED = 6
LARGE = 32
"""Datums of a pass that is so large that the payload log keeps it."""
IDENTITY = pyrage.x25519.Identity.generate()
RECIPIENT = str(IDENTITY.to_public())


class Setbacks:
    """Setbacks: kills a service's worker each time its clients have made progress.

    Without progress in between, runs would back off longer each time and recover nothing.

    Args:
        keeper: keeps the service.
        loopers: the service's clients.
    """

    def __init__(self, keeper: Keeper, loopers: Collection[Looper]) -> None:
        self._keeper = keeper
        self._loopers = loopers
        self._before: list[tuple[int, int]] = []

    def next(self) -> None:
        """Kill the worker if a client has made progress since the last kill."""
        now = [looper.progress for looper in self._loopers]
        if now != self._before and self._keeper.ready():
            self._keeper.kill_worker()
            self._before = now


class Looper:
    """A client with one run that repeats the same round.

    Args:
        sdk: ``everstep`` or ``tinker``.
        url: the service.
        seed: seed of the run's adapter.
    """

    def __init__(self, sdk: Any, url: str, seed: int) -> None:
        self.sdk = sdk
        self.url = url
        self.service = connect(sdk, url)
        self.run = self.service.create_lora_training_client(MODEL, rank=4, seed=seed).result()
        self.rest = self.service.create_rest_client()
        self.rounds = 0
        self._seen: list[Any] = []
        self.copies: list[str] = []

    @property
    def progress(self) -> tuple[int, int]:
        """The number of rounds, and of results in this one: changes with every result."""
        return self.rounds, len(self._seen)

    def round(self) -> list[Any]:
        """Train, save, sample, load, publish, copy and delete; returns all results."""
        sdk, run, number = self.sdk, self.run, self.rounds
        self.rounds += 1
        seen = self._seen = []
        steps = [self._step(number * 3 + step) for step in range(2)]
        saved = run.save_state(f"s{number}")
        for_sampling = run.save_weights_for_sampler("sampled" if number == 0 else f"w{number}")
        external = [
            run.save_weights_external(f"plain{number}"),
            run.save_weights_external(f"sealed{number}", age_encryption_recipients=[RECIPIENT]),
        ]
        pending = run.forward_backward(data(sdk, LARGE, number * 3 + 2), "cross_entropy")
        for passed, stepped in steps:
            seen += [_numbers(passed.result()), stepped.result().metrics]
        path = saved.result().path
        seen += [future.result().path.rsplit("/", 1)[-1] for future in external]
        sampler = self.service.create_sampling_client(
            model_path=for_sampling.result().path
        ).result()
        seen.append(self._with_custom_loss(number))
        prompt = sdk.types.ModelInput.from_ints([5, 6, 7])
        params = sdk.types.SamplingParams(max_tokens=SAMPLED, seed=number, temperature=1.0)
        sampled = sampler.sample(prompt, 2, params).result()
        seen += [(list(s.tokens), list(s.logprobs or [])) for s in sampled.sequences]
        seen.append(self._cancel_sample(sampler, number))
        seen.append(_numbers(pending.result()))
        run.load_state_with_optimizer(path).result()
        seen += [_numbers(future.result()) for future in self._step(number * 3 + 2)[:1]]
        self._manage(path, number)
        return seen

    def _cancel_sample(self, sampler: Any, number: int) -> str:
        """Cancel an accepted sample; returns the error that its future resolves to."""
        sampler_id = vars(sampler).get("_sampling_session_id") or sampler.sampling_session_id
        body = {
            "sampling_session_id": sampler_id,
            "seq_id": 999_000_000_000 + number,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]},
            "sampling_params": {"max_tokens": 2000, "stop": []},
        }
        sample = {"request_id": self._post("asample", body).json()["request_id"]}
        self._post("cancel_future", sample)
        return str(self._post("retrieve_future", sample).json()["error"])

    def _post(self, route: str, body: Any) -> httpx.Response:
        """Send a request until the service answers it, for a bounded time."""
        until = time.monotonic() + GIVE_UP_SECONDS
        while True:
            assert time.monotonic() < until, f"{route} was not answered in {GIVE_UP_SECONDS:g} s"
            try:
                answer = httpx.post(f"{self.url}/api/v1/{route}", json=body, timeout=60)
            except httpx.TransportError:
                pass
            else:
                if answer.status_code < 400:
                    return answer
                assert answer.status_code in (408, 503), answer.text
            time.sleep(0.05)  # another process answers: there is no event to wait for

    def _manage(self, path: str, number: int) -> None:
        """Publish and copy the newest checkpoint, set its expiry, and delete the previous one."""
        self.rest.publish_checkpoint_from_tinker_path(path).result()
        ttl = 3600 * (number + 1)
        self.rest.set_checkpoint_ttl_from_tinker_path(path, ttl).result()
        self.copies.append(self.rest.copy_weights(path, "copies").result())
        listed = {each.tinker_path: each for each in self.checkpoints()}[path]
        assert listed.public
        assert listed.expires_at is not None
        if number > 0:
            name = f"{self.run.model_id}/weights/s{number - 1}"
            self.rest.delete_checkpoint_from_tinker_path(f"tinker://{name}").result()

    def _with_custom_loss(self, number: int) -> Any:
        """Run a pass with a custom loss on the service; the next step applies its gradients."""
        scale = 1.0 + number

        def custom(logprobs: Any, weights: Any) -> Any:
            loss = -((logprobs.exp() + scale) * weights).sum()
            return loss, {"custom/weights:mean": weights.mean()}

        ranks: Any = {"logprobs": 1, "weights": 1}
        with TRACING:
            traced = self.service.create_custom_loss(custom, ranks)
        loss = traced.result()
        assert loss.loss_id is not None
        output = self.run.forward_backward_custom(data(self.sdk, 2, number), loss).result()
        return _numbers(output), output.metrics["custom/weights:mean"]

    def listed(self) -> list[str]:
        """Return the paths of the run's checkpoints and of their copies."""
        copied = [
            checkpoint.tinker_path
            for path in self.copies
            for checkpoint in self.checkpoints(path.split("/")[2])
        ]
        assert copied == self.copies, "each exists once"
        return [checkpoint.tinker_path for checkpoint in self.checkpoints()] + copied

    def checkpoints(self, run_id: str | None = None) -> list[Any]:
        """Return the checkpoints of a run; of this one if it is None."""
        found = self.rest.list_checkpoints(run_id or self.run.model_id).result()
        return list(found.checkpoints)

    def close(self) -> None:
        """End the session."""
        self.service.close("success").result()

    def _step(self, shift: int) -> list[Any]:
        params = self.sdk.types.AdamParams(learning_rate=0.01, weight_decay=0.1)
        passed = self.run.forward_backward(data(self.sdk, 2, shift), "cross_entropy")
        return [passed, self.run.optim_step(params)]


def _numbers(output: Any) -> tuple[float, list[float]]:
    logprobs = [x for out in output.loss_fn_outputs for x in out["logprobs"].tolist()]
    return output.metrics["loss:sum"], logprobs


def uninterrupted(sdk: Any, url: str, seed: int, rounds: int) -> list[list[Any]]:
    """Return what rounds give on a service that isn't interrupted."""
    looper = Looper(sdk, url, seed)
    seen = [looper.round() for _ in range(rounds)]
    looper.close()
    return seen
