"""Chat templates: tokenizes texts and conversations for the service.

Tokenizer and chat template come from transformers, which the service's own process does not import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from everstep.conversations import (
    ConversationError,
    check_written,
    encode_prompt,
    encode_rendered,
    read_messages,
    render,
)
from everstep.engine.errors import InputError


def prompt_tokens(model_name: str, tokenizer: Any, prompt: Mapping[str, Any]) -> list[int]:
    """Tokenize a prompt.

    Args:
        model_name: for error texts.
        tokenizer: of transformers.
        prompt: ``{"text": …}``, or ``{"messages": […], "template": {…}}``: a conversation and
            further variables of its template.

    Raises:
        InputError: the model has no chat template, the template refuses the conversation or does
            not write a part of it, or the tokenizer refuses the text.
    """
    try:
        if "text" in prompt:
            return encode_prompt(tokenizer, prompt["text"])
        if not tokenizer.chat_template:
            raise InputError(
                f"Model {model_name} has no chat template. Use /v1/completions, or serve the model "
                "with a tokenizer that has one."
            )
        messages, variables = read_messages(prompt["messages"]), prompt["template"]
        check_written(tokenizer, messages, reply=True, variables=variables)
        text = render(tokenizer, messages, reply=True, variables=variables)
        return encode_rendered(tokenizer, text)
    except ConversationError as error:
        raise InputError(f"Model {model_name}: {error}") from error
