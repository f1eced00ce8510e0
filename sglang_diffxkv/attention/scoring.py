# SPDX-License-Identifier: Apache-2.0
"""Which queries of a prefill score the tokens of open pages, and what they have scored."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_diffxkv.attention.batch_pages import BatchPages
from sglang_diffxkv.kernels.gpu.transfer import upload
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.policy.scoring import Sampler
from sglang_diffxkv.pool.store import PageStore


class NewTokens(NamedTuple):
    """The tokens that a prefill step computes, of B sequences.

    Attributes:
        indptr: int32 [B + 1], where each sequence's start. positions: int64 [T].
        prefix_lens: int64 [B], tokens that were there before.
        lens: the number of new ones of each sequence, on the host.
    """

    indptr: torch.Tensor
    positions: torch.Tensor
    prefix_lens: torch.Tensor
    lens: list[int]


class ScoringSample(NamedTuple):
    """Which of a batch's queries score, for ``kernels.score``.

    Attributes:
        rows: int64 [S], rows of the batch's queries; None stands for all of them.
        indptr: int32 [B + 1].
        position: int32 [S], absolute position of each in its sequence.
        log2_seen: float32 [S, 1], base-2 logarithm of how many tokens each attends to.
    """

    rows: torch.Tensor | None
    indptr: torch.Tensor
    position: torch.Tensor
    log2_seen: torch.Tensor

    @classmethod
    def at(
        cls, rows: torch.Tensor | None, indptr: torch.Tensor, position: torch.Tensor
    ) -> ScoringSample:
        """Queries at absolute ``position`` (int64 [S])."""
        log2_seen = torch.log2((position + 1).float())[:, None]
        return cls(rows, indptr, position.to(torch.int32), log2_seen)


def extend_queries(new: NewTokens, num_queries: int, sampler: Sampler) -> ScoringSample:
    """Sampled queries of a prefill batch, up to ``num_queries`` of each sequence."""
    if max(new.lens) <= num_queries:  # every sampler takes all of such chunks
        return ScoringSample.at(None, new.indptr, new.positions[: sum(new.lens)])
    sampled = sampler(new.lens, num_queries)
    rows, indptr, offsets = (upload(x, new.prefix_lens.device) for x in sampled)
    start = torch.repeat_interleave(new.prefix_lens, indptr.diff(), output_size=len(rows))
    return ScoringSample.at(rows, indptr, offsets + start)


def count_scores(store: PageStore, batch: BatchPages, queries: ScoringSample) -> None:
    """Add to each open token's count the sampled queries that come after it (once per step)."""
    sequence = batch.sequence
    offsets = torch.arange(PAGE_TOKENS, device=batch.pages.device)
    tokens = batch.opened.position.long()[:, None] * PAGE_TOKENS + offsets
    if queries.rows is None:  # all new tokens ask, so their numbers tell
        last = queries.position[queries.indptr[1:].long() - 1][sequence]
        asked = queries.indptr.diff()[sequence]
        later = (last[:, None] - tokens).clamp(min=0).minimum(asked[:, None])
    else:
        stride = 2**32  # keys order by sequence, then position
        query_sequence = torch.repeat_interleave(queries.indptr.diff().long())
        query_keys = query_sequence * stride + queries.position
        token_keys = sequence[:, None] * stride + tokens
        not_later = torch.searchsorted(query_keys, token_keys, right=True)
        later = queries.indptr[1:].long()[sequence][:, None] - not_later
    store.raw.counts.index_add_(0, batch.opened.slots.long(), later.to(torch.float32))
