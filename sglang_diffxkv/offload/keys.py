# SPDX-License-Identifier: Apache-2.0
"""What a page's content is known by beyond its virtual id: a hash of all tokens up to its end.

It is SGLang's own: the chain over pages that it hashes into its KV events, so that the hash of a
page's block is read off its key. A chain of events leaves out ``extra_key``, and is named after it
only where they are published in Dynamo's format; the second half of a key always is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from sglang.srt.disaggregation.kv_events import kv_event_namespace_seed, namespaced_block_hash

from sglang_diffxkv.kernels.layout import PAGE_TOKENS

KEY_BYTES = 16
WORDS = KEY_BYTES // 8
"""int64 numbers that stand for a key in the page directory."""
_SALT_TAG = b"sglang-cache-salt-v1\0"  # as in SGLang's `compute_node_event_hash_values`


class PageKeys:
    """Keys of the full pages of one sequence, which grows.

    Args:
        extra_key, cache_salt: the request's, in SGLang's radix namespace.
        dynamo: whether KV events are published in Dynamo's format.
    """

    def __init__(self, extra_key: str | None, cache_salt: str | None, *, dynamo: bool) -> None:
        cache_salt = cache_salt or None  # as in SGLang's `RadixKey`
        self._seed = kv_event_namespace_seed(extra_key=extra_key, cache_salt=cache_salt)
        self._publishes_seed = dynamo
        self._digest = b""
        if cache_salt is not None:
            self._digest = hashlib.sha256(_SALT_TAG + cache_salt.encode()).digest()
        self._keys = bytearray()

    def __len__(self) -> int:
        """Pages whose keys are known."""
        return len(self._keys) // KEY_BYTES

    def extend(self, tokens: Sequence[int]) -> None:
        """Hash what the sequence has grown by.

        Args:
            tokens: all of the sequence; what is not a full page is left for later.
        """
        start, end = len(self) * PAGE_TOKENS, len(tokens) // PAGE_TOKENS * PAGE_TOKENS
        if start >= end:
            return
        words = np.asarray(tokens[start:end]).astype("<u4").tobytes()
        for page in range(0, len(words), PAGE_TOKENS * 4):
            link = self._digest + words[page : page + PAGE_TOKENS * 4]
            self._digest = hashlib.sha256(link).digest()
            self._keys += self._key(self._digest)

    def span(self, start: int, end: int) -> list[bytes]:
        """Keys of the pages from ``start`` to before ``end``."""
        edges = range(start * KEY_BYTES, end * KEY_BYTES, KEY_BYTES)
        return [bytes(self._keys[i : i + KEY_BYTES]) for i in edges]

    def numbers(self, start: int, end: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        """The same as the page directory has them: int64 [end - start, 2]."""
        return to_numbers(self._keys[start * KEY_BYTES : end * KEY_BYTES])

    def _key(self, digest: bytes) -> bytes:
        if self._seed is None:
            return digest[:KEY_BYTES]
        block, rest = digest[:8], int.from_bytes(digest[8:16]) ^ int.from_bytes(self._seed[:8])
        if self._publishes_seed:
            published = int.from_bytes(block, signed=True)
            published = namespaced_block_hash(published, namespace_seed=self._seed)
            block = published.to_bytes(8, signed=True)
        return block + rest.to_bytes(8)


def to_numbers(keys: bytes | bytearray) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Keys, one after the other, as the page directory has them: int64 [N, 2].

    The first number is the block hash of the page in SGLang's KV events.
    """
    return np.frombuffer(keys, dtype=">i8").astype(np.int64).reshape(-1, WORDS)


def from_numbers(numbers: np.ndarray[tuple[int, int], np.dtype[np.int64]]) -> list[bytes | None]:
    """Keys of pages from the page directory (int64 [N, 2]); None of those that have none."""
    found = numbers.astype(">i8")
    return [row.tobytes() if row.any() else None for row in found]
