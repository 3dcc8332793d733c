"""Prefix cache: keeps prompts' keys and values by blocks, in bounded memory.

A prompt is always computed in blocks of a fixed number of tokens, whether some of it is cached or
not. A block's keys and values depend on its tokens, on the blocks before it and on the shapes of
the computation, which are the same each time. A cached block therefore has the bits that computing
it again would give, on any device and for any model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from cachetools import LRUCache

from everstep.engine.models.kv_cache import KvCache, LayerCache

BLOCK = 128
"""Tokens that are computed at a time."""


class PrefixCache:
    """The most recently used blocks of prompts.

    Args:
        max_bytes: bound of all blocks together. 0 keeps none.
    """

    def __init__(self, max_bytes: int) -> None:
        self._blocks: LRUCache[bytes, LayerCache] = LRUCache(max_bytes, getsizeof=_nbytes)

    @property
    def nbytes(self) -> int:
        """Size of all blocks."""
        return int(self._blocks.currsize)

    def restore(self, namespace: str, tokens: np.ndarray[Any, Any], cache: KvCache) -> int:
        """Copy the cached blocks at the beginning of a prompt into an empty cache.

        Args:
            namespace: blocks of any other namespace are ignored.
            tokens: the part of the prompt that does not have to be computed.
            cache: the request's cache.

        Returns:
            The number of tokens that the cache now holds.
        """
        restored = []
        for key in _block_keys(namespace, tokens):
            block = self._blocks.get(key)
            if block is None:
                break
            for layer, (keys, values) in block.items():
                cache.append(layer, keys, values)
            restored.append(key)
        self._touch(restored)
        return BLOCK * len(restored)

    def store(self, namespace: str, tokens: np.ndarray[Any, Any], cache: KvCache) -> None:
        """Keep a prompt's complete blocks, evicting those used least recently.

        Args:
            namespace: the namespace that may reuse them.
            tokens: the prompt.
            cache: the request's cache, which holds all of the prompt.
        """
        keys = list(_block_keys(namespace, tokens))
        self._touch(keys)  # adding blocks evicts those of other prompts first
        for index in reversed(range(len(keys))):
            if keys[index] not in self._blocks:
                block = cache.copy_positions(index * BLOCK, (index + 1) * BLOCK)
                if _nbytes(block) > self._blocks.maxsize:
                    return
                self._blocks[keys[index]] = block
        self._touch(keys)

    def _touch(self, keys: Sequence[bytes]) -> None:
        """Mark a prompt's blocks as used, the first one last: the others are of no use without."""
        for key in reversed(keys):
            self._blocks.get(key)


def _block_keys(namespace: str, tokens: np.ndarray[Any, Any]) -> Iterator[bytes]:
    """Hash each complete block together with its namespace and all tokens before it."""
    digest = hashlib.blake2b(namespace.encode(), digest_size=32)
    digest.update(b"\0")
    for begin in range(0, len(tokens) // BLOCK * BLOCK, BLOCK):
        digest.update(tokens[begin : begin + BLOCK].astype("<i8").tobytes())
        yield digest.digest()


def _nbytes(block: LayerCache) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in block.values())
