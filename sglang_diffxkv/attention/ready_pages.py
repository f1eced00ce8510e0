# SPDX-License-Identifier: Apache-2.0
"""Which pages a step leaves ready to be sealed: full, scored and in no recent window."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_diffxkv.attention.batch_pages import BatchPages
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.pool.store import PageStore


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
    scored = (batch.opened.position + 1) * PAGE_TOKENS <= batch.per_page(scored_lens)
    ready = scored & _out_of_use(store, batch.pages)
    pages, place = torch.unique(batch.pages[ready], return_inverse=True)
    owner = batch.sequence[ready]
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
    store: PageStore, table: torch.Tensor, scored_lens: torch.Tensor, due: int
) -> ReadyPages:
    """`pages_to_seal` where the host knows about how many there are: the first of them.

    Args:
        table: int64 [B, P], from `page_table`. scored_lens: as in `pages_to_seal`.
        due: how many are expected, N.
    """
    index = torch.arange(table.shape[1], device=table.device)
    scored = (index + 1) * PAGE_TOKENS <= scored_lens[:, None]
    is_open = store.directory.raw_slot[table] >= 0
    ready = (scored & is_open & _out_of_use(store, table)).flatten()
    place = ready.cumsum(0) - 1
    place = torch.where(ready & (place < due), place, due)
    found = table.new_zeros(due + 1).scatter_(0, place, table.flatten())[:due]
    again = (found[:, None] == found).tril(-1).any(1)  # two sequences may share one
    return ReadyPages(found, (torch.arange(due, device=table.device) < ready.sum()) & ~again)


def _out_of_use(store: PageStore, pages: torch.Tensor) -> torch.Tensor:
    return ~store.recency.in_window(pages) & ~store.directory.never_compressed(pages)
