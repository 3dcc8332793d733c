"""Train twice from one seed; kill the service in the middle of a step of the second run.

Usage: python docs/recording/kill_midway.py
"""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import everstep
from everstep.vault import open_vault
from everstep.wire.paths import parse_path

MODEL, STEPS, KILLED_AT = "everstep/pico", 6, 4
TEXT = "What the service has acknowledged is never lost, and what it restores is exact to the bit."


def train(service: everstep.ServiceClient, home: Path, *, kill: bool) -> tuple[list[float], str]:
    """Train a new run; return the loss of each step and the BLAKE3 of the adapter's file."""
    client = service.create_lora_training_client(MODEL, rank=16, seed=7).result()
    tokens = client.get_tokenizer().encode(TEXT)
    datum = everstep.Datum(
        model_input=everstep.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
    )
    losses = []
    for step in range(1, STEPS + 1):
        passed = client.forward_backward([datum] * 64, "cross_entropy").result()
        losses.append(passed.metrics["loss:sum"] / (64 * (len(tokens) - 1)))
        if kill and step == KILLED_AT and service.local_pid is not None:
            # The gradients are in the memory of the process that dies here.
            print(f"$ kill -9 {service.local_pid}    # between backward and update", flush=True)
            os.kill(service.local_pid, signal.SIGKILL)
        client.optim_step(everstep.AdamParams(learning_rate=1e-3)).result()
        print(f"  step {step}  loss {losses[-1]!r}", flush=True)
    path = parse_path(client.save_state("end").result().path)
    manifest = open_vault(home, writer=False).manifest(path.kind, path.run_id, path.name)
    return losses, manifest.files["adapter_model.safetensors"].blake3


def main() -> None:
    """Run the comparison and print it."""
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        with everstep.ServiceClient(base_url="local", home=home, models=[MODEL]) as service:
            print("# uninterrupted", flush=True)
            first = train(service, home, kill=False)
            print("# killed", flush=True)
            second = train(service, home, kill=True)
    same = "equal to the last bit" if first == second else "DIFFERENT"
    print(f"adapter {first[1][:16]}…  uninterrupted")
    print(f"adapter {second[1][:16]}…  killed          losses and weights: {same}")
    if first != second:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
