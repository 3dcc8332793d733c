"""A tokenizer small enough to count by hand: a token for each byte, 256 begins, 257 ends."""

import pytest

BEGIN, END = 256, 257


class ByteTokenizer:
    """Each byte is a token; a template, where given, is a function of the messages."""

    def __init__(self, begin=BEGIN, template=None):
        self.bos_token_id = begin
        self.eos_token_id = END
        self.chat_template = template

    def encode(self, text, *, add_special_tokens, verbose):
        assert not add_special_tokens
        begin, marker, rest = text.partition("<begin>")
        if marker and not begin:
            return [BEGIN, *rest.encode()]
        return list(text.encode())

    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt):
        assert not tokenize
        return self.chat_template(conversation, add_generation_prompt)


@pytest.fixture
def tokenizer():
    return ByteTokenizer()


@pytest.fixture
def templated():
    """Make a tokenizer with a template."""
    return lambda template: ByteTokenizer(template=template)
