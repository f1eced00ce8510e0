# SPDX-License-Identifier: Apache-2.0
"""Beginnings of documents, as token ids of the model at hand."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from sglang_diffxkv.config import ConfigError
from sglang_diffxkv.eval.documents.corpus import Document
from sglang_diffxkv.kernels.layout import PAGE_TOKENS

log = logging.getLogger(__name__)


class Passage(NamedTuple):
    """Text that is sealed up to its half, and predicted from there."""

    name: str
    ids: list[int]

    @property
    def half(self) -> int:
        """Tokens of the first half, whole pages."""
        return half_of(len(self.ids))


def half_of(length: int) -> int:
    """Tokens of the first half of `length`, whole pages.

    Raises:
        ConfigError: it would have none.
    """
    half = length // 2 // PAGE_TOKENS * PAGE_TOKENS
    if not half:
        raise ConfigError(f"documents of {length} tokens have no half of {PAGE_TOKENS}")
    return half


def cut(tokenizer: Any, documents: Sequence[Document], length: int, samples: int) -> list[Passage]:
    """The first `length` tokens of the first `samples` documents that have as many.

    Raises:
        ConfigError: none has.
    """
    passages: list[Passage] = []
    longest = 0
    for document in documents:
        ids = tokenizer.encode(document.text, verbose=False)  # that text is long is no news
        longest = max(longest, len(ids))
        if len(ids) >= length:
            passages.append(Passage(document.name, ids[:length]))
        if len(passages) == samples:
            return passages
    if not passages:
        raise ConfigError(f"no document has {length} tokens; the longest has {longest}")
    log.warning("%d documents have %d tokens, not %d", len(passages), length, samples)
    return passages
