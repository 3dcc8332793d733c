"""Examples of training data, and the error of data that can't be trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class DataError(ValueError):
    """Data that can't be trained on. The text names file and line, and the correction."""


@dataclass(frozen=True)
class Text:
    """A text of which every token is learnt, cut into windows of the maximum length.

    Attributes:
        where: file and line.
        text: the text.
    """

    where: str
    text: str


@dataclass(frozen=True)
class Completion:
    """A prompt, and its completion, which is learnt with an end token.

    Attributes:
        where: file and line.
        prompt: the context.
        completion: the learnt text.
    """

    where: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """A conversation, written by the model's chat template.

    Attributes:
        where: file and line.
        messages: as `everstep.conversations.read_messages` returns them.
        learnt: indices of the assistant's turns that are learnt.
        variables: of the chat template, such as ``tools``.
    """

    where: str
    messages: tuple[dict[str, Any], ...]
    learnt: tuple[int, ...]
    variables: Mapping[str, Any] = field(default_factory=dict)


Example = Text | Completion | Conversation
