"""A program of a user of the official SDK: samples polled for together, by copies, and given up.

Run as ``python polling_program.py URL``, with the release of the SDK that is on the path; prints
what it saw as a line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import sys
import warnings
from typing import Any

import tinker

warnings.simplefilter("ignore")


def tokens(response: Any) -> list[list[int]]:
    return [list(sequence.tokens) for sequence in response.sequences]


def client_of(given: Any) -> Any:
    """Older releases give the client itself, newer ones its future."""
    return given.result() if hasattr(given, "result") else given


def main(url: str) -> dict[str, Any]:
    service = tinker.ServiceClient(base_url=url, api_key="tml-test")
    sampler = client_of(service.create_sampling_client(base_model="everstep/pico"))
    prompt = tinker.ModelInput.from_ints([5, 6, 7, 8, 9])
    params = tinker.SamplingParams(max_tokens=6, seed=3, temperature=1.0)
    endless = tinker.SamplingParams(max_tokens=2000, seed=1, stop=[])
    first = tokens(sampler.sample(prompt, 2, params).result())
    copies = [pickle.loads(pickle.dumps(sampler)) for _ in range(2)]
    copied = [tokens(copy.sample(prompt, 2, params).result()) for copy in copies]

    async def give_up() -> None:
        given = sampler.sample(prompt, 8, endless)
        future = given.future() if hasattr(given, "future") else given
        long = asyncio.ensure_future(asyncio.wrap_future(future))
        await asyncio.to_thread(sampler.sample(prompt, 1, params).result)
        long.cancel()
        await asyncio.gather(long, return_exceptions=True)

    asyncio.run(give_up())
    after = tokens(sampler.sample(prompt, 2, params).result())
    return {
        "file": tinker.__file__,
        "polls": sampler._futures_poller is not None,
        "numbers": sorted(copy._cloned_sampler_id for copy in copies),
        "same": [first == each for each in (*copied, after)],
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
