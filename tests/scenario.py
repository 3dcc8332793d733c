"""Scenario: a small training run for Everstep's client and for the official one."""

from __future__ import annotations

from typing import Any

import tinker

MODEL = "everstep/pico"
_OFFICIAL: dict[str, list[tinker.ServiceClient]] = {}
"""Official clients by the URL of their service."""


def data(sdk: Any, count: int = 3, shift: int = 0) -> list[Any]:
    """Return datums of different lengths."""
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
    """Train some steps; returns each step's loss and logprobs."""
    seen = []
    for step in range(steps):
        future = client.forward_backward(data(sdk, shift=shift + step), "cross_entropy")
        client.optim_step(sdk.types.AdamParams(learning_rate=0.01, weight_decay=0.1)).result()
        output = future.result()
        logprobs = [x for out in output.loss_fn_outputs for x in out["logprobs"].tolist()]
        seen.append((output.metrics["loss:sum"], logprobs))
    return seen


def connect(sdk: Any, url: str) -> Any:
    """Return a service client; official ones are closed by `disconnect`."""
    client = sdk.ServiceClient(base_url=url, api_key="tml-test")
    if sdk is tinker:
        _OFFICIAL.setdefault(url, []).append(client)
    return client


def disconnect(url: str) -> None:
    """Close official clients whose service has ended: they would log errors for ever."""
    for client in _OFFICIAL.pop(url, []):
        holder = vars(client).get("_session_holder")  # reading the property would create it
        if holder is not None:
            holder.close()
