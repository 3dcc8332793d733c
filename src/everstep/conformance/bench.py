"""What checks work with: runs, tiny data, checkpoints, samplers, and comparisons."""

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
from everstep.conformance.verdicts import Broken, NotSupported, Stuck
from everstep.wire import types
from everstep.wire.outputs import ForwardBackwardOutput, SampleResponse

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
        stranger: opens a session of the second key; None where there is no second key.
    """

    def __init__(self, session: Session, model: str, stranger: Session | None = None) -> None:
        self.session = session
        self.model = model
        self.stranger = stranger

    # Runs

    def new_run(self) -> Run:
        """A new run."""
        return self.session.create_run(self.model)

    def run_from(self, path: str, *, optimizer: bool = False) -> Run:
        """A new run from a checkpoint; raises `Stuck` when that does not work."""
        outcome = self.session.create_from_state(path, optimizer=optimizer)
        return self.session.run_of(outcome, "Creating a run from a checkpoint")

    @cached_property
    def base(self) -> str:
        """A checkpoint of a run that was trained a little: where many checks begin."""
        run = self.new_run()
        self.train(run, 1, shift=30)
        return saved_path(run.save("base").outcome().needed("Saving a checkpoint"))

    def from_base(self) -> Run:
        """A new run from `base`, with a fresh optimizer."""
        return self.run_from(self.base)

    # Training

    def data(self, shift: int = 0, count: int = 1) -> list[types.Datum]:
        """Short datums; others with another shift."""
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
        """Steps of training, and a last look at the weights that came of them."""
        passes, updates = [], []
        for step in range(steps):
            passes.append(run.forward_backward(self.data(shift + step)))
            updates.append(run.optim_step(learning_rate))
        passes.append(run.forward(self.data(shift)))
        for update in updates:
            update.outcome().needed("optim_step")
        return [self.point(each) for each in passes]

    def look(self, run: Run) -> list[Point]:
        """The logprobs that the run gives now."""
        return [self.point(run.forward(self.data()))]

    def point(self, training_pass: Pending) -> Point:
        """The numbers of a training pass; raises `Stuck` where it has none."""
        outcome = training_pass.outcome().needed("A training pass")
        assert isinstance(outcome.output, ForwardBackwardOutput)
        try:
            point = point_of_pass(outcome.output)
        except KeyError:
            raise Stuck(
                "A training pass gave no logprobs", outcome.sent, outcome.came_back
            ) from None
        if not len(point.logprobs) or not np.isfinite(point.logprobs).all():
            raise Stuck("A training pass gave no finite logprobs", outcome.sent, outcome.came_back)
        return point

    # Samplers

    def sampler(self, path: str) -> Exchange:
        """Ask for a sampler on a checkpoint."""
        request = types.CreateSamplingSessionRequest(
            session_id=self.session.session_id,
            sampling_session_seq_id=self.session.next_sampler(),
            model_path=path,
        )
        return self.session.post("/create_sampling_session", request)

    def sampler_id(self, path: str) -> str:
        """A sampler on a checkpoint; raises `NotSupported` without samplers, else `Stuck`."""
        answer = self.sampler(path)
        if answer.status in (405, 501):
            raise NotSupported("the service has no samplers")
        if not answer.ok:
            raise Stuck("No sampler could be created", answer.sent, answer.came_back)
        return str(answer.json().get("sampling_session_id"))

    def sample(self, sampler_id: str, seq_id: int) -> list[Point]:
        """The logprobs that a sampler gives."""
        for prompt_logprobs in (True, False):
            outcome = self._sample(sampler_id, 2 * seq_id + (not prompt_logprobs), prompt_logprobs)
            if outcome.ok or not prompt_logprobs:
                break
        outcome.needed("Sampling")
        assert isinstance(outcome.output, SampleResponse)
        point = point_of_sample(outcome.output)
        if not len(point.logprobs):
            raise NotSupported("samples come without logprobs, so they can't be compared")
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
        """The logprobs that a new sampler on a checkpoint gives."""
        return self.sample(self.sampler_id(path), 0)

    # Checkpoints

    def checkpoints(self, run: Run) -> dict[str, types.Checkpoint]:
        """A run's checkpoints as they are listed, by path."""
        answer = self.session.transport.send("GET", f"/training_runs/{run.model_id}/checkpoints")
        if not answer.ok:
            raise Stuck("A run's checkpoints can't be listed", answer.sent, answer.came_back)
        try:
            found = types.CheckpointsListResponse.model_validate(answer.json())
        except ValidationError as error:
            text = f"A list of checkpoints can't be read: {error.errors()[0]['msg']}"
            raise Stuck(text, answer.sent, answer.came_back) from error
        return {checkpoint.tinker_path: checkpoint for checkpoint in found.checkpoints}

    def delete(self, run: Run, checkpoint_id: str) -> Exchange:
        """Ask for a checkpoint's deletion."""
        path = f"/training_runs/{run.model_id}/checkpoints/{checkpoint_id}"
        return self.session.transport.send("DELETE", path)

    def info(self, path: str) -> Exchange:
        """Ask what a checkpoint was trained with."""
        return self.session.post("/weights_info", types.WeightsInfoRequest(tinker_path=path))

    # Comparisons

    @cached_property
    def noise(self) -> float:
        """By how much the logprobs of two equal runs differ at most; 0 where not at all."""
        try:
            one, other = (self.train(self.from_base(), 2) for _ in range(2))
        except Stuck:
            return 0.0
        return difference(one, other).largest

    @property
    def tolerance(self) -> float:
        """What still counts as the same: 0 for a service that computes the same bits twice."""
        return _NOISE_FACTOR * self.noise

    def same(self, a: Trace, b: Trace) -> bool:
        """Whether two traces are the same, within the service's own noise."""
        return self._within_noise(difference(a, b))

    def must_equal(self, got: Trace, wanted: Trace, promise: str, sent: str = "") -> None:
        """Raise `Broken` where two traces differ by more than the service's own noise."""
        apart = difference(got, wanted)
        if not self._within_noise(apart):
            raise Broken(promise, sent, self.told(apart))

    def must_differ(self, got: Trace, other: Trace, promise: str, sent: str = "") -> None:
        """Raise `Broken` where two traces are the same; `NotSupported` where noise hides it."""
        apart = difference(got, other)
        if self._within_noise(apart):
            if apart.count:
                raise NotSupported(
                    f"the service's own noise hides it: {apart}, and that much two equal runs "
                    "differ by"
                )
            raise Broken(promise, sent, self.told(apart))

    def _within_noise(self, apart: Difference) -> bool:
        return apart.count == 0 or apart.within(self.tolerance)

    def told(self, apart: Difference) -> str:
        """A difference in words, with the service's noise where it has any."""
        if not self.noise:
            return str(apart)
        return f"{apart} (two equal runs of this service differ by up to {self.noise:.3g})"
