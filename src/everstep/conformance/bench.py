"""Bench: the runs, data, checkpoints, samplers and comparisons that checks use."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from pydantic import ValidationError

from everstep.conformance.numbers import (
    Difference,
    Point,
    Trace,
    difference,
    point_of_pass,
    point_of_sample,
)
from everstep.conformance.operations import Outcome, Pending
from everstep.conformance.runs import Run, Session, saved_path
from everstep.conformance.transport import Exchange
from everstep.conformance.verdicts import CheckError, NotSupported, PromiseBroken
from everstep.wire import types
from everstep.wire.messages.outputs import ForwardBackwardOutput, SampleResponse

LEARNING_RATE = 2e-3
_LENGTH = 9
_TOKENS = 40
_NOISE_FACTOR = 4.0
_PROMPT = [3, 14, 15, 9, 26, 5]


class Bench:
    """The service under test.

    Args:
        session: of the first key.
        model: the base model to train.
        stranger: a session of the second key. None if there is no second key.
    """

    def __init__(self, session: Session, model: str, stranger: Session | None = None) -> None:
        self.session = session
        self.model = model
        self.stranger = stranger

    # Runs

    def new_run(self) -> Run:
        """Create a run."""
        return self.session.create_run(self.model)

    def run_from(self, path: str, *, optimizer: bool = False) -> Run:
        """Create a run from a checkpoint. Raises `CheckError` if that fails."""
        outcome = self.session.create_from_state(path, optimizer=optimizer)
        return self.session.run_of(outcome, "Creating a run from a checkpoint")

    @cached_property
    def base(self) -> str:
        """A checkpoint of a run that was trained a little, from which many checks start."""
        run = self.new_run()
        self.train(run, 1, shift=30)
        return saved_path(run.save("base").outcome().require("Saving a checkpoint"))

    def from_base(self) -> Run:
        """Create a run from `base`, with a new optimizer."""
        return self.run_from(self.base)

    # Training

    def data(self, shift: int = 0, count: int = 1) -> list[types.Datum]:
        """Build short datums, which differ with the shift."""
        datums = []
        for index in range(count):
            length = _LENGTH + 2 * index
            tokens = [1 + (7 * i + 5 * index + 3 * shift) % _TOKENS for i in range(length)]
            datums.append(
                types.Datum.model_validate(
                    {
                        "model_input": types.ModelInput.from_ints(tokens[:-1]),
                        "loss_fn_inputs": {
                            "target_tokens": tokens[1:],
                            "weights": [1.0] * (length - 1),
                        },
                    }
                )
            )
        return datums

    def train(
        self, run: Run, steps: int, *, shift: int = 0, learning_rate: float = LEARNING_RATE
    ) -> list[Point]:
        """Train for some steps. The last point contains the logprobs of the final weights."""
        passes, updates = [], []
        for step in range(steps):
            passes.append(run.forward_backward(self.data(shift + step)))
            updates.append(run.optim_step(learning_rate))
        passes.append(run.forward(self.data(shift)))
        for update in updates:
            update.outcome().require("optim_step")
        return [self.point(each) for each in passes]

    def logprobs(self, run: Run) -> list[Point]:
        """Compute the logprobs of the run's current weights."""
        return [self.point(run.forward(self.data()))]

    def point(self, training_pass: Pending) -> Point:
        """Return the numbers of a training pass. Raises `CheckError` if it has none."""
        outcome = training_pass.outcome().require("A training pass")
        assert isinstance(outcome.output, ForwardBackwardOutput)
        try:
            point = point_of_pass(outcome.output)
        except KeyError:
            raise CheckError(
                "A training pass returned no logprobs", outcome.sent, outcome.came_back
            ) from None
        if not len(point.logprobs) or not np.isfinite(point.logprobs).all():
            raise CheckError(
                "A training pass returned logprobs that are not finite",
                outcome.sent,
                outcome.came_back,
            )
        return point

    # Samplers

    def sampler(self, path: str) -> Exchange:
        """Request a sampler on a checkpoint."""
        request = types.CreateSamplingSessionRequest(
            session_id=self.session.session_id,
            sampling_session_seq_id=self.session.next_sampler(),
            model_path=path,
        )
        return self.session.post("/create_sampling_session", request)

    def sampler_id(self, path: str) -> str:
        """Create a sampler. Raises `NotSupported` if the service has none, else `CheckError`."""
        answer = self.sampler(path)
        if answer.status in (405, 501):
            raise NotSupported("the service has no samplers")
        if not answer.ok:
            raise CheckError("No sampler could be created", answer.sent, answer.came_back)
        return str(answer.json().get("sampling_session_id"))

    def sample(self, sampler_id: str, seq_id: int) -> list[Point]:
        """Return the logprobs of a sampler."""
        for prompt_logprobs in (True, False):
            outcome = self._sample(sampler_id, 2 * seq_id + (not prompt_logprobs), prompt_logprobs)
            if outcome.ok or not prompt_logprobs:
                break
        outcome.require("Sampling")
        assert isinstance(outcome.output, SampleResponse)
        point = point_of_sample(outcome.output)
        if not len(point.logprobs):
            raise NotSupported("samples have no logprobs, so they can't be compared")
        return [point]

    def _sample(self, sampler_id: str, seq_id: int, prompt_logprobs: bool) -> Outcome:
        request = types.SampleRequest(
            prompt=types.ModelInput.from_ints(_PROMPT),
            sampling_params=types.SamplingParams(max_tokens=1, seed=1, temperature=1.0),
            sampling_session_id=sampler_id,
            seq_id=seq_id,
            prompt_logprobs=prompt_logprobs,
        )
        return self.session.submit("/asample", request, "sample").outcome()

    def sample_from(self, path: str) -> list[Point]:
        """Return the logprobs of a new sampler on a checkpoint."""
        return self.sample(self.sampler_id(path), 0)

    # Checkpoints

    def checkpoints(self, run: Run) -> dict[str, types.Checkpoint]:
        """List a run's checkpoints, by path."""
        answer = self.session.transport.send("GET", f"/training_runs/{run.model_id}/checkpoints")
        if not answer.ok:
            raise CheckError("A run's checkpoints can't be listed", answer.sent, answer.came_back)
        try:
            found = types.CheckpointsListResponse.model_validate(answer.json())
        except ValidationError as error:
            text = f"A list of checkpoints can't be read: {error.errors()[0]['msg']}"
            raise CheckError(text, answer.sent, answer.came_back) from error
        return {checkpoint.tinker_path: checkpoint for checkpoint in found.checkpoints}

    def delete(self, run: Run, checkpoint_id: str) -> Exchange:
        """Request a checkpoint's deletion."""
        path = f"/training_runs/{run.model_id}/checkpoints/{checkpoint_id}"
        return self.session.transport.send("DELETE", path)

    def info(self, path: str) -> Exchange:
        """Request a checkpoint's ``weights_info``."""
        return self.session.post("/weights_info", types.WeightsInfoRequest(tinker_path=path))

    # Comparisons

    @cached_property
    def noise(self) -> float:
        """The largest difference between the logprobs of two equal runs, 0 if identical."""
        try:
            one, other = (self.train(self.from_base(), 2) for _ in range(2))
        except CheckError:
            return 0.0
        return difference(one, other).largest

    @property
    def tolerance(self) -> float:
        """The largest difference that counts as equal: 0 for a service that reproduces its bits."""
        return _NOISE_FACTOR * self.noise

    def same(self, a: Trace, b: Trace) -> bool:
        """Return whether two traces are equal, within the service's own noise."""
        return self._within_noise(difference(a, b))

    def must_equal(self, got: Trace, wanted: Trace, promise: str, sent: str = "") -> None:
        """Raise `PromiseBroken` if two traces differ by more than the service's own noise."""
        apart = difference(got, wanted)
        if not self._within_noise(apart):
            raise PromiseBroken(promise, sent, self.describe(apart))

    def must_differ(self, got: Trace, other: Trace, promise: str, sent: str = "") -> None:
        """Raise `PromiseBroken` if two traces are equal, `NotSupported` if noise hides it."""
        apart = difference(got, other)
        if self._within_noise(apart):
            if apart.count:
                raise NotSupported(
                    f"hidden by the service's own noise: {apart}, and two equal runs differ by "
                    "as much"
                )
            raise PromiseBroken(promise, sent, self.describe(apart))

    def _within_noise(self, apart: Difference) -> bool:
        return apart.count == 0 or apart.within(self.tolerance)

    def describe(self, apart: Difference) -> str:
        """Describe a difference, with the service's noise if it has any."""
        if not self.noise:
            return str(apart)
        return f"{apart} (two equal runs of this service differ by up to {self.noise:.3g})"
