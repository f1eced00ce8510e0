# SPDX-License-Identifier: Apache-2.0
"""Which queries of a prefill step score the tokens before them.

XKV's mini-prefill scores with the last 8 queries of a prompt, DiffKV's release with the last 64
(`NUM_TOKENS_SCORE`); both judge the whole prompt by its end, which usually is the user's question.
A sealed page may be shared by prompts that go on differently, so one question must not decide it:
`sample_queries` strides evenly over each chunk, so that a page is judged by a regular sample of the
queries of its own chunk and of the following one. The last query always is in the sample: it is the
only one that sees every token of the chunk. `spread_queries`, the default policy's, takes half of
them from the end of the chunk. The baselines `snapkv` and `xkv` take the last ones alone.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

Longs = np.ndarray[tuple[int], np.dtype[np.int64]]


class SampledQueries(NamedTuple):
    """S sampled queries of a ragged batch of B chunks, ascending."""

    rows: torch.Tensor
    """int64 [S]: rows of the ragged batch of new tokens."""
    indptr: torch.Tensor
    """int32 [B + 1]: chunk b has the samples ``indptr[b]`` to ``indptr[b + 1]``."""
    offsets: torch.Tensor
    """int64 [S]: place of each query in its own chunk."""


Sampler = Callable[[list[int], int], SampledQueries]
"""Takes the new tokens of each chunk and the most queries to sample of one."""


def sample_queries(extend_lens: Sequence[int], n: int) -> SampledQueries:
    """Sample up to `n` queries of each chunk: all of a shorter one, else one of every ``len / n``.

    Args:
        extend_lens: [B] new tokens of each chunk.
        n: samples per chunk, at least 1.
    """
    return _sample(extend_lens, n, late=0)


def last_queries(extend_lens: Sequence[int], n: int) -> SampledQueries:
    """The last `n` queries of each chunk, all of a shorter one: SnapKV's observation window."""
    return _sample(extend_lens, n, late=n)


def spread_queries(extend_lens: Sequence[int], n: int) -> SampledQueries:
    """Half of up to `n` queries from the end of each chunk, half evenly from before those.

    The end of a prompt is where its question is, which tells best what the answer will need; the
    others speak for the questions that other requests may ask of the same prefix.
    """
    return _sample(extend_lens, n, late=n // 2)


def _sample(extend_lens: Sequence[int], n: int, late: int) -> SampledQueries:
    """Up to `late` queries from the end of each chunk, and evenly from before those up to `n`."""
    lens = np.asarray(extend_lens, dtype=np.int64)
    last = np.minimum(lens, late)
    early = np.minimum(lens - last, n - late)
    taken = early + last
    starts = _starts(taken)
    chunk = np.repeat(np.arange(len(lens)), taken)
    nth = np.arange(len(chunk)) - starts[chunk]
    # Rounded down, so that the early sample at nth = early - 1 is the one before the last ones.
    spread = (nth + 1) * (lens - last)[chunk] // np.maximum(early, 1)[chunk] - 1
    offsets = np.where(nth < early[chunk], spread, (lens - taken)[chunk] + nth)
    return SampledQueries(
        torch.from_numpy(_starts(lens)[chunk] + offsets),
        torch.from_numpy(starts.astype(np.int32)),
        torch.from_numpy(offsets),
    )


def _starts(lens: Longs) -> Longs:
    """[B] to [B + 1]: exclusive cumulative sums and the total."""
    return np.concatenate(([0], np.cumsum(lens)))
