"""Texts and conversations as a model's tokens: what the worker does for the service.

The tokenizer and its chat template are transformers', which the service's process does not load.
"""

from __future__ import annotations

import json
from typing import Any

from jinja2.exceptions import TemplateError

from everstep.engine.errors import InputError


def prompt_tokens(model_name: str, tokenizer: Any, body: bytes) -> list[int]:
    """The tokens of a prompt.

    Args:
        model_name: for errors.
        tokenizer: of transformers.
        body: JSON: ``{"text": …}``, or ``{"messages": […], "template": {…}}`` of a conversation
            and what else its template is given.

    Raises:
        InputError: the model has no chat template, or that refuses the conversation.
    """
    wanted = json.loads(body)
    if "text" in wanted:
        return list(tokenizer(wanted["text"])["input_ids"])
    if not tokenizer.chat_template:
        raise InputError(
            f"Model {model_name} has no chat template. Use /v1/completions, or serve the model "
            "with a tokenizer that has one."
        )
    try:
        text = tokenizer.apply_chat_template(
            wanted["messages"], tokenize=False, add_generation_prompt=True, **wanted["template"]
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise InputError(f"The chat template of {model_name} refuses this: {error}") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
