"""Loss handles: custom losses that are traced once and used by name.

A loss is a function of tensors, ``loss(logprobs, <loss_fn_inputs that it reads>…)``, which
`ServiceClient.create_custom_loss` traces with torch.fx into a graph of torch and math calls. The
graph is executed in this process, or by a service that accepts it as plain data.
"""

from __future__ import annotations

import builtins
import hashlib
import inspect
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from everstep.wire import types

if TYPE_CHECKING:
    import torch
    import torch.fx

PerDatumLossFn = Callable[..., "tuple[torch.Tensor, Mapping[str, torch.Tensor]]"]
"""(logprobs, inputs…) → (scalar loss, metrics ``custom/<name>:sum`` or ``:mean``)."""
_MODULES = ("torch", "math", "operator", "_operator")
_METRIC = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")
_MAX_INPUTS = 16
_TRACE_LOCK = threading.Lock()
"""torch.fx patches torch while it traces. Two concurrent traces would leave torch patched."""
_LEAVING_TORCH = ("item", "numpy", "tolist")


@dataclass(frozen=True)
class LossHandle:
    """A traced loss, for ``forward_backward_custom``.

    Attributes:
        name: of the function.
        inputs: ``logprobs``, then the ``loss_fn_inputs`` that it reads, with their ranks.
        session_id: the session that it belongs to.
        graph: the traced graph.
        loss_id: the service's id. None: the loss is evaluated in this process.
    """

    name: str
    inputs: tuple[types.CustomLossInput, ...]
    session_id: str
    graph: torch.fx.GraphModule = field(repr=False, compare=False)
    loss_id: str | None = None

    @property
    def key(self) -> str:
        """A checksum that is equal for equal losses."""
        digest = hashlib.sha256(self.graph.code.encode())
        digest.update(repr(self.inputs).encode())
        return digest.hexdigest()

    @property
    def input_names(self) -> tuple[str, ...]:
        """The ``loss_fn_inputs`` that it reads, in order."""
        return tuple(item.name for item in self.inputs[1:])

    def check(self, data: Sequence[types.Datum]) -> None:
        """Raise ValueError unless every datum has each input with its rank."""
        for index, datum in enumerate(data):
            for item in self.inputs:
                key = "target_tokens" if item.name == "logprobs" else item.name
                if key not in datum.loss_fn_inputs:
                    raise ValueError(
                        f"datum {index} has no {key!r}, which loss {self.name!r} reads"
                    )
                rank = len(datum.loss_fn_inputs[key].shape or [0])
                if rank != item.rank:
                    raise ValueError(
                        f"datum {index}: {key!r} has rank {rank}; loss {self.name!r} was created "
                        f"for rank {item.rank}"
                    )

    def __call__(
        self, data: Sequence[types.Datum], logprobs: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Sum the losses of the data. Each metric is summed or averaged as its name says."""
        import torch

        total = torch.zeros(())
        sums: dict[str, float] = {}
        for datum, logprob in zip(data, logprobs, strict=True):
            inputs = [datum.loss_fn_inputs[name].to_torch() for name in self.input_names]
            loss, metrics = self.graph(logprob, *inputs)
            if loss.ndim != 0:
                raise ValueError(
                    f"loss {self.name!r} returned a tensor of shape {tuple(loss.shape)}; it has "
                    "to return a scalar"
                )
            total = total + loss
            for key, value in metrics.items():
                sums[key] = sums.get(key, 0.0) + float(value.detach())
        return total, {k: v / len(data) if k.endswith(":mean") else v for k, v in sums.items()}


def trace(fn: PerDatumLossFn, input_ranks: Mapping[str, int], session_id: str) -> LossHandle:
    """Trace a loss.

    Args:
        fn: the loss.
        input_ranks: rank of each of its parameters, including ``logprobs``.
        session_id: the session that it will belong to.

    Raises:
        ValueError: the loss can't be traced, or calls functions outside of torch and math.
    """
    import torch.fx

    name = getattr(fn, "__name__", type(fn).__name__)
    inputs = _inputs(name, fn, input_ranks)
    try:
        with _TRACE_LOCK:
            graph = torch.fx.symbolic_trace(fn)
    except Exception as error:
        raise ValueError(
            f"loss {name!r} can't be traced: {error}. A loss must not branch on values of tensors."
        ) from error
    for node in graph.graph.nodes:
        if problem := _problem(node):
            raise ValueError(f"loss {name!r} {problem}")
    return LossHandle(name, inputs, session_id, graph)


def encode(handle: LossHandle) -> types.CustomLossGraph:
    """Encode a traced loss as plain data.

    Raises:
        ValueError: the graph contains a value that has no plain form.
    """
    from torch.fx.node import _get_qualified_name

    nodes = []
    for node in handle.graph.graph.nodes:
        target = str(node.target)
        if node.op == "call_function":
            target = _get_qualified_name(node.target)
            target = re.sub(r"^_operator\.", "operator.", target)
        nodes.append(
            types.CustomLossNode(
                op=node.op,
                name=node.name,
                target=target,
                args=[_plain(argument) for argument in node.args],
                kwargs={key: _plain(argument) for key, argument in node.kwargs.items()},
            )
        )
    return types.CustomLossGraph(nodes=nodes)


def _plain(value: Any) -> Any:
    import torch
    import torch.fx

    match value:
        case torch.fx.Node():
            return {"ref": value.name}
        case float() if not math.isfinite(value):
            return {"float": str(value)}
        case None | bool() | int() | float() | str():
            return value
        case tuple():
            return {"tuple": [_plain(item) for item in value]}
        case list():
            return [_plain(item) for item in value]
        case dict():
            return {"dict": {str(key): _plain(item) for key, item in value.items()}}
        case slice():
            return {"slice": [_plain(part) for part in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    for kind in ("dtype", "device", "layout", "memory_format"):
        if isinstance(value, getattr(torch, kind)):
            return {kind: str(value).removeprefix("torch.")}
    raise ValueError(f"a loss can't contain a {type(value).__name__}")


def _inputs(
    name: str, fn: PerDatumLossFn, ranks: Mapping[str, int]
) -> tuple[types.CustomLossInput, ...]:
    parameters = list(inspect.signature(fn).parameters.values())
    names = [parameter.name for parameter in parameters]
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wrong = [
        p.name
        for p in parameters
        if p.kind not in plain or p.default is not p.empty or not _NAME.fullmatch(p.name)
    ]
    if not names or names[0] != "logprobs":
        raise ValueError(f"loss {name!r} has to take logprobs first, then the inputs it reads")
    if wrong or len(names) > _MAX_INPUTS:
        raise ValueError(
            f"loss {name!r} has to take at most {_MAX_INPUTS} plain parameters without defaults, "
            f"with lower-case names; wrong: {', '.join(wrong) or 'their number'}"
        )
    if set(ranks) != set(names):
        raise ValueError(
            f"input_ranks has to give the rank of each of {', '.join(names)}; it gives "
            f"{', '.join(sorted(ranks)) or 'none'}"
        )
    if ranks["logprobs"] not in (1, 2):
        raise ValueError("logprobs has rank 1, [T], or 2, [T, K]")
    return tuple(
        types.CustomLossInput.model_validate({"name": item, "rank": ranks[item]}) for item in names
    )


def _problem(node: torch.fx.Node) -> str | None:
    """Return why a node is not allowed in a loss, or None if it is."""
    target = node.target
    match node.op:
        case "call_function":
            module = (getattr(target, "__module__", None) or "").partition(".")[0]
            if target is not builtins.getattr and module not in _MODULES:
                return f"calls {target}; only torch and math are allowed"
        case "call_method":
            import torch

            if not hasattr(torch.Tensor, str(target)):
                return f"calls {target}(), which is not a method of tensors"
            if target == "backward" or target in _LEAVING_TORCH:
                return f"calls {target}(); keep everything a tensor, and return the loss"
        case "call_module" | "get_attr":
            return f"uses {target!r} from outside; a loss may only read its parameters"
        case "output":
            return _output_problem(node.args[0])
    return None


def _output_problem(output: Any) -> str | None:
    import torch.fx

    if not isinstance(output, tuple | list) or len(output) != 2:
        return "has to return (loss, metrics)"
    loss, metrics = output
    if not isinstance(loss, torch.fx.Node):
        return f"has to return a tensor as its loss, not {loss!r}"
    if not isinstance(metrics, dict):
        return "has to return its metrics as a dict"
    for key, value in metrics.items():
        if not _METRIC.fullmatch(str(key)):
            return f"has a metric {key!r}; call it custom/<name>:sum or custom/<name>:mean"
        if not isinstance(value, torch.fx.Node):
            return f"has a metric {key!r} that is not a tensor"
    return None
