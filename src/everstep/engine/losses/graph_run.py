"""Custom loss evaluation: runs a program on meta tensors first, then on a datum's logprobs.

A program holds known operations only (`graph_read`), but their order and sizes are untrusted. It
therefore runs on meta tensors first, which have shapes and no data. Shapes that do not fit, and
results that would take too much memory or time, are rejected before anything is allocated.

It always runs on the CPU, on detached logprobs. There an index out of bounds is an error and does
not break a device, and the result equals the client's own.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from everstep.engine.errors import InputError, first_line
from everstep.engine.losses.graph_operations import (
    FUNCTIONS,
    GETATTR,
    IN_PLACE,
    METHODS,
    Operation,
    Parameter,
)
from everstep.engine.losses.graph_read import DType, LossProgram, Ref, Step

MAX_BYTES = 256 << 20
"""Bound of the memory of all values that a loss computes for one datum."""
MAX_MULTIPLICATIONS = 1 << 32
"""Bound of the multiplications in all matrix products for one datum."""
_VALUE_BYTES = 1024
"""Memory of a value besides its data."""
MAX_POWER = 64
_SURFACES: Mapping[str, Any] = {
    "torch": torch,
    "method": torch.Tensor,
    "functional": torch.nn.functional,
    "special": torch.special,
    "linalg": torch.linalg,
    "operator": operator,
    "math": math,
}
_CALLS: Mapping[tuple[str, str], Callable[..., Any]] = {
    (item.surface, item.name): getattr(_SURFACES[item.surface], item.name)
    for item in (*FUNCTIONS.values(), *METHODS.values())
}
_PRODUCTS = frozenset({"matmul", "mm", "mv", "dot", "outer"})
_INTEGER_DIVISIONS = frozenset({"floor_divide", "remainder", "fmod", "floordiv", "mod"})
_FAILURES = (
    *(RuntimeError, ValueError, TypeError, IndexError, ArithmeticError),
    *(AssertionError, AttributeError),  # raised by torch's wrappers in Python
)


@dataclass(frozen=True)
class CustomLossValue:
    """A loss's result for one datum.

    Attributes:
        loss: value of the loss.
        gradient: d loss / d logprobs, float32 in their shape.
        metrics: values of the metrics by name.
    """

    loss: float
    gradient: torch.Tensor
    metrics: Mapping[str, float]


class CustomLoss:
    """Evaluates a loss and remembers the shapes that passed the run on meta tensors.

    Args:
        program: the parsed loss.
    """

    def __init__(self, program: LossProgram) -> None:
        self._program = program
        self._checked_shapes: set[tuple[tuple[torch.Size, torch.dtype], ...]] = set()

    @torch.enable_grad()
    def evaluate(
        self, logprobs: torch.Tensor, inputs: Mapping[str, torch.Tensor]
    ) -> CustomLossValue:
        """Evaluate the loss on one datum and differentiate it by the logprobs.

        Args:
            logprobs: float32 [T] or [T, K], detached, on the CPU.
            inputs: the datum's ``loss_fn_inputs``, on the CPU.

        Raises:
            InputError: the loss cannot be computed for these shapes or values, exceeds a bound, is
                not a scalar, or does not depend on the logprobs. The message names the node where
                there is one.
        """
        program = self._program
        values = {**inputs, "logprobs": logprobs}
        shaped = {
            name: _with_rank(name, values[name], rank) for name, rank in program.inputs.items()
        }
        shapes = tuple((value.shape, value.dtype) for value in shaped.values())
        if shapes not in self._checked_shapes:
            _run_on_meta(program, shaped)
            self._checked_shapes.add(shapes)
        leaf = shaped["logprobs"].detach().requires_grad_()
        loss, metrics = _Run(program, None).run({**shaped, "logprobs": leaf})
        try:
            (gradient,) = torch.autograd.grad(loss, leaf)
            numbers = {name: float(value.detach()) for name, value in metrics.items()}
        except _FAILURES as error:
            raise InputError(
                f"Loss {program.name!r} can't be differentiated, or has a metric that is no "
                f"scalar: {first_line(error)[:300]}"
            ) from error
        return CustomLossValue(float(loss.detach()), gradient, numbers)


def _with_rank(name: str, value: torch.Tensor, rank: int) -> torch.Tensor:
    """Return an input in its declared rank. Scalars arrive as one value of rank 1."""
    if rank == 0 and value.numel() == 1:
        return value.reshape(())
    if value.ndim != rank:
        raise InputError(f"{name!r} has rank {value.ndim}; the loss was created for rank {rank}.")
    return value


def _run_on_meta(program: LossProgram, inputs: Mapping[str, torch.Tensor]) -> None:
    """Raise `InputError` for shapes that do not fit or exceed a bound. Nothing is computed."""
    empty = {name: torch.empty_like(value, device="meta") for name, value in inputs.items()}
    empty["logprobs"].requires_grad_()
    with torch.device("meta"):
        loss, metrics = _Run(program, _Budget(program.name)).run(empty)
    for name, value in {"loss": loss, **metrics}.items():
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, torch.Tensor) else repr(value)
            raise InputError(f"Loss {program.name!r}: its {name} has to be a scalar; got {shape}.")
    if loss.ndim or not loss.is_floating_point() or not loss.requires_grad:
        raise InputError(f"Loss {program.name!r} has to give a scalar that depends on logprobs.")


class _Budget:
    """Counts the memory and the multiplications of a run.

    Args:
        name: name of the loss.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._bytes = 0
        self._multiplications = 0

    def add(self, step: Step, tensors: list[torch.Tensor], result: Any) -> None:
        """Count a step's result. Raises `InputError` when the run exceeds a bound."""
        for value in result if isinstance(result, list | tuple) else (result,):
            size = value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0
            self._bytes += size + _VALUE_BYTES
        if step.operation.name in _PRODUCTS and isinstance(result, torch.Tensor):
            self._multiplications += result.numel() * tensors[0].shape[-1]
        if self._bytes > MAX_BYTES or self._multiplications > MAX_MULTIPLICATIONS:
            raise InputError(
                f"Loss {self._name!r} takes too much for one datum: at node {step.node!r} it "
                f"holds {self._bytes} bytes of at most {MAX_BYTES}, and makes "
                f"{self._multiplications} multiplications of at most {MAX_MULTIPLICATIONS}."
            )


class _Run:
    """One run of a program.

    Args:
        program: the parsed loss.
        budget: counts memory and multiplications of a run on meta tensors. None: a real run.
    """

    def __init__(self, program: LossProgram, budget: _Budget | None) -> None:
        self._program = program
        self._budget = budget
        self._values: dict[str, Any] = {}

    def run(self, inputs: Mapping[str, torch.Tensor]) -> tuple[Any, dict[str, Any]]:
        """Run all steps. Returns the loss and the metrics."""
        self._values.update(inputs)
        for step in self._program.steps:
            try:
                self._values[step.node] = self._step(step)
            except InputError:
                raise
            except _FAILURES as error:
                raise InputError(
                    f"Loss {self._program.name!r} can't be computed: node {step.node!r} "
                    f"({step.operation.name}): {first_line(error)[:300]}"
                ) from error
        program = self._program
        metrics = {key: self._values[node] for key, node in program.metrics.items()}
        return self._values[program.loss], metrics

    def _step(self, step: Step) -> Any:
        operation = step.operation
        args = [self._value(item) for item in step.args]
        kwargs = {
            parameter.name: self._value(step.kwargs[parameter.name])
            for parameter in operation.parameters
            if parameter.name in step.kwargs and parameter.kind != "c"
        }
        for parameter, value in zip(operation.parameters, args, strict=False):
            _check_tensor(parameter, value)
        for parameter in operation.parameters:
            _check_tensor(parameter, kwargs.get(parameter.name))
        args = [item for item in args if not isinstance(item, torch.device)]
        for value in (*args, *kwargs.values()):
            _check_plain(value)
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        result = self._call(operation, args, kwargs, tensors)
        if self._budget is not None:
            self._budget.add(step, tensors, result)
        return result

    def _call(
        self,
        operation: Operation,
        args: list[Any],
        kwargs: dict[str, Any],
        tensors: list[torch.Tensor],
    ) -> Any:
        name = operation.name
        if operation is GETATTR:
            return _attribute(*args)
        if name in ("cpu", "to") and len(args) == 1 and not kwargs:
            return args[0]  # to a device
        if name == "getitem":
            return self._getitem(*args)
        if name == "masked_select" and self._budget is not None:
            return self._getitem(*torch.broadcast_tensors(*tensors))  # type: ignore[no-untyped-call]
        if operation.surface in ("operator", "math") and not tensors:
            return _number(name, _CALLS[operation.surface, name], args)
        if name in IN_PLACE:
            name = name.removeprefix("i")  # `check_in_place` ensured that nothing else reads it
        rounds = name in _INTEGER_DIVISIONS or kwargs.get("rounding_mode")
        if rounds and not any(x.is_floating_point() for x in tensors):
            # The smallest integer divided by -1 would end the process.
            raise TypeError("division of integers isn't possible in a loss; use .float()")
        return _CALLS[operation.surface, name](*args, **kwargs)

    def _getitem(self, value: Any, index: Any) -> Any:
        if self._budget is None or not isinstance(value, torch.Tensor):
            return value[index]
        items = index if isinstance(index, tuple) else (index,)
        return value[tuple(part for item in items for part in _longest_index(item))]

    def _value(self, item: Any) -> Any:
        """Replace the references in an argument by their values."""
        match item:
            case Ref(node):
                return self._values[node]
            case DType(name):
                return getattr(torch, name)  # one of `DTYPES`
            case list():
                return [self._value(part) for part in item]
            case tuple():
                return tuple(self._value(part) for part in item)
            case slice():
                parts = (item.start, item.stop, item.step)
                return slice(*(self._value(part) for part in parts))
        return item


def _attribute(value: Any, name: str) -> Any:
    """Read one of `ATTRIBUTES`, if it is a plain value and not a method."""
    attribute = getattr(value, name)
    if callable(attribute):
        raise TypeError(f"{name} isn't an attribute of a {type(value).__name__}")
    return attribute


def _longest_index(index: Any) -> tuple[Any, ...]:
    """Replace a boolean index, which has no data on meta, as if all of its values were true."""
    if not isinstance(index, torch.Tensor) or index.dtype != torch.bool:
        return (index,)
    positions = torch.empty(index.numel(), dtype=torch.int64, device="meta")
    return (positions,) * max(1, index.ndim)


def _check_tensor(parameter: Parameter, value: Any) -> None:
    """Raise TypeError if a tensor parameter gets any other value."""
    if parameter.kind == "t" and not isinstance(value, torch.Tensor | None):
        raise TypeError(f"{parameter.name} has to be a tensor, not a {type(value).__name__}")


def _check_plain(value: Any) -> None:
    """Raise TypeError for a value that no operation takes, as a very large integer."""
    if isinstance(value, list | tuple):
        for item in value:
            _check_plain(item)
    elif isinstance(value, slice):
        _check_plain((value.start, value.stop, value.step))
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise TypeError("a whole number is too large")
    elif not isinstance(
        value, torch.Tensor | torch.dtype | int | float | str | None | type(Ellipsis)
    ):
        raise TypeError(f"a {type(value).__name__} can't be used here")


def _number(name: str, call: Callable[..., Any], args: list[Any]) -> int | float | bool:
    """Compute with Python's numbers, whose integers need bounds."""
    if not all(isinstance(item, int | float) for item in args):
        raise TypeError("numbers or tensors are needed")
    if name == "pow" and abs(args[0]) > 1 and abs(args[1]) > MAX_POWER:
        raise TypeError(f"powers of numbers go up to {MAX_POWER}")
    result = call(*args)
    if not isinstance(result, int | float):
        raise TypeError(f"the result is a {type(result).__name__}")
    if isinstance(result, int) and not -(2**63) <= result < 2**63:
        raise TypeError("the result is too large")
    return result
