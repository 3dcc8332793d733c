"""A tokenizer small enough to count by hand: a token for each byte, 256 begins, 257 ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

BEGIN, END = 256, 257
_MARKERS = {"<begin>": BEGIN, "<end>": END}


class ByteTokenizer:
    """Each byte is a token.

    Args:
        begin: the begin-of-sequence token, None for a model without one.
        template: renders messages, with or without a generation prompt. None for no chat template.
        is_fast: whether it gives each token's characters.
    """

    def __init__(
        self,
        begin: int | None = BEGIN,
        template: Callable[..., str] | None = None,
        is_fast: bool = True,
    ) -> None:
        self.bos_token_id = begin
        self.eos_token_id: int | None = END
        self.eos_token: Any = "<end>"
        self.chat_template: Any = template
        self.is_fast = is_fast

    def __call__(self, text: str, *, add_special_tokens: bool, **options: Any) -> Any:
        """Return the tokens of the bytes and of ``<begin>`` and ``<end>``, and their characters."""
        ids, offsets, at = [], [], 0
        while at < len(text):
            marker = next((each for each in _MARKERS if text.startswith(each, at)), text[at])
            own = [_MARKERS[marker]] if marker in _MARKERS else list(marker.encode())
            ids += own
            offsets += [(at, at + len(marker))] * len(own)
            at += len(marker)
        if add_special_tokens and self.bos_token_id is not None:
            ids, offsets = [self.bos_token_id, *ids], [(0, 0), *offsets]
        assert self.is_fast or not options.get("return_offsets_mapping")
        return {"input_ids": ids, "offset_mapping": offsets}

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool, **variables: Any
    ) -> Any:
        """Render a conversation by the template."""
        assert not tokenize
        return self.chat_template(conversation, add_generation_prompt, **variables)
