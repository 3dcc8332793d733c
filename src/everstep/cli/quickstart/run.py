"""The quickstart: train on real text, save, restore, and compare bit for bit.

A, B, K and C run the same steps from one checkpoint. A continues on the client that saved it. B
continues on a new client that restores it with the optimizer state. K is like B, but the service
is killed (SIGKILL) in the middle. C restores the weights alone. B and K must equal A in every bit,
and C must not.
"""

from __future__ import annotations

import os
import shlex
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
from everstep.cli.checkpoint.download import fetch
from everstep.cli.common.errors import Refused
from everstep.cli.common.models import learning_rate, served_model
from everstep.cli.common.output import printable
from everstep.cli.common.target import Service, Target
from everstep.cli.quickstart.report import Comparison, Continuation, comparison_table, plot
from everstep.cli.train.data import read_examples
from everstep.cli.train.examples import DataError
from everstep.cli.train.loop import Batches, Meter, train
from everstep.cli.train.prepare import Prompt, first_prompt, notes, prepare
from everstep.cli.train.stdlib import STANDARD_LIBRARY
from everstep.client._transport.tokenizer import load_tokenizer
from everstep.conversations import encode_prompt

_STEPS_AFTER = 8
_RANK = 32
_BATCH = 16
MAX_LENGTH = 256
_SEED = 1
_SAMPLE_TOKENS = 160
_SIGNATURE = "def read_lines(path, encoding=None):\n"


class QuickstartError(Exception):
    """The quickstart can't continue."""


@dataclass(frozen=True)
class Request:
    """What to train.

    Attributes:
        data: a file of training data, or None for docstrings of the standard library.
        model: the base model.
        steps: number of training steps before the checkpoint.
        max_dropped: largest share of the examples that may be dropped.
        ignore: fields of rows and messages to ignore.
    """

    data: Path | None
    model: str
    steps: int
    max_dropped: float
    ignore: tuple[str, ...]


@dataclass(frozen=True)
class Setup:
    """The settings of a quickstart.

    Attributes:
        console: where to report progress.
        service: the embedded service.
        home: its home directory.
        model: name of the base model.
        steps: number of training steps before the checkpoint.
        batches: the batch of each step.
        learning_rate: learning rate of Adam.
    """

    console: Console
    service: Service
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
        on_sent: Callable[[int], None] = lambda step: None,
    ) -> list[float]:
        """Train a number of steps with a progress bar. Returns the losses, as `train` does."""
        with Meter(self.console, label, count) as meter:
            steps = range(first, first + count)
            return train(client, self.batches, steps, self.learning_rate, meter.show, on_sent)

    def hashes(self, path: str) -> dict[str, str]:
        """Return the BLAKE3 hash of each file of a checkpoint."""
        details = self.service.details(path)
        return {} if details is None else {each.name: each.blake3 for each in details.files}


def run_quickstart(request: Request, home: Path) -> None:
    """Run the quickstart and print the comparison.

    Args:
        request: what to train.
        home: home of the embedded service.

    Raises:
        typer.Exit: with code 1, after printing the reason, if it fails or a promise is broken.
    """
    console = Console(highlight=False, emoji=False)
    try:
        problems = _run(console, request, home.expanduser().resolve())
    except (DataError, QuickstartError, Refused, TinkerError) as error:
        Console(stderr=True, highlight=False, emoji=False).print(
            Text(f"everstep: {error}", style="red"), soft_wrap=True
        )
        raise typer.Exit(1) from error
    if problems:
        raise typer.Exit(1)


def _run(console: Console, request: Request, home: Path) -> list[str]:
    data, steps = request.data, request.steps
    source = read_examples(data, request.ignore)
    name, spec = served_model(request.model)
    subject = data.name if data else STANDARD_LIBRARY
    console.print(Text.assemble(("Everstep quickstart", "bold"), f": {name} learns from {subject}"))
    with console.status("starting the service: it loads torch and the model"):
        service = ServiceClient(base_url="local", home=home, models=[spec])
    console.print(
        f"a service runs at {service.base_url} and stores everything in {home}", markup=False
    )
    with service:
        tokenizer = load_tokenizer(service.holder.http, name)
        prepared = prepare(source.examples, tokenizer, MAX_LENGTH)
        prepared.check_dropped(request.max_dropped)
        for note in (*notes(source, tokenizer), prepared.report()) if data else ():
            console.print(Text(note), soft_wrap=True)
        client = service.create_lora_training_client(name, rank=_RANK, seed=_SEED).result()
        rate = learning_rate(name)
        batches = Batches(prepared.datums, _BATCH, _SEED)
        running = Service(service, Target(service.base_url, None, home, False))
        setup = Setup(console, running, home, name, steps, batches, rate)
        console.print(
            f"{len(prepared.datums)} sequences of up to {MAX_LENGTH} tokens, {batches.size} a "
            f"step; LoRA of rank {_RANK}, Adam at {rate:g}"
        )
        losses = setup.train(client, 0, steps, "training")
        comparison = compare(setup, service, client)
        _report(setup, comparison)
        prompt = (
            first_prompt(source.examples, tokenizer)
            if data
            else Prompt(_SIGNATURE, encode_prompt(tokenizer, _SIGNATURE))
        )
        adapter = _sample_and_export(setup, service, client, prompt)
    picture = home / "quickstart" / "loss.png"
    plot(picture, losses, comparison, f"{name}, {subject}")
    for what, where in (
        ("the adapter, in PEFT's format", adapter),
        ("a plot of the loss", picture),
        ("to continue", shlex.join(["everstep", "serve", "--home", str(home), "--model", spec])),
    ):
        console.print(f"{what + ':':<32}{where}", soft_wrap=True, markup=False)
    return comparison.problems()


def compare(setup: Setup, service: ServiceClient, client: TrainingClient) -> Comparison:
    """Save a client's state, then run the same steps on it (A) and on three restored clients."""
    path = client.save_state("quickstart").result().path
    setup.console.print(f"saved {path}", soft_wrap=True, markup=False)
    a = _continue(setup, client, "A  continued")
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
    """Continue, and kill the service during a step two thirds of the way."""
    chosen = setup.steps + 2 * _STEPS_AFTER // 3
    before = service.local_pid

    def on_sent(step: int) -> None:
        if step == chosen and before is not None:
            os.kill(before, signal.SIGKILL)
        elif step == chosen + 1:  # the chosen step has its result
            if before is None or service.local_pid == before:
                raise QuickstartError("the service should have been killed, and still runs")
            setup.console.print(
                f"killed the service (SIGKILL) at step {chosen + 1}; it restarted and resumed"
            )

    return _continue(setup, client, label, on_sent)


def _continue(
    setup: Setup,
    client: TrainingClient,
    label: str,
    on_sent: Callable[[int], None] = lambda step: None,
) -> Continuation:
    losses = setup.train(client, setup.steps, _STEPS_AFTER, label, on_sent)
    hashes = setup.hashes(client.save_state("quickstart-continued").result().path)
    return Continuation(
        losses=tuple(losses),
        adapter=hashes["adapter_model.safetensors"],
        optimizer=hashes["optimizer.safetensors"],
    )


def _report(setup: Setup, comparison: Comparison) -> None:
    """Print the table and its conclusions."""
    console = setup.console
    console.print()
    console.print(comparison_table(comparison, setup.steps + 1, console.width))
    for problem in comparison.problems():
        console.print(Text(problem, style="bold red"))
    if comparison.exact:
        console.print(
            "[bold green]A = B[/]: every loss, the adapter (BLAKE3 of its file) and the optimizer "
            "state are equal bit for bit. Saving and restoring changed nothing."
        )
    if comparison.survived:
        console.print(
            "[bold green]A = K[/]: equal bit for bit as well, although the service was killed in "
            "the middle. Nothing that it had accepted was lost or applied twice."
        )
    if comparison.cold_differs:
        console.print(
            "[bold green]C ≠ A[/]: with the same weights but a fresh optimizer the first loss is "
            "equal, as it is measured before the first update. Then the runs differ."
        )


def _sample_and_export(
    setup: Setup, service: ServiceClient, client: TrainingClient, prompt: Prompt
) -> Path:
    """Sample before and after training, and download the adapter.

    Returns:
        The directory of the adapter.
    """
    tokenizer = client.get_tokenizer()
    path = client.save_weights_for_sampler("quickstart").result().path
    tokens = prompt.tokens[-MAX_LENGTH:]
    for title, sampler in (
        ("before training", service.create_sampling_client(base_model=setup.model)),
        ("after training", service.create_sampling_client(model_path=path)),
    ):
        text = tokenizer.decode(_sample(sampler.result(), tokens), skip_special_tokens=True)
        shown = Text.assemble((prompt.text, "bold"), printable(text))
        setup.console.print(Panel(shown, title=f"a sample, {title}", title_align="left"))
    directory = setup.home / "quickstart" / "adapter"
    known = setup.hashes(path)
    for file in fetch(setup.service, path, directory, quiet=True, force=True):
        if file.name not in known:
            file.unlink()  # the marker of a complete archive
    return directory


def _sample(sampler: SamplingClient, tokens: list[int]) -> list[int]:
    params = SamplingParams(max_tokens=_SAMPLE_TOKENS, temperature=0.7, seed=_SEED)
    response = sampler.sample(ModelInput.from_ints(tokens), 1, params).result()
    return list(response.sequences[0].tokens)
