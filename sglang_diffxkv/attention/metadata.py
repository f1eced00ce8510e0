# SPDX-License-Identifier: Apache-2.0
"""The pages of one forward pass: which are open, which sealed, and what scores them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.gpu.transfer import upload
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.step import PageMetadata
from sglang_diffxkv.policy.scoring import Sampler
from sglang_diffxkv.pool.store import NotedQuality, PageStateError, PageStore


class BatchPages(NamedTuple):
    """Ragged page lists of the B sequences of a batch, shared by all layers.

    Attributes:
        sealed_indptr: int32 [B + 1]; sealed: int32 [Ns] page ids.
        open_indptr: int32 [B + 1]; slots: int32 [No] raw slots; position: int32 [No] index of each
            open page in its sequence, ascending within a sequence.
        pages: int64 [No], the open pages' ids.
        last_len: int32 [B], tokens in the last page of each sequence, 1 to 64.
        any_sealed: whether ``sealed`` has an entry at all.
    """

    sealed_indptr: torch.Tensor
    sealed: torch.Tensor
    open_indptr: torch.Tensor
    slots: torch.Tensor
    position: torch.Tensor
    pages: torch.Tensor
    last_len: torch.Tensor
    any_sealed: bool


class ScoringQueries(NamedTuple):
    """Sampled queries of a batch, for ``kernels.score``.

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
    ) -> ScoringQueries:
        """Queries at absolute ``position`` (int64 [S])."""
        log2_seen = torch.log2((position + 1).float())[:, None]
        return cls(rows, indptr, position.to(torch.int32), log2_seen)


def _indptr(mask: torch.Tensor) -> torch.Tensor:
    counts = mask.sum(dim=1)
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def gather_pages(
    store: PageStore,
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    max_len: int,
) -> BatchPages:
    """Look up the pages of a batch. Rows are re-read each step: the radix tree rewrites them.

    Args:
        req_to_token: int32 [max_requests, max_context], SGLang's ``ReqToTokenPool`` table.
        rows: int64 [B]. seq_lens: int64 [B], including this step's tokens. max_len: their maximum.

    Raises:
        PageStateError: a page is free.
    """
    index = torch.arange(-(-max_len // PAGE_TOKENS), device=rows.device)
    pages = req_to_token[rows[:, None], index * PAGE_TOKENS].long() // PAGE_TOKENS
    valid = index * PAGE_TOKENS < seq_lens[:, None]
    slots = store.directory.raw_slot[pages]
    is_open = valid & (slots >= 0)
    is_sealed = valid & (slots < 0)
    sealed = pages[is_sealed]
    if not bool(store.directory.sealed[sealed].all()):
        raise PageStateError("a sequence of the batch has a free page")
    return BatchPages(
        sealed_indptr=_indptr(is_sealed),
        sealed=sealed.to(torch.int32),
        open_indptr=_indptr(is_open),
        slots=slots[is_open],
        position=index.expand_as(pages)[is_open].to(torch.int32),
        pages=pages[is_open],
        last_len=((seq_lens - 1) % PAGE_TOKENS + 1).to(torch.int32),
        any_sealed=sealed.numel() > 0,
    )


def per_page(batch: BatchPages, values: torch.Tensor) -> torch.Tensor:
    """Repeat a value per sequence ([B]) for each of its open pages ([No])."""
    return torch.repeat_interleave(values, batch.open_indptr.diff())


def note_use(store: PageStore, batch: BatchPages, seq_lens: torch.Tensor, window: int) -> None:
    """Note in the directory that the batch's pages, open and sealed, are about to be used.

    Args:
        seq_lens: int64 [B], including this step's tokens. window: recent tokens to keep raw.
    """
    store.touch(batch.pages, batch.position.long(), per_page(batch, seq_lens), window)
    store.read(batch.sealed)


def page_metadata(store: PageStore) -> PageMetadata:
    """The tables in which a decode step records what `note_use` and `count_scores` do."""
    d = store.directory
    counts = store.raw.counts if store.policy.needs_scores else None
    return PageMetadata(
        d.raw_slot, d.position, d.context, d.filled, d.window_step, d.last_used, counts
    )


def note_quality(
    store: PageStore,
    batch: BatchPages,
    prefix_lens: torch.Tensor,
    quality: torch.Tensor,
    noted: NotedQuality,
) -> None:
    """Note what was asked for, of the pages that were opened for this step.

    Args:
        prefix_lens: int64 [B], tokens that were there before. quality: uint8 [B], `Quality` of each
            request. noted: the same pages in numbers.
    """
    opened = batch.position * PAGE_TOKENS >= per_page(batch, prefix_lens)
    store.set_quality(batch.pages[opened], per_page(batch, quality)[opened], noted)


def decode_queries(seq_lens: torch.Tensor) -> ScoringQueries:
    """Every decode step's query scores the open pages (DiffKV's decode scoring)."""
    indptr = torch.arange(seq_lens.numel() + 1, dtype=torch.int32, device=seq_lens.device)
    return ScoringQueries.at(None, indptr, seq_lens - 1)


def extend_queries(
    positions: torch.Tensor,
    q_indptr: torch.Tensor,
    prefix_lens: torch.Tensor,
    extend_lens: list[int],
    num_queries: int,
    sampler: Sampler,
) -> ScoringQueries:
    """Sampled queries of a prefill batch.

    Args:
        positions: int64 [T], of all new tokens. q_indptr: int32 [B + 1]. prefix_lens: int64 [B].
        extend_lens: on the host.
    """
    if max(extend_lens) <= num_queries:  # every sampler takes all of such chunks
        return ScoringQueries.at(None, q_indptr, positions[: sum(extend_lens)])
    sampled = sampler(extend_lens, num_queries)
    rows, indptr, offsets = (upload(x, prefix_lens.device) for x in sampled)
    start = torch.repeat_interleave(prefix_lens, indptr.diff(), output_size=len(rows))
    return ScoringQueries.at(rows, indptr, offsets + start)


def count_scores(store: PageStore, batch: BatchPages, queries: ScoringQueries) -> None:
    """Add to each open token's count the sampled queries that come after it (once per step)."""
    sequence = per_page(batch, torch.arange(queries.indptr.numel() - 1, device=batch.pages.device))
    offsets = torch.arange(PAGE_TOKENS, device=batch.pages.device)
    tokens = batch.position.long()[:, None] * PAGE_TOKENS + offsets
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
    store.raw.counts.index_add_(0, batch.slots.long(), later.to(torch.float32))


class SealBatch(NamedTuple):
    """Pages to seal, each once.

    Attributes:
        pages: int64 [N], ascending.
        sequence: int64 [N], the first sequence of the batch that has the page.
    """

    pages: torch.Tensor
    sequence: torch.Tensor


def pages_to_seal(store: PageStore, batch: BatchPages, scored_lens: torch.Tensor) -> SealBatch:
    """Open pages that may be sealed, are in no recent window and scored by a step after their own.

    Args:
        scored_lens: int64 [B], tokens that were there before this step; those of this step, too,
            where the policy needs no scores.
    """
    scored = (batch.position + 1) * PAGE_TOKENS <= per_page(batch, scored_lens)
    ready = scored & ~store.in_window(batch.pages) & store.may_seal(batch.pages)
    pages, place = torch.unique(batch.pages[ready], return_inverse=True)
    owner = per_page(batch, torch.arange(scored_lens.numel(), device=batch.pages.device))[ready]
    sequence = torch.empty_like(pages).scatter_reduce_(0, place, owner, "amin", include_self=False)
    return SealBatch(pages, sequence)


class ReadyPages(NamedTuple):
    """Pages that may be sealed, found without waiting for the device.

    Attributes:
        pages: int64 [N]. ready: bool [N], which of them are any.
    """

    pages: torch.Tensor
    ready: torch.Tensor


def ready_pages(
    store: PageStore,
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    scored_lens: torch.Tensor,
    max_len: int,
    due: int,
) -> ReadyPages:
    """`pages_to_seal` where the host knows about how many there are: the first of them.

    Args:
        req_to_token, rows, max_len: as in `gather_pages`. scored_lens: as in `pages_to_seal`.
        due: how many are expected, N.
    """
    index = torch.arange(-(-max_len // PAGE_TOKENS), device=rows.device)
    pages = req_to_token[rows[:, None], index * PAGE_TOKENS].long() // PAGE_TOKENS
    scored = (index + 1) * PAGE_TOKENS <= scored_lens[:, None]
    is_open = store.directory.raw_slot[pages] >= 0
    ready = (scored & is_open & ~store.in_window(pages) & store.may_seal(pages)).flatten()
    place = ready.cumsum(0) - 1
    place = torch.where(ready & (place < due), place, due)
    found = pages.new_zeros(due + 1).scatter_(0, place, pages.flatten())[:due]
    again = (found[:, None] == found).tril(-1).any(1)  # two sequences may share one
    return ReadyPages(found, (torch.arange(due, device=rows.device) < ready.sum()) & ~again)
