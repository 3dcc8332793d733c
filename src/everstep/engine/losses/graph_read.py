"""Custom loss parser: turns an untrusted graph into a program of known operations.

The graph is never evaluated as code. Every node has to be an operation of `graph_operations`, with
arguments of the kinds that it takes, made of earlier nodes and plain constants. Any other node is
rejected by name. No torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from everstep.engine.errors import InputError
from everstep.engine.losses.graph_operations import (
    ATTRIBUTES,
    DTYPES,
    IN_PLACE,
    METHODS,
    SPREADS,
    WORDS,
    Operation,
    Parameter,
    find_function,
)

MAX_NODES = 1000
MAX_INPUTS = 16
MAX_CONSTANTS = 10_000
"""Bound of the numbers, words and references in all nodes' arguments together."""
MAX_DEPTH = 6
"""Bound of the nesting of lists in an argument."""
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_INPUT = re.compile(r"[a-z_][a-z0-9_]{0,63}")
_METRIC = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_VIEWS = frozenset(
    {
        *("getitem", "getattr", "t", "transpose", "swapaxes", "permute", "view", "view_as"),
        *("reshape", "reshape_as", "flatten", "squeeze", "unsqueeze", "expand", "expand_as"),
        *("broadcast_to", "narrow", "select", "diagonal", "detach", "contiguous", "unbind"),
        *("split", "chunk", "to", "type_as", "float", "double", "positive", "cpu"),
    }
)
"""Operations whose result may share memory with their arguments."""


@dataclass(frozen=True)
class Ref:
    """The value of an earlier node."""

    node: str


@dataclass(frozen=True)
class DType:
    """A dtype, by name."""

    name: str


@dataclass(frozen=True)
class Step:
    """One call. ``args`` and ``kwargs`` hold `Ref`, `DType`, numbers, words, lists and slices."""

    node: str
    operation: Operation
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class LossProgram:
    """A parsed and checked loss.

    Attributes:
        name: the author's name for it.
        inputs: ranks of ``logprobs``, then of the ``loss_fn_inputs`` that it reads.
        steps: the calls in their order.
        loss: node of the loss.
        metrics: nodes of the metrics, by the metrics' names.
    """

    name: str
    inputs: Mapping[str, int]
    steps: tuple[Step, ...]
    loss: str
    metrics: Mapping[str, str]


@lru_cache(maxsize=64)
def parse_loss_json(text: str) -> LossProgram:
    """Parse the JSON form of a loss, as the service stores it. Raises as `parse_loss` does."""
    return parse_loss(json.loads(text))


def parse_loss(loss: Mapping[str, Any]) -> LossProgram:
    """Parse a loss.

    Args:
        loss: ``name``, ``inputs`` and ``graph`` of a create_custom_loss request, as plain data.

    Raises:
        InputError: the graph is malformed or not allowed. The message names the node and says why.
    """
    nodes = loss["graph"]["nodes"]
    if not 0 < len(nodes) <= MAX_NODES:
        raise InputError(f"The loss has {len(nodes)} nodes; a graph has 1 to {MAX_NODES}.")
    inputs = _inputs(loss["inputs"])
    parser = _GraphParser()
    for node in nodes[:-1]:
        parser.add(node)
    if list(inputs) != parser.placeholders:
        raise InputError(
            f"The graph takes {', '.join(parser.placeholders) or 'nothing'}; inputs declares "
            f"{', '.join(inputs)}."
        )
    value, metrics = parser.output(nodes[-1])
    parser.check_in_place()
    return LossProgram(str(loss["name"])[:128], inputs, tuple(parser.steps), value, metrics)


def _inputs(declared: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    names = [str(item["name"]) for item in declared]
    if not names or names[0] != "logprobs":
        raise InputError("inputs: the first one has to be logprobs.")
    if len(names) > MAX_INPUTS or len(set(names)) != len(names):
        raise InputError(f"inputs: at most {MAX_INPUTS}, each once; got {len(names)}.")
    for name in names:
        if not _INPUT.fullmatch(name):
            raise InputError(f"inputs: {name[:64]!r} is no name of lower-case letters and digits.")
    if declared[0]["rank"] not in (1, 2):
        raise InputError("inputs: logprobs has rank 1, [T], or 2, [T, K].")
    return {str(item["name"]): int(item["rank"]) for item in declared}


class _GraphParser:
    """Parses a graph's nodes in their order."""

    def __init__(self) -> None:
        self.placeholders: list[str] = []
        self.steps: list[Step] = []
        self._known: set[str] = set()
        self._uses: dict[str, int] = {}
        self._constants = 0

    def add(self, node: Mapping[str, Any]) -> None:
        """Parse any node but the last one."""
        name = str(node["name"])
        if not _IDENTIFIER.fullmatch(name) or name.startswith("__"):
            raise InputError(f"Node {name[:64]!r}: a node's name is an identifier.")
        if name in self._known:
            raise InputError(f"Node {name!r}: there are two of this name.")
        target = str(node["target"])
        match node["op"]:
            case "placeholder":
                self._placeholder(name, target, node)
            case "call_function" | "call_method" as kind:
                is_function = kind == "call_function"
                operation = find_function(target) if is_function else METHODS.get(target)
                if operation is None:
                    surface = "function" if is_function else "method"
                    raise InputError(
                        f"Node {name!r}: the {surface} {target[:128]!r} may not be called by a "
                        "loss. The guide on losses lists the allowed ones."
                    )
                self._call(name, operation, node)
            case "output":
                raise InputError(f"Node {name!r}: the output has to be the last node.")
            case other:
                raise InputError(
                    f"Node {name!r}: a loss may not hold a {other} ({target[:128]!r}); it reads "
                    "its inputs only."
                )
        self._known.add(name)

    def output(self, node: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
        """Parse the last node: the loss and its metrics."""
        if node["op"] != "output":
            raise InputError("The last node has to be the output.")
        args = [self._value("output", argument, 0) for argument in node["args"]]
        result = args[0] if len(args) == 1 else None
        match result:
            case (Ref(loss), dict(metrics)) | [Ref(loss), dict(metrics)]:
                pass
            case _:
                raise InputError("The output has to be (loss, metrics): a tensor and a dict.")
        for key, value in metrics.items():
            if not _METRIC.fullmatch(key):
                raise InputError(
                    f"Metric {key[:80]!r}: call it custom/<name>:sum or custom/<name>:mean."
                )
            if not isinstance(value, Ref):
                raise InputError(f"Metric {key!r} has to be a tensor that the graph computes.")
        return loss, {key: value.node for key, value in metrics.items()}

    def check_in_place(self) -> None:
        """Reject in-place writes to a value that another node reads, as evaluation never writes."""
        makers = {step.node: step for step in self.steps}
        for step in self.steps:
            if step.operation.surface != "operator" or step.operation.name not in IN_PLACE:
                continue
            written = step.args[0]
            if not isinstance(written, Ref):
                continue
            maker = makers.get(written.node)
            shared = maker is None or maker.operation.name in _VIEWS
            if shared or self._uses[written.node] > 1:
                raise InputError(
                    f"Node {step.node!r} writes in place to {written.node!r}, which is read "
                    "elsewhere: write x = x + y instead of x += y."
                )

    def _placeholder(self, name: str, target: str, node: Mapping[str, Any]) -> None:
        if self.steps:
            raise InputError(f"Node {name!r}: placeholders come first.")
        if name != target or node["args"] or node["kwargs"]:
            raise InputError(f"Node {name!r}: a placeholder has its input's name, and no default.")
        self.placeholders.append(name)

    def _call(self, name: str, operation: Operation, node: Mapping[str, Any]) -> None:
        args = tuple(self._value(name, argument, 0) for argument in node["args"])
        kwargs = {key: self._value(name, value, 0) for key, value in node["kwargs"].items()}
        _check_call(name, operation, args, kwargs)
        self.steps.append(Step(name, operation, args, kwargs))

    def _value(self, node: str, value: Any, depth: int) -> Any:
        """Parse one argument, counting its constants and references."""
        self._constants += 1
        if self._constants > MAX_CONSTANTS:
            raise InputError(f"The graph holds more than {MAX_CONSTANTS} arguments.")
        if depth > MAX_DEPTH:
            raise InputError(f"Node {node!r}: an argument nests deeper than {MAX_DEPTH}.")
        match value:
            case None | bool():
                return value
            case int() if -(2**63) <= value < 2**63:
                return value
            case float() if math.isfinite(value):
                return value
            case str() if value in WORDS or value in ATTRIBUTES:
                return value
            case list():
                return [self._value(node, item, depth + 1) for item in value]
            case dict() if len(value) == 1:
                ((kind, content),) = value.items()
                return self._tagged(node, kind, content, depth)
        raise InputError(f"Node {node!r} has an argument that a loss can't hold: {_short(value)}.")

    def _tagged(self, node: str, kind: str, content: Any, depth: int) -> Any:
        match kind, content:
            case "ref", str():
                if content not in self._known:
                    raise InputError(
                        f"Node {node!r} refers to {content[:64]!r}, which is no earlier node."
                    )
                self._uses[content] = self._uses.get(content, 0) + 1
                return Ref(content)
            case "tuple", list():
                return tuple(self._value(node, item, depth + 1) for item in content)
            case "dict", dict():
                return {str(k): self._value(node, item, depth + 1) for k, item in content.items()}
            case "slice", [_, _, _]:
                return slice(*(self._value(node, part, depth + 1) for part in content))
            case "ellipsis", True:
                return Ellipsis
            case "float", str() if content in _FLOATS:
                return _FLOATS[content]
            case "dtype", str() if content in DTYPES:
                return DType(content)
            case ("device", "cpu") | ("layout", "strided") | ("memory_format", str()):
                return None
        raise InputError(
            f"Node {node!r} has an argument that a loss can't hold: {_short({kind: content})}."
        )


def _check_call(
    node: str, operation: Operation, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Raise `InputError` unless the operation takes these arguments."""
    parameters = operation.parameters
    called = f"Node {node!r}: {operation.name}"
    spreads = next((p for p in parameters if p.kind in SPREADS), None)
    most = len(parameters) if spreads is None else MAX_CONSTANTS
    if len(args) > most:
        raise InputError(f"{called} takes {len(parameters)} arguments at most; got {len(args)}.")
    bound: set[str] = set()
    for index, value in enumerate(args):
        parameter = parameters[min(index, len(parameters) - 1)]
        if spreads is not None and index >= parameters.index(spreads):
            parameter = spreads
        _check_argument(called, parameter, value)
        bound.add(parameter.name)
    by_name = {parameter.name: parameter for parameter in parameters}
    for key, value in kwargs.items():
        if key not in by_name:
            raise InputError(
                f"{called} takes no argument {key[:64]!r} in a loss; it takes {', '.join(by_name)}."
            )
        if key in bound:
            raise InputError(f"{called} is given {key!r} twice.")
        _check_argument(called, by_name[key], value)
        bound.add(key)
    missing = [p.name for p in parameters if not (p.optional or p.name in bound or p.kind == "a")]
    if missing:
        raise InputError(f"{called} misses its argument {missing[0]!r}.")


_LITERAL = frozenset({"attribute", "w", "z", "1", "0", "b"})
"""Kinds whose arguments have to be constants of the graph."""


def _check_argument(called: str, parameter: Parameter, value: Any) -> None:
    kind = parameter.kind
    if isinstance(value, Ref) and kind not in _LITERAL:
        return
    if value is None and (parameter.optional or kind == "a"):
        return
    if not _FITS[kind](value):
        raise InputError(f"{called} can't take {_short(value)} as its argument {parameter.name!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_integers(value: Any) -> bool:
    return _is_integer(value) or (
        isinstance(value, list | tuple) and all(isinstance(x, Ref) or _is_integer(x) for x in value)
    )


def _are_tensors(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(x, Ref) for x in value)


def _is_index(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(isinstance(x, Ref) or _is_index(x) for x in value)
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return all(x is None or isinstance(x, int | Ref) for x in parts)
    return value is None or value is Ellipsis or isinstance(value, int)


def _is_nested(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(x, int | float | Ref) or _is_nested(x) for x in value
    )


_FITS: Mapping[str, Callable[[Any], bool]] = {
    "t": lambda value: False,
    "v": _is_number,
    "n": _is_number,
    "i": _is_integer,
    "1": lambda value: _is_integer(value) and value == 1,
    "0": lambda value: value is False,
    "b": lambda value: isinstance(value, bool),
    "l": _are_tensors,
    "d": _are_integers,
    "s": _are_integers,
    "y": lambda value: isinstance(value, DType),
    "a": lambda value: isinstance(value, DType | bool),
    "x": _is_index,
    "k": lambda value: _is_number(value) or _is_nested(value),
    "w": lambda value: isinstance(value, str) and value in WORDS,
    "attribute": lambda value: isinstance(value, str) and value in ATTRIBUTES,
    "z": lambda value: value is None,
    "c": lambda value: value is None or isinstance(value, bool | int),
}
"""Whether a constant is of a kind. `graph_operations` describes the kinds."""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
