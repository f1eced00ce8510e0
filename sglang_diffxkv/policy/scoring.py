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

import torch


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


def sample_queries(extend_lens: Sequence[int] | torch.Tensor, n: int) -> SampledQueries:
    """Sample up to `n` queries of each chunk: all of a shorter one, else one of every ``len / n``.

    Args:
        extend_lens: [B] new tokens of each chunk; a tensor's device is the results' device, and
            on an accelerator costs one synchronisation (S must be known): prefer the host's list.
        n: samples per chunk, at least 1.
    """
    lens = torch.as_tensor(extend_lens, dtype=torch.int64)
    taken = lens.clamp(max=n)
    chunk, nth = _members(taken)
    # Rounded down, so that the sample at nth = taken - 1 is the chunk's last query.
    offsets = (nth + 1) * lens[chunk] // taken[chunk] - 1
    return SampledQueries(_starts(lens)[chunk] + offsets, _starts(taken).to(torch.int32), offsets)


def last_queries(extend_lens: Sequence[int] | torch.Tensor, n: int) -> SampledQueries:
    """The last `n` queries of each chunk, all of a shorter one: SnapKV's observation window.

    Args:
        extend_lens, n: as for `sample_queries`.
    """
    lens = torch.as_tensor(extend_lens, dtype=torch.int64)
    taken = lens.clamp(max=n)
    chunk, nth = _members(taken)
    offsets = (lens - taken)[chunk] + nth
    return SampledQueries(_starts(lens)[chunk] + offsets, _starts(taken).to(torch.int32), offsets)


def spread_queries(extend_lens: Sequence[int] | torch.Tensor, n: int) -> SampledQueries:
    """Half of up to `n` queries from the end of each chunk, half evenly from before those.

    The end of a prompt is where its question is, which tells best what the answer will need; the
    others speak for the questions that other requests may ask of the same prefix.

    Args:
        extend_lens, n: as for `sample_queries`; all of a chunk that is shorter.
    """
    lens = torch.as_tensor(extend_lens, dtype=torch.int64)
    late = lens.clamp(max=n // 2)
    early = (lens - late).clamp(max=n - n // 2)
    chunk, nth = _members(early + late)
    early, late, lens = early[chunk], late[chunk], lens[chunk]
    offsets = torch.where(
        nth < early,
        (nth + 1) * (lens - late) // early.clamp(min=1) - 1,
        lens - late + nth - early,
    )
    starts = _starts(torch.as_tensor(extend_lens, dtype=torch.int64))
    taken = torch.bincount(chunk, minlength=len(starts) - 1)
    return SampledQueries(starts[chunk] + offsets, _starts(taken).to(torch.int32), offsets)


def _members(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B] to int64 [sum] twice: which chunk each sample is of, and its rank among that one's."""
    chunk = torch.repeat_interleave(counts)
    return chunk, torch.arange(len(chunk), device=counts.device) - _starts(counts)[chunk]


def _starts(lens: torch.Tensor) -> torch.Tensor:
    """[B] to [B + 1]: exclusive cumulative sums and the total."""
    return torch.nn.functional.pad(lens.cumsum(0), (1, 0))
