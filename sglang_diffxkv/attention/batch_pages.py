# SPDX-License-Identifier: Apache-2.0
"""The pages of one forward pass: which are open, which sealed; looked up once for all layers."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.pages import OpenLists, SealedLists
from sglang_diffxkv.kernels.step import PageMetadata
from sglang_diffxkv.pool.store import PageStateError, PageStore


class BatchPages(NamedTuple):
    """Ragged page lists of the B sequences of a batch, shared by all layers.

    Attributes:
        sealed, opened: as kernels take them.
        pages: int64 [No], the open pages' ids.
        last_len: int32 [B], tokens in the last page of each sequence, 1 to 64.
        any_sealed: whether ``sealed`` has an entry at all.
    """

    sealed: SealedLists
    opened: OpenLists
    pages: torch.Tensor
    last_len: torch.Tensor
    any_sealed: bool

    def per_page(self, values: torch.Tensor) -> torch.Tensor:
        """Repeat a value per sequence ([B]) for each of its open pages ([No])."""
        return torch.repeat_interleave(values, self.opened.indptr.diff())

    @property
    def sequence(self) -> torch.Tensor:
        """Int64 [No]: which sequence of the batch lists each open page."""
        return self.per_page(torch.arange(len(self.last_len), device=self.pages.device))


def _indptr(mask: torch.Tensor) -> torch.Tensor:
    counts = mask.sum(dim=1)
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def page_table(
    req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, max_len: int
) -> torch.Tensor:
    """Page ids by position, int64 [B, P]; anything behind a sequence's last page.

    Re-read each step, as the radix tree rewrites them.

    Args:
        req_to_token: int32 [max_requests, max_context], SGLang's ``ReqToTokenPool`` table.
        req_pool_indices: int64 [B]. max_len: tokens of the longest sequence.
    """
    first = torch.arange(0, max_len, PAGE_TOKENS, device=req_to_token.device)
    return req_to_token[req_pool_indices[:, None], first].long() // PAGE_TOKENS


def gather_pages(store: PageStore, table: torch.Tensor, seq_lens: torch.Tensor) -> BatchPages:
    """Sort the pages of a batch by their state.

    Args:
        table: from `page_table`. seq_lens: int64 [B], including this step's tokens.

    Raises:
        PageStateError: a page is free.
    """
    index = torch.arange(table.shape[1], device=table.device)
    valid = index * PAGE_TOKENS < seq_lens[:, None]
    slots = store.directory.raw_slot[table]
    is_open = valid & (slots >= 0)
    is_sealed = valid & (slots < 0)
    sealed = table[is_sealed]
    if not bool(store.directory.sealed[sealed].all()):
        raise PageStateError("a sequence of the batch has a free page")
    return BatchPages(
        sealed=SealedLists(_indptr(is_sealed), sealed.to(torch.int32)),
        opened=OpenLists(
            _indptr(is_open), slots[is_open], index.expand_as(table)[is_open].to(torch.int32)
        ),
        pages=table[is_open],
        last_len=((seq_lens - 1) % PAGE_TOKENS + 1).to(torch.int32),
        any_sealed=sealed.numel() > 0,
    )


def note_use(store: PageStore, batch: BatchPages, seq_lens: torch.Tensor, window: int) -> None:
    """Note in the directory that the batch's pages, open and sealed, are about to be used.

    Args:
        seq_lens: int64 [B], including this step's tokens. window: recent tokens to keep raw.
    """
    context = batch.per_page(seq_lens)
    store.recency.touch(batch.pages, batch.opened.position.long(), context, window)
    store.recency.read(batch.sealed.pages)


def page_metadata(store: PageStore) -> PageMetadata:
    """The tables in which a decode step notes what `note_use` and `count_scores` do."""
    d = store.directory
    counts = store.raw.counts if store.policy.needs_scores else None
    used = d.position, d.context, d.filled, d.window_step, d.last_used
    return PageMetadata(d.raw_slot, d.sealed, *used, counts, store.unread)
