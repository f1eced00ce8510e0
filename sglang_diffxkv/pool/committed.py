# SPDX-License-Identifier: Apache-2.0
"""Tokens that requests have for good: what the ledger counts, and what may be sealed.

A verification writes the drafts behind a sequence's committed tokens, and what of them is rejected
is written again by the next one. The first is the token that was sampled last, so it is always
accepted: a verification commits it, as a decode step does its token, and what else it accepted is
counted when the next one begins, or when the radix tree takes the request's pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.gpu.transfer import upload
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.recency import filled
from sglang_diffxkv.pool.store import PageStore


class AskedPages(NamedTuple):
    """Pages whose first token is committed, of requests that asked for another quality than the
    server's.

    Attributes:
        rows: ``req_pool_index`` of each page's request.
        positions: of its first token.
        quality: of each.
        lossless_full: pages of lossless requests that were filled.
    """

    rows: Sequence[int]
    positions: Sequence[int]
    quality: Sequence[Quality]
    lossless_full: int


class Committed(NamedTuple):
    """Committed tokens of B requests, before and after.

    Attributes:
        starts, ends: int64 [B] on the host.
        asked: None where no request asks for a quality.
    """

    starts: torch.Tensor
    ends: torch.Tensor
    asked: AskedPages | None = None


def count(store: PageStore, committed: Committed, req_to_token: torch.Tensor) -> None:
    """Have the store's ledger count what was committed, and note who asked for its pages.

    Args:
        req_to_token: int32 [max_requests, max_context], SGLang's ``ReqToTokenPool`` table.
    """
    starts, ends, asked = committed
    full = ends // PAGE_TOKENS - starts // PAGE_TOKENS
    store.ledger.commit(int((ends - starts).sum()), full=int(full.sum()))
    if asked is not None:
        note_quality(store, asked, req_to_token)


def note_quality(store: PageStore, asked: AskedPages, req_to_token: torch.Tensor) -> None:
    """`PageStore.note_quality` of pages that are given by their place in requests."""
    pages = torch.empty(0, dtype=torch.int64)
    if asked.quality:  # most decode steps open no page for them
        at = torch.tensor([asked.rows, asked.positions], dtype=torch.int64)
        rows, positions = upload(at, req_to_token.device)
        pages = req_to_token[rows, positions].long() // PAGE_TOKENS
    store.note_quality(pages, asked.quality, asked.lossless_full)


def fill(store: PageStore, row: torch.Tensor, start: int, end: int) -> None:
    """Note in the directory that a request has ``end`` committed tokens, where it had ``start``.

    Args:
        row: int32 [max_context], its row of SGLang's ``ReqToTokenPool`` table.
    """
    position = torch.arange(start // PAGE_TOKENS, -(-end // PAGE_TOKENS), device=row.device)
    pages = row[position * PAGE_TOKENS].long() // PAGE_TOKENS
    store.directory.filled[pages] = filled(position, end)
