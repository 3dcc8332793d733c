"""Fixtures: tokenizers for the tests of training data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.cli.byte_tokenizer import ByteTokenizer


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    """A tokenizer without a chat template."""
    return ByteTokenizer()


@pytest.fixture
def templated() -> Callable[[Any], ByteTokenizer]:
    """Create a tokenizer with a chat template."""
    return lambda template: ByteTokenizer(template=template)
