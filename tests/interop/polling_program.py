"""Polling program: samples that are polled for together, drawn by pickled copies, and cancelled.

`sdks.Releases` runs `main` with a release of the official SDK on the path.
"""

from __future__ import annotations

import asyncio
import pickle
import warnings
from typing import Any

import tinker

warnings.simplefilter("ignore")


def tokens(response: Any) -> list[list[int]]:
    return [list(sequence.tokens) for sequence in response.sequences]


def client_of(returned: Any) -> Any:
    """Return a client; older releases return it directly, newer ones a future of it."""
    return returned.result() if hasattr(returned, "result") else returned


def main(url: str) -> dict[str, Any]:
    """Sample, and report which calls the client used and whether the draws agree."""
    service = tinker.ServiceClient(base_url=url, api_key="tml-test")
    sampler = client_of(service.create_sampling_client(base_model="everstep/pico"))
    prompt = tinker.ModelInput.from_ints([5, 6, 7, 8, 9])
    params = tinker.SamplingParams(max_tokens=6, seed=3, temperature=1.0)
    endless = tinker.SamplingParams(max_tokens=2000, seed=1, stop=[])
    first = tokens(sampler.sample(prompt, 2, params).result())
    copies = [pickle.loads(pickle.dumps(sampler)) for _ in range(2)]
    copied = [tokens(copy.sample(prompt, 2, params).result()) for copy in copies]

    async def cancel() -> None:
        pending = sampler.sample(prompt, 8, endless)
        future = pending.future() if hasattr(pending, "future") else pending
        long = asyncio.ensure_future(asyncio.wrap_future(future))
        await asyncio.to_thread(sampler.sample(prompt, 1, params).result)
        long.cancel()
        await asyncio.gather(long, return_exceptions=True)

    asyncio.run(cancel())
    after = tokens(sampler.sample(prompt, 2, params).result())
    return {
        "file": tinker.__file__,
        "polls": sampler._futures_poller is not None,
        "numbers": sorted(copy._cloned_sampler_id for copy in copies),
        "same": [first == each for each in (*copied, after)],
    }
