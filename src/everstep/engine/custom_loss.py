"""Running a loss of a user's own: first on tensors without data, then on a datum's logprobs.

A program holds known operations only (`loss_graph`), but a stranger chose their order and sizes.
So it runs on meta tensors first: these have shapes and no data, so that whatever doesn't fit, and
whatever would take too much memory or time, is refused before a byte of it is allocated. It always
runs on the CPU, on detached logprobs: there an index out of bounds is an error and not the end of
a device, and the result is what the client would have computed itself.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from everstep.engine.errors import InputError
from everstep.engine.loss_graph import DType, LossProgram, Ref, Step
from everstep.engine.loss_operations import (
    FUNCTIONS,
    GETATTR,
    IN_PLACE,
    METHODS,
    Operation,
    Parameter,
)

MAX_BYTES = 256 << 20
"""Memory of all values that a loss computes for one datum."""
MAX_MULTIPLICATIONS = 1 << 32
"""Of all matrix products for one datum."""
_VALUE_BYTES = 1024
"""What any value costs besides its data."""
_LARGEST_POWER = 64
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
    *(AssertionError, AttributeError),  # as torch's wrappers in Python refuse arguments
)


@dataclass(frozen=True)
class CustomLossValue:
    """What a loss gives for one datum.

    Attributes:
        loss: its value.
        slope: d loss / d logprobs, float32 in their shape.
        metrics: by name.
    """

    loss: float
    slope: torch.Tensor
    metrics: Mapping[str, float]


class CustomLoss:
    """A loss to evaluate, and the shapes for which it is known to run.

    Args:
        program: the loss.
    """

    def __init__(self, program: LossProgram) -> None:
        self._program = program
        self._tried: set[tuple[tuple[torch.Size, torch.dtype], ...]] = set()

    @torch.enable_grad()
    def evaluate(
        self, logprobs: torch.Tensor, inputs: Mapping[str, torch.Tensor]
    ) -> CustomLossValue:
        """Evaluate the loss on one datum, and differentiate it by the logprobs.

        Args:
            logprobs: float32 [T] or [T, K], detached, on the CPU.
            inputs: the datum's ``loss_fn_inputs``, on the CPU.

        Raises:
            InputError: it can't be computed for these shapes or values, takes too much, isn't a
                scalar, or doesn't depend on the logprobs; names the node where there is one.
        """
        program = self._program
        values = {**inputs, "logprobs": logprobs}
        shaped = {name: _ranked(name, values[name], rank) for name, rank in program.inputs.items()}
        shapes = tuple((value.shape, value.dtype) for value in shaped.values())
        if shapes not in self._tried:
            _try_on_meta(program, shaped)
            self._tried.add(shapes)
        leaf = shaped["logprobs"].detach().requires_grad_()
        loss, metrics = _Run(program, None).run({**shaped, "logprobs": leaf})
        try:
            (slope,) = torch.autograd.grad(loss, leaf)
            numbers = {name: float(value.detach()) for name, value in metrics.items()}
        except _FAILURES as error:
            raise InputError(
                f"Loss {program.name!r} can't be differentiated, or has a metric that is no "
                f"scalar: {_first_line(error)}"
            ) from error
        return CustomLossValue(float(loss.detach()), slope, numbers)


def _ranked(name: str, value: torch.Tensor, rank: int) -> torch.Tensor:
    """An input in its declared rank; a scalar travels as one value of rank 1."""
    if rank == 0 and value.numel() == 1:
        return value.reshape(())
    if value.ndim != rank:
        raise InputError(f"{name!r} has rank {value.ndim}; the loss was created for rank {rank}.")
    return value


def _try_on_meta(program: LossProgram, inputs: Mapping[str, torch.Tensor]) -> None:
    """Raise `InputError` for what doesn't fit or takes too much; nothing is computed."""
    empty = {name: torch.empty_like(value, device="meta") for name, value in inputs.items()}
    empty["logprobs"].requires_grad_()
    with torch.device("meta"):
        loss, metrics = _Run(program, _Account(program.name)).run(empty)
    for name, value in {"loss": loss, **metrics}.items():
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, torch.Tensor) else repr(value)
            raise InputError(f"Loss {program.name!r}: its {name} has to be a scalar; got {shape}.")
    if loss.ndim or not loss.is_floating_point() or not loss.requires_grad:
        raise InputError(f"Loss {program.name!r} has to give a scalar that depends on logprobs.")


class _Account:
    """What a run would take.

    Args:
        name: the loss's.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._bytes = 0
        self._multiplications = 0

    def add(self, step: Step, tensors: list[torch.Tensor], result: Any) -> None:
        """Count a step's result; raises `InputError` when the run takes too much."""
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
        program: the loss.
        account: set where the tensors have no data: counts what the run would take.
    """

    def __init__(self, program: LossProgram, account: _Account | None) -> None:
        self._program = program
        self._account = account
        self._values: dict[str, Any] = {}

    def run(self, inputs: Mapping[str, torch.Tensor]) -> tuple[Any, dict[str, Any]]:
        """Run all steps; returns the loss and the metrics."""
        self._values.update(inputs)
        for step in self._program.steps:
            try:
                self._values[step.node] = self._step(step)
            except InputError:
                raise
            except _FAILURES as error:
                raise InputError(
                    f"Loss {self._program.name!r} can't be computed: node {step.node!r} "
                    f"({step.operation.name}): {_first_line(error)}"
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
        if self._account is not None:
            self._account.add(step, tensors, result)
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
        if name == "masked_select" and self._account is not None:
            return self._getitem(*torch.broadcast_tensors(*tensors))  # type: ignore[no-untyped-call]
        if operation.surface in ("operator", "math") and not tensors:
            return _number(name, _CALLS[operation.surface, name], args)
        if name in IN_PLACE:
            name = name.removeprefix("i")  # no one else reads what it would write to
        rounds = name in _INTEGER_DIVISIONS or kwargs.get("rounding_mode")
        if rounds and not any(x.is_floating_point() for x in tensors):
            # The smallest integer divided by -1 would end the process.
            raise TypeError("division of integers isn't possible in a loss; use .float()")
        return _CALLS[operation.surface, name](*args, **kwargs)

    def _getitem(self, value: Any, index: Any) -> Any:
        if self._account is None or not isinstance(value, torch.Tensor):
            return value[index]
        whole = index if isinstance(index, tuple) else (index,)
        return value[tuple(part for item in whole for part in _longest(item))]

    def _value(self, item: Any) -> Any:
        """An argument with values for its references."""
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
    """One of `ATTRIBUTES`, of what has it as a plain value."""
    found = getattr(value, name)
    if callable(found):
        raise TypeError(f"{name} isn't an attribute of a {type(value).__name__}")
    return found


def _longest(index: Any) -> tuple[Any, ...]:
    """Stand-ins for an index of truths: without data, as if all of them were true."""
    if not isinstance(index, torch.Tensor) or index.dtype != torch.bool:
        return (index,)
    places = torch.empty(index.numel(), dtype=torch.int64, device="meta")
    return (places,) * max(1, index.ndim)


def _check_tensor(parameter: Parameter, value: Any) -> None:
    """Raise TypeError where a tensor is needed and there is something else."""
    if parameter.kind == "t" and not isinstance(value, torch.Tensor | None):
        raise TypeError(f"{parameter.name} has to be a tensor, not a {type(value).__name__}")


def _check_plain(value: Any) -> None:
    """Raise TypeError for a value that no operation takes."""
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
    """Arithmetic of Python's numbers, which have no bounds of their own."""
    if not all(isinstance(item, int | float) for item in args):
        raise TypeError("numbers or tensors are needed")
    if name == "pow" and abs(args[0]) > 1 and abs(args[1]) > _LARGEST_POWER:
        raise TypeError(f"powers of numbers go up to {_LARGEST_POWER}")
    result = call(*args)
    if not isinstance(result, int | float):
        raise TypeError(f"the result is a {type(result).__name__}")
    if isinstance(result, int) and not -(2**63) <= result < 2**63:
        raise TypeError("the result is too large")
    return result


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
