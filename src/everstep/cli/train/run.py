"""A supervised run: its data, its checkpoints, its loop and its end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from everstep import (
    Checkpointer,
    CheckpointPolicy,
    LoopState,
    Recovery,
    Resumed,
    resume_or_create,
)
from everstep.cli.common import listing, output
from everstep.cli.common.errors import Refused, WrongUsage
from everstep.cli.common.filters import Filters
from everstep.cli.common.models import PICO, served_model
from everstep.cli.common.models import learning_rate as suitable_learning_rate
from everstep.cli.common.target import Service, Target
from everstep.cli.train.data import Source, read_examples
from everstep.cli.train.interrupt import StopRequest, stop_requested
from everstep.cli.train.loop import Epochs, Meter, train
from everstep.cli.train.loss_log import LossLog
from everstep.cli.train.prepare import Prepared, notes, prepare
from everstep.client._transport.futures import APIFuture
from everstep.client._transport.tokenizer import load_tokenizer
from everstep.conversations import Tokenizer
from everstep.loops import catalog
from everstep.wire.paths import CheckpointKind

_OF = "everstep_of"


@dataclass(frozen=True)
class Plan:
    """The options of a run, as those of the command."""

    data: Path
    name: str
    model: str | None
    resume: bool
    epochs: int
    steps: int | None
    batch_size: int
    learning_rate: float | None
    rank: int
    max_length: int
    max_dropped: float
    ignore: tuple[str, ...]
    seed: int
    save_every: int
    keep_last: int
    keep_best: int
    ttl: int | None
    directory: Path

    def policy(self) -> CheckpointPolicy:
        """Return the policy of saves and retention."""
        return CheckpointPolicy(
            every_steps=self.save_every,
            keep_last=self.keep_last,
            keep_best=self.keep_best,
            metric="loss",
            ttl=self.ttl,
        )


class _Stopped(Exception):
    """A stop was requested, and the current step is finished."""


def run(target: Target, plan: Plan) -> None:
    """Train to the end or until a signal, and print the result.

    Args:
        target: the service. One that is started for this command serves the base model.
        plan: the options of the run.

    Raises:
        WrongUsage: the name is malformed, or the base model is ambiguous.
        Refused: checkpoints exist and ``resume`` is not set, or they are of other settings.
        DataError: there is nothing to train on.
        typer.Exit: with the code of the signal that stopped the run.
    """
    try:
        catalog.check_run_name(plan.name)
    except ValueError as error:
        raise WrongUsage(f"--name: {error}") from error
    source = read_examples(plan.data, plan.ignore)
    _, spec = served_model(plan.model or PICO)
    with target.service(create=True, models=(spec,)) as service:
        model, max_length = _model(service, plan)
        rate = plan.learning_rate
        settings = {
            "data": source.digest,
            "batch_size": plan.batch_size,
            "learning_rate": suitable_learning_rate(model) if rate is None else rate,
            "max_length": max_length,
            "seed": plan.seed,
        }
        _check_settings(service, plan, settings)
        # The tokenizer of another service than Everstep is known with the run only.
        prepared = None
        if service.everstep is not None:
            tokenizer = load_tokenizer(service.client.holder.http, model)
            prepared = _prepare(plan, source, tokenizer, max_length)
        resumed = _resume(service, plan, model)
        if prepared is None:
            prepared = _prepare(plan, source, resumed.client.get_tokenizer(), max_length)
        with LossLog(plan.directory) as log:
            _Training(target, plan, service, resumed, prepared, settings, log).run()


def _prepare(plan: Plan, source: Source, tokenizer: Tokenizer, max_length: int) -> Prepared:
    """Turn the examples into datums, and print what is trained on and what is not."""
    messages = output.messages()
    if max_length < plan.max_length:
        messages.print(f"{plan.name}: --max-length is {max_length}, the context of the model")
    prepared = prepare(source.examples, tokenizer, max_length)
    for note in notes(source, tokenizer):
        messages.print(f"{plan.name}: {note}")
    prepared.check_dropped(plan.max_dropped)
    messages.print(f"{plan.name}: {prepared.report()}")
    return prepared


def _model(service: Service, plan: Plan) -> tuple[str, int]:
    """Return the chosen or only base model, and the maximum length of an example."""
    served = service.rest.get_server_capabilities().result().supported_models
    wanted = None if plan.model is None else served_model(plan.model)[0]
    known = {each.model_name: each.max_context_length for each in served if each.model_name}
    found = [name for name in known if wanted in (None, name)]
    if len(found) == 1:
        return found[0], min(plan.max_length, known[found[0]] or plan.max_length)
    names = ", ".join(known) or "none"
    if wanted is None:
        raise WrongUsage(f"{service.url} serves several models: choose one with --model: {names}")
    raise Refused(f"{service.url} does not serve {wanted}; it serves {names}.")


def _check_settings(service: Service, plan: Plan, settings: dict[str, Any]) -> None:
    """Raise `Refused` if a run would begin twice, or resume with other settings."""
    known = APIFuture.of(catalog.find(service.rest, plan.name)).result()
    if known and not plan.resume:
        raise Refused(
            f"There are {output.counted(len(known), 'checkpoint')} of a run {plan.name!r}, the "
            f"last at step {known[-1].state.step}. Give --resume to continue it, or choose another "
            "--name."
        )
    for each in known:
        before = each.state.user
        changed = [
            f"{name} was {before[name]} and is {now}"
            for name, now in settings.items()
            if before.get(name, now) != now
        ]
        if changed:
            raise _mismatch(f"{each.path} is of a run with other settings: {'; '.join(changed)}")


def _resume(service: Service, plan: Plan, model: str) -> Resumed:
    """Resume or create the run. Raises `Refused` for another model or rank."""
    try:
        return resume_or_create(
            service.client, plan.name, model, rank=plan.rank, seed=plan.seed
        ).result()
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise _mismatch(str(error)) from error


def _mismatch(found: str) -> Refused:
    return Refused(f"{found}. Resume with the original settings, or choose another --name.")


class _Training:
    """The loop of one run.

    Args:
        target: chooses the format of the output.
        plan: the options of the run.
        service: the service.
        resumed: the run, and the state from which it continues.
        prepared: the data.
        settings: saved with every checkpoint, and compared on resumption.
        log: the log of the losses.
    """

    def __init__(
        self,
        target: Target,
        plan: Plan,
        service: Service,
        resumed: Resumed,
        prepared: Prepared,
        settings: dict[str, Any],
        log: LossLog,
    ) -> None:
        self._target = target
        self._plan = plan
        self._service = service
        self._resumed = resumed
        self._prepared = prepared
        self._data = Epochs(prepared.datums, plan.batch_size, plan.seed)
        self._settings = settings
        self._log = log
        self._total = plan.steps or plan.epochs * self._data.steps
        self._messages = output.messages()
        self._stop = StopRequest()
        self._state = resumed.state
        self._loss: dict[str, float] = {}

    def run(self) -> None:
        """Train to the end or until a stop is requested, and print the result."""
        report = self._resumed.report
        for skipped in report.skipped:
            self._messages.print(f"skipped {skipped.path}: {skipped.reason}")
        self._messages.print(self._begin_text())
        if self._state.step >= self._total:
            sampler = self._sampler_of(report.path) or self._save_sampler(report.path)
            self._report("finished before", report.path, sampler)
            return
        with (
            stop_requested(self._acknowledge) as self._stop,
            Checkpointer(self._resumed, self._plan.policy()) as saves,
            Recovery(self._service.client, self._resumed, saves) as recovery,
        ):
            try:
                recovery.run(lambda state: self._loop(state, saves))
            except _Stopped:
                path = saves.save(self._state, self._loss).result().path
                self._report("stopped", path)
                raise typer.Exit(self._stop.exit_code) from None
            path = saves.finish(self._state, self._loss).result().path
        self._report("finished", path, self._save_sampler(path))

    def _sampler_of(self, path: str | None) -> str | None:
        """Return the sampler checkpoint of a training checkpoint, or None if it was not saved."""
        filters = Filters(kind=CheckpointKind.SAMPLER, name=self._plan.name)
        saved = listing.checkpoints(self._service.rest, filters)
        paths = (each.tinker_path for each in saved if (each.user_metadata or {}).get(_OF) == path)
        return next(paths, None)

    def _save_sampler(self, path: str | None) -> str:
        name, metadata = self._plan.name, {_OF: str(path)}
        saved = self._resumed.client.save_weights_for_sampler(name, user_metadata=metadata)
        return saved.result().path

    def _loop(self, state: LoopState, saves: Checkpointer) -> None:
        self._state = state
        self._log.begin(state.step)
        with Meter(self._messages, self._plan.name, self._total, state.step) as meter:

            def on_loss(loss: float) -> None:
                self._advance(loss)
                meter.show(loss)
                saves.step(self._state, self._loss)
                if self._stop.signal is not None:
                    raise _Stopped

            rate = self._settings["learning_rate"]
            steps = range(state.step, self._total)
            train(self._resumed.client, self._data, steps, rate, on_loss)

    def _advance(self, loss: float) -> None:
        step = self._state.step + 1
        self._log.add(step, self._state.epoch, loss)
        epoch, position = self._data.position(step)
        self._state = LoopState(step, epoch, position, self._settings)
        self._loss = {"loss": loss}

    def _begin_text(self) -> str:
        report, state = self._resumed.report, self._state
        if report.path is None:
            return f"{self._plan.name}: a new run of {output.counted(self._total, 'step')}"
        return (
            f"{self._plan.name}: resumes at step {state.step} of {self._total}, epoch "
            f"{state.epoch}, position {state.position}, from {report.path}"
        )

    def _acknowledge(self) -> None:
        self._messages.print("finishing this step, then saving; repeat the signal to stop at once")

    def _report(self, how: str, path: str | None, sampler: str | None = None) -> None:
        """Plot the losses and print the result of the run."""
        if any(self._log.lines()):
            self._log.draw(f"{self._plan.name}: {self._resumed.report.spec.base_model}")
        if self._target.as_json:
            output.print_json(
                {
                    "state": how,
                    "name": self._plan.name,
                    "step": self._state.step,
                    "steps": self._total,
                    "examples": self._prepared.counts(),
                    "tinker_path": path,
                    "sampler_path": sampler,
                    "resumed_from": self._resumed.report.path,
                    "losses": str(self._log.losses),
                    "picture": str(self._log.picture),
                    **self._loss,
                }
            )
            return
        loss = self._loss.get("loss")
        output.print_facts(
            [
                (how, f"at step {self._state.step} of {self._total}"),
                ("loss", None if loss is None else f"{loss:.4f} nats a token"),
                ("checkpoint", path),
                ("to sample", sampler and f"everstep sample PROMPT --from {sampler}"),
                ("losses", f"{self._log.losses}, plotted in {self._log.picture.name}"),
                ("to resume", "the same command with --resume" if how == "stopped" else None),
            ]
        )
