# SPDX-License-Identifier: Apache-2.0
"""Ways to read a document at a server: what has been sealed when its second half is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from sglang_diffxkv.client import Client
from sglang_diffxkv.eval.ask import TOP, WARM_TOKENS, CacheError, warm
from sglang_diffxkv.eval.documents.passages import Passage

STEP = 256
"""Tokens that a growing document grows by."""
_NAMESPACE = "documents"


class Reading(NamedTuple):
    """Distributions before T tokens of a passage.

    Attributes:
        places: int32 [T], of these tokens in the passage.
        logprobs: float32 [T], of these tokens.
        top_ids: int32 [T, K]. top_logprobs: float32 [T, K], of the likeliest tokens, descending.
    """

    places: np.ndarray
    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


class Session:
    """One document at a server.

    Attributes:
        stats: of the pool before the second half was asked for; None of SGLang's own.
    """

    def __init__(self, client: Client, is_ours: bool) -> None:
        self._client = client
        self._is_ours = is_ours
        self.stats: dict[str, Any] | None = None
        client.flush_cache()

    def seal(self, ids: Sequence[int]) -> None:
        """Put the KV of `ids` into the cache."""
        warm(self._client, ids, _NAMESPACE)
        if self._is_ours:
            self.stats = self._client.stats()

    def read(self, ids: Sequence[int], start: int) -> Reading:
        """Distributions before the tokens of `ids` after `start`; it reads the KV of those before.

        Raises:
            CacheError: they were not in the cache.
            requests.RequestException: the server refused the request, or is gone.
        """
        found = self._client.generate(
            ids,
            max_new_tokens=WARM_TOKENS,
            extra_key=_NAMESPACE,
            return_logprob=True,
            logprob_start_len=start,
            top_logprobs_num=TOP,
        )["meta_info"]
        if found["cached_tokens"] != start:
            raise CacheError(
                f"of {start} tokens sent before, {found['cached_tokens']} were found in the prefix "
                "cache"
            )
        # SGLang has none before the first token that it computes.
        logprobs = [logprob for logprob, _, _ in found["input_token_logprobs"][1:]]
        top = np.array([[row[:2] for row in rows] for rows in found["input_top_logprobs"][1:]])
        return Reading(
            np.arange(start + 1, len(ids), dtype=np.int32),
            np.array(logprobs, np.float32),
            top[..., 1].astype(np.int32),
            top[..., 0].astype(np.float32),
        )


def half(session: Session, passage: Passage, other: Passage) -> Reading:
    """The first half is sealed, and the second half read at once, as in a chat's second turn."""
    session.seal(passage.ids[: passage.half])
    return session.read(passage.ids, passage.half)


def grow(session: Session, passage: Passage, other: Passage) -> Reading:
    """The second half comes in steps, which read what those before them left, sealed.

    This is a long chat, in which errors may add up. The first token of each step is left out.
    """
    session.seal(passage.ids[: passage.half])
    # The last one may be a token longer: alone it would have nothing before it in its step.
    ends = [*range(passage.half + STEP, len(passage.ids) - 1, STEP), len(passage.ids)]
    steps = pairwise([passage.half, *ends])
    return join([session.read(passage.ids[:end], start) for start, end in steps])


def shared(session: Session, passage: Passage, other: Passage) -> Reading:
    """As `half`, but the first half was sealed while another document's text followed it.

    What was pruned because that did not need it is what the second half may miss.
    """
    session.seal(passage.ids[: passage.half] + other.ids[:STEP])
    return session.read(passage.ids, passage.half)


Read = Callable[[Session, Passage, Passage], Reading]
"""Takes a passage and one of another document."""
TASKS: Mapping[str, Read] = {read.__name__: read for read in (half, grow, shared)}


def join(readings: Sequence[Reading]) -> Reading:
    """One of all their tokens."""
    return Reading(*map(np.concatenate, zip(*readings, strict=True)))
