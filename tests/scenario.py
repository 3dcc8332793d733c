"""A small training scenario for either client: both have the same surface."""

from __future__ import annotations

from typing import Any

import tinker

MODEL = "everstep/pico"
_OFFICIAL: dict[str, list[tinker.ServiceClient]] = {}
"""Official clients by the service that they are of."""


def data(sdk: Any, count: int = 3, shift: int = 0) -> list[Any]:
    """Datums of different lengths."""
    datums = []
    for index in range(count):
        tokens = [(7 * i + 11 * index + shift) % 250 for i in range(20 + 5 * index)]
        datums.append(
            sdk.types.Datum(
                model_input=sdk.types.ModelInput.from_ints(tokens[:-1]),
                loss_fn_inputs={
                    "target_tokens": tokens[1:],
                    "weights": [float(i % 3 > 0) for i in range(len(tokens) - 1)],
                },
            )
        )
    return datums


def train(sdk: Any, client: Any, steps: int, shift: int = 0) -> list[tuple[float, list[float]]]:
    """Steps of training; each one's loss and logprobs, as they came."""
    seen = []
    for step in range(steps):
        future = client.forward_backward(data(sdk, shift=shift + step), "cross_entropy")
        client.optim_step(sdk.types.AdamParams(learning_rate=0.01, weight_decay=0.1)).result()
        output = future.result()
        logprobs = [x for out in output.loss_fn_outputs for x in out["logprobs"].tolist()]
        seen.append((output.metrics["loss:sum"], logprobs))
    return seen


def connect(sdk: Any, url: str) -> Any:
    """A service client."""
    client = sdk.ServiceClient(base_url=url, api_key="tml-test")
    if sdk is tinker:
        _OFFICIAL.setdefault(url, []).append(client)
    return client


def disconnect(url: str) -> None:
    """End the background work of official clients whose service is gone: they complain for ever."""
    for client in _OFFICIAL.pop(url, []):
        holder = vars(client).get("_session_holder")  # asked for by its property it were made
        if holder is not None:
            holder.close()
