"""Custom losses: traced graphs as plain data, which the server evaluates."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from everstep.wire.base import Request, Response
from everstep.wire.messages.requests import SeqId

CustomLossInputRank = Literal[0, 1, 2]
"""0 is a scalar, 1 is [T], 2 is [T, K]."""
CustomLossNodeOp = Literal[
    "placeholder", "get_attr", "call_function", "call_method", "call_module", "output"
]


class CustomLossInput(Request):
    """One input of a loss: ``logprobs``, or a key of ``loss_fn_inputs``, and its rank."""

    name: str
    rank: CustomLossInputRank


class CustomLossNode(Request):
    """One node of a traced loss.

    Arguments are JSON scalars, lists of arguments, or an object with one key: ``ref`` (a node's
    name), ``tuple``, ``dict``, ``slice``, ``ellipsis``, ``float`` (inf, -inf, nan), ``dtype``,
    ``device``, ``layout`` or ``memory_format``.
    """

    op: CustomLossNodeOp
    name: str
    target: str
    args: list[Any] = Field(default_factory=list)
    kwargs: dict[str, Any] = Field(default_factory=dict)


class CustomLossGraph(Request):
    """A traced loss: its nodes in the order of execution."""

    format: Literal[1] = 1
    nodes: list[CustomLossNode]


class CreateCustomLossRequest(Request):
    """Uploads a traced loss."""

    session_id: str
    custom_loss_seq_id: SeqId
    name: str
    inputs: list[CustomLossInput]
    graph: CustomLossGraph
    type: Literal["create_custom_loss"] = "create_custom_loss"


class CreateCustomLossResponse(Response):
    """An uploaded loss."""

    loss_id: str
    type: Literal["create_custom_loss"] = "create_custom_loss"
