"""What ``everstep train`` does: data, the run, the loop, and how each ends."""

from __future__ import annotations

import hashlib
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
from everstep.cli import listing, output
from everstep.cli.errors import Refused, WrongUsage
from everstep.cli.filters import Filters
from everstep.cli.models import PICO, served_model
from everstep.cli.models import learning_rate as suitable_learning_rate
from everstep.cli.stopping import Wish, stop_wished
from everstep.cli.target import Service, Target
from everstep.cli.train_record import Record
from everstep.cli.training_loop import Epochs, Meter, train
from everstep.cli.training_text import Tokenizer, datums, read_examples
from everstep.client import _catalogue as catalogue
from everstep.client._futures import APIFuture
from everstep.wire.paths import CheckpointKind

_OF = "everstep_of"


@dataclass(frozen=True)
class Plan:
    """A run as it was asked for; see the command's options."""

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
    seed: int
    save_every: int
    keep_last: int
    keep_best: int
    ttl: int | None
    directory: Path

    def policy(self) -> CheckpointPolicy:
        """When to save, and what to keep."""
        return CheckpointPolicy(
            every_steps=self.save_every,
            keep_last=self.keep_last,
            keep_best=self.keep_best,
            metric="loss",
            ttl=self.ttl,
        )


class _Stopped(Exception):
    """The loop was asked to stop, and has finished its step."""


def run(target: Target, plan: Plan) -> None:
    """Train; see the command.

    Raises:
        Refused: there are checkpoints and nobody said ``--resume``, or they are of another run.
        DataError: there is nothing to train on.
    """
    try:
        catalogue.check_run_name(plan.name)
    except ValueError as error:
        raise WrongUsage(f"--name: {error}") from error
    examples = read_examples(plan.data)
    digest = hashlib.sha256(plan.data.read_bytes()).hexdigest()
    _, spec = served_model(plan.model or PICO)
    with target.service(create=True, models=(spec,)) as service:
        model, longest = _model(service, plan)
        rate = plan.learning_rate
        settings = {
            "data": digest,
            "batch_size": plan.batch_size,
            "learning_rate": suitable_learning_rate(model) if rate is None else rate,
            "max_length": longest,
            "seed": plan.seed,
        }
        _refuse_other(service, plan, settings)
        resumed = _resumed(service, plan, model)
        tokenizer: Tokenizer = resumed.client.get_tokenizer()
        data = Epochs(datums(examples, tokenizer, longest), plan.batch_size, plan.seed)
        with Record(plan.directory) as record:
            _Training(target, plan, service, resumed, data, settings, record).run()


def _model(service: Service, plan: Plan) -> tuple[str, int]:
    """The base model, as asked for or the only one that is served; and the longest example."""
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


def _refuse_other(service: Service, plan: Plan, settings: dict[str, Any]) -> None:
    """Raise `Refused` when a run would be begun twice, or go on otherwise than it began."""
    known = APIFuture.of(catalogue.find(service.rest, plan.name)).result()
    if known and not plan.resume:
        raise Refused(
            f"There are {output.counted(len(known), 'checkpoint')} of a run {plan.name!r}, at step "
            f"{known[-1].state.step} last. Go on with it by --resume, or choose another --name."
        )
    for each in known:
        before = each.state.user
        changed = [
            f"{name} was {before[name]} and is {now}"
            for name, now in settings.items()
            if before.get(name, now) != now
        ]
        if changed:
            raise _other(f"{each.path} is of a run with other settings: {'; '.join(changed)}")


def _resumed(service: Service, plan: Plan, model: str) -> Resumed:
    """The run, from its newest checkpoint or new; raises `Refused` for another model or rank."""
    try:
        return resume_or_create(
            service.client, plan.name, model, rank=plan.rank, seed=plan.seed
        ).result()
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise _other(str(error)) from error


def _other(found: str) -> Refused:
    return Refused(f"{found}. Go on with what it began with, or choose another --name.")


class _Training:
    """One run's loop.

    Args:
        target: says how to tell what came of it.
        plan: what was asked for.
        service: where it runs.
        resumed: the run, and where it goes on.
        data: what each step trains on.
        settings: kept with every checkpoint, to be compared on resumption.
        record: of the losses.
    """

    def __init__(
        self,
        target: Target,
        plan: Plan,
        service: Service,
        resumed: Resumed,
        data: Epochs,
        settings: dict[str, Any],
        record: Record,
    ) -> None:
        self._target = target
        self._plan = plan
        self._service = service
        self._resumed = resumed
        self._data = data
        self._settings = settings
        self._record = record
        self._total = plan.steps or plan.epochs * data.steps
        self._says = output.messages()
        self._wish = Wish()
        self._state = resumed.state
        self._loss: dict[str, float] = {}

    def run(self) -> None:
        """Train to the end, or until a stop is wished for; print what came of it."""
        report = self._resumed.report
        for skipped in report.skipped:
            self._says.print(f"passed over {skipped.path}: {skipped.reason}")
        self._says.print(self._told_begin())
        if self._state.step >= self._total:
            sampler = self._sampler_of(report.path) or self._save_sampler(report.path)
            self._tell("finished before", report.path, sampler)
            return
        with (
            stop_wished(self._told_wish) as self._wish,
            Checkpointer(self._resumed, self._plan.policy()) as saves,
            Recovery(self._service.client, self._resumed, saves) as recovery,
        ):
            try:
                recovery.run(lambda state: self._loop(state, saves))
            except _Stopped:
                path = saves.save(self._state, self._loss).result().path
                self._tell("stopped", path)
                raise typer.Exit(self._wish.exit_code) from None
            path = saves.finish(self._state, self._loss).result().path
        self._tell("finished", path, self._save_sampler(path))

    def _sampler_of(self, path: str | None) -> str | None:
        """The checkpoint to sample from that goes with one; None: it ended before it saved that."""
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
        self._record.begin(state.step)
        with Meter(self._says, self._plan.name, self._total, state.step) as meter:

            def seen(loss: float) -> None:
                self._advance(loss)
                meter.show(loss)
                saves.step(self._state, self._loss)
                if self._wish.signal is not None:
                    raise _Stopped

            rate = self._settings["learning_rate"]
            steps = range(state.step, self._total)
            train(self._resumed.client, self._data, steps, rate, seen)

    def _advance(self, loss: float) -> None:
        step = self._state.step + 1
        self._record.add(step, self._state.epoch, loss)
        epoch, position = self._data.place(step)
        self._state = LoopState(step, epoch, position, self._settings)
        self._loss = {"loss": loss}

    def _told_begin(self) -> str:
        report, state = self._resumed.report, self._state
        if report.path is None:
            return f"{self._plan.name}: a new run of {output.counted(self._total, 'step')}"
        return (
            f"{self._plan.name}: goes on at step {state.step} of {self._total}, epoch "
            f"{state.epoch}, position {state.position}, from {report.path}"
        )

    def _told_wish(self) -> None:
        self._says.print("finishing this step, then saving; once more to end at once")

    def _tell(self, how: str, path: str | None, sampler: str | None = None) -> None:
        """Draw the losses, and print what came of the run."""
        if any(self._record.lines()):
            self._record.draw(f"{self._plan.name}: {self._resumed.report.spec.base_model}")
        again = how == "stopped"
        if self._target.as_json:
            output.print_json(
                {
                    "state": how,
                    "name": self._plan.name,
                    "step": self._state.step,
                    "steps": self._total,
                    "tinker_path": path,
                    "sampler_path": sampler,
                    "resumed_from": self._resumed.report.path,
                    "losses": str(self._record.losses),
                    "picture": str(self._record.picture),
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
                ("losses", f"{self._record.losses}, drawn in {self._record.picture.name}"),
                ("to go on", "the same command with --resume" if again else None),
            ]
        )
