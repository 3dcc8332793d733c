"""``everstep quickstart``: train on real text, save, restore, and compare bit for bit.

A, B, K and C are the same steps from one checkpoint: A on the client that saved it and just goes
on; B on a new client that restores it with the optimizer's state; K as B, but the service is killed
(SIGKILL) in the middle; C on one that restores the weights alone. B and K must be A in every bit,
and C must not.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from everstep import (
    ModelInput,
    SamplingClient,
    SamplingParams,
    ServiceClient,
    TinkerError,
    TrainingClient,
)
from everstep.cli.errors import Refused
from everstep.cli.models import learning_rate, served_model
from everstep.cli.output import printable
from everstep.cli.report import Comparison, Continuation, comparison_table, plot
from everstep.cli.training_loop import Batches, Meter, train
from everstep.cli.training_text import (
    STANDARD_LIBRARY,
    DataError,
    datums,
    first_prompt,
    read_examples,
)
from everstep.vault import Manifest, VaultError, open_vault
from everstep.wire.paths import parse_path

_CONTINUED_STEPS = 8
_RANK = 32
_BATCH = 16
_LONGEST = 256
_SEED = 1
_SAMPLE_TOKENS = 160
_SIGNATURE = "def read_lines(path, encoding=None):\n"


class QuickstartError(Exception):
    """What keeps the quickstart from going on."""


@dataclass(frozen=True)
class Setup:
    """What a quickstart works with.

    Attributes:
        console: where it says what it does.
        home: the service's home directory.
        model: name of the base model.
        steps: training steps before the checkpoint.
        batches: what each step trains on.
        learning_rate: of Adam.
    """

    console: Console
    home: Path
    model: str
    steps: int
    batches: Batches
    learning_rate: float

    def train(
        self,
        client: TrainingClient,
        first: int,
        count: int,
        label: str,
        sent: Callable[[int], None] = lambda step: None,
    ) -> list[float]:
        """Train some steps under a progress bar; returns the loss of each. See `train`."""
        with Meter(self.console, label, count) as meter:
            steps = range(first, first + count)
            return train(client, self.batches, steps, self.learning_rate, meter.show, sent)

    def manifest(self, path: str) -> Manifest:
        """The manifest of a checkpoint, from the vault."""
        at = parse_path(path)
        return open_vault(self.home, writer=False).manifest(at.kind, at.run_id, at.name)


def quickstart(data: Path | None, model: str, steps: int, home: Path) -> None:
    """Run the quickstart; see the command's help.

    Raises:
        typer.Exit: with code 1, after saying why, when something is not as promised.
    """
    console = Console(highlight=False, emoji=False)
    try:
        problems = _run(console, data, model, steps, home.expanduser().resolve())
    except (DataError, QuickstartError, Refused, TinkerError, VaultError) as error:
        Console(stderr=True, highlight=False, emoji=False).print(
            Text(f"everstep: {error}", style="red"), soft_wrap=True
        )
        raise typer.Exit(1) from error
    if problems:
        raise typer.Exit(1)


def _run(console: Console, data: Path | None, model: str, steps: int, home: Path) -> list[str]:
    examples = read_examples(data)
    name, spec = served_model(model)
    subject = data.name if data else STANDARD_LIBRARY
    console.print(f"[bold]Everstep quickstart[/]: {name} learns from {subject}")
    with console.status("starting the service: it loads torch and the model"):
        service = ServiceClient(base_url="local", home=home, models=[spec])
    console.print(f"a service runs at {service.base_url} and keeps everything in {home}")
    with service:
        client = service.create_lora_training_client(name, rank=_RANK, seed=_SEED).result()
        made = datums(examples, client.get_tokenizer(), _LONGEST)
        rate = learning_rate(name)
        setup = Setup(console, home, name, steps, Batches(made, _BATCH, _SEED), rate)
        console.print(
            f"{len(made)} examples of up to {_LONGEST} tokens, {setup.batches.size} a step; "
            f"LoRA of rank {_RANK}, Adam at {rate:g}"
        )
        losses = setup.train(client, 0, steps, "training")
        comparison = compare(setup, service, client)
        _tell(setup, comparison)
        prompt = first_prompt(examples, client.get_tokenizer()) if data else _SIGNATURE
        adapter = _sample_and_export(setup, service, client, prompt)
    picture = home / "quickstart" / "loss.png"
    plot(picture, losses, comparison, f"{name}, {subject}")
    for what, where in (
        ("the adapter, in PEFT's format", adapter),
        ("the loss, drawn", picture),
        ("to go on", f"everstep serve --home {home} --model {spec}"),
    ):
        console.print(f"{what + ':':<32}{where}", soft_wrap=True)
    return comparison.problems()


def compare(setup: Setup, service: ServiceClient, client: TrainingClient) -> Comparison:
    """Save a client's state, then make the same steps on it (A) and on three that restore it."""
    path = client.save_state("quickstart").result().path
    setup.console.print(f"saved {path}", soft_wrap=True)
    a = _continue(setup, client, "A  going on")
    with ServiceClient(base_url=service.base_url) as other:
        warm = other.create_training_client_from_state_with_optimizer(path).result()
        b = _continue(setup, warm, "B  restored with optimizer")
        killed = other.create_training_client_from_state_with_optimizer(path).result()
        k = _continue_killed(setup, service, killed, "K  restored, then killed")
        cold = other.create_training_client_from_state(path).result()
        c = _continue(setup, cold, "C  restored without")
    return Comparison(a, b, k, c)


def _continue_killed(
    setup: Setup, service: ServiceClient, client: TrainingClient, label: str
) -> Continuation:
    """Go on, and kill the service while it is at work on a step about two thirds of the way."""
    chosen = setup.steps + 2 * _CONTINUED_STEPS // 3
    before = service.local_pid

    def sent(step: int) -> None:
        if step == chosen and before is not None:
            os.kill(before, signal.SIGKILL)
        elif step == chosen + 1:  # the chosen step has its result
            if before is None or service.local_pid == before:
                raise QuickstartError("the service was to be killed and came to no harm")
            setup.console.print(
                f"killed the service (SIGKILL) at step {chosen + 1}; it came back and went on"
            )

    return _continue(setup, client, label, sent)


def _continue(
    setup: Setup,
    client: TrainingClient,
    label: str,
    sent: Callable[[int], None] = lambda step: None,
) -> Continuation:
    losses = setup.train(client, setup.steps, _CONTINUED_STEPS, label, sent)
    files = setup.manifest(client.save_state("quickstart-continued").result().path).files
    return Continuation(
        losses=tuple(losses),
        adapter=files["adapter_model.safetensors"].blake3,
        optimizer=files["optimizer.safetensors"].blake3,
    )


def _tell(setup: Setup, comparison: Comparison) -> None:
    """Print the table and what is to be seen in it."""
    console = setup.console
    console.print()
    console.print(comparison_table(comparison, setup.steps + 1, console.width))
    for problem in comparison.problems():
        console.print(Text(problem, style="bold red"))
    if comparison.exact:
        console.print(
            "[bold green]A = B[/]: every loss, the adapter (BLAKE3 of its file) and the optimizer "
            "state are equal bit for bit. Saving and restoring left no trace."
        )
    if comparison.survived:
        console.print(
            "[bold green]A = K[/]: equal bit for bit as well, though the service was killed in the "
            "middle. Nothing it had accepted was lost, and nothing was done twice."
        )
    if comparison.cold_differs:
        console.print(
            "[bold green]C ≠ A[/]: with the same weights but a fresh optimizer the first loss is "
            "the same, as it is measured before the first update; then the runs part."
        )


def _sample_and_export(
    setup: Setup, service: ServiceClient, client: TrainingClient, prompt: str
) -> Path:
    """Sample before and after training, and export the adapter that was sampled from.

    Returns:
        The directory with the adapter.
    """
    tokenizer = client.get_tokenizer()
    path = client.save_weights_for_sampler("quickstart").result().path
    tokens = tokenizer.encode(prompt)[-_LONGEST:]
    for title, sampler in (
        ("before training", service.create_sampling_client(base_model=setup.model)),
        ("after training", service.create_sampling_client(model_path=path)),
    ):
        text = tokenizer.decode(_sample(sampler.result(), tokens), skip_special_tokens=True)
        shown = Text.assemble((prompt, "bold"), printable(text))
        setup.console.print(Panel(shown, title=f"a sample, {title}", title_align="left"))
    directory = setup.home / "quickstart" / "adapter"
    open_vault(setup.home, writer=False).export(setup.manifest(path), directory)
    return directory


def _sample(sampler: SamplingClient, tokens: list[int]) -> list[int]:
    params = SamplingParams(max_tokens=_SAMPLE_TOKENS, temperature=0.7, seed=_SEED)
    response = sampler.sample(ModelInput.from_ints(tokens), 1, params).result()
    return list(response.sequences[0].tokens)
