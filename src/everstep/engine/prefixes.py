"""Prompt prefixes that were computed before: keys and values by blocks, in bounded memory.

A prompt is computed in blocks of a fixed number of tokens, whether something of it is known or
not. What a block's keys and values are depends on its tokens and the blocks before it, and on the
shapes of the computation, which are the same each time. So a block that was kept has the bits
that computing it again would give, on any device and for any model.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np

from everstep.engine.attention import KvCache, Layers

BLOCK = 128
"""Tokens that are computed at a time."""


class Prefixes:
    """Blocks of prompts, the ones used last.

    Args:
        most_bytes: what they may take together; 0 keeps none.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._bytes = 0
        self._blocks: OrderedDict[bytes, Layers] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """What the blocks take."""
        return self._bytes

    def restore(self, space: str, tokens: np.ndarray[Any, Any], cache: KvCache) -> int:
        """Put the known blocks at the beginning of a prompt into an empty cache.

        Args:
            space: whose prompts: what is computed in another one is not looked at.
            tokens: the part of the prompt that need not be computed.
            cache: of the request.

        Returns:
            How many tokens the cache now holds.
        """
        length = 0
        for key in _keys(space, tokens):
            if key not in self._blocks:
                break
            for layer, (keys, values) in self._blocks[key].items():
                cache.append(layer, keys, values)
            length += BLOCK
        return length

    def keep(self, space: str, tokens: np.ndarray[Any, Any], cache: KvCache) -> None:
        """Keep a prompt's whole blocks, as far as there is room.

        Args:
            space: whose prompt it is.
            tokens: the prompt.
            cache: of the request, which holds all of it.
        """
        if self._most == 0:
            return
        keys = list(_keys(space, tokens))
        for index, key in enumerate(keys):
            if key not in self._blocks:
                self._blocks[key] = cache.part(index * BLOCK, (index + 1) * BLOCK)
                self._bytes += _size(self._blocks[key])
        for key in reversed(keys):  # a block is of no use without those before it
            self._blocks.move_to_end(key)
        while self._bytes > self._most:
            _, block = self._blocks.popitem(last=False)
            self._bytes -= _size(block)


def _keys(space: str, tokens: np.ndarray[Any, Any]) -> Iterator[bytes]:
    """A key for each whole block: of its space, its tokens and all before them."""
    digest = hashlib.blake2b(space.encode(), digest_size=32)
    digest.update(b"\0")
    for begin in range(0, len(tokens) // BLOCK * BLOCK, BLOCK):
        digest.update(tokens[begin : begin + BLOCK].astype("<i8").tobytes())
        yield digest.digest()


def _size(block: Layers) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in block.values())
