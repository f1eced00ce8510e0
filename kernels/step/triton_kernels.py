# SPDX-License-Identifier: Apache-2.0
"""Triton: pages of one sequence of a decode step."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.step import PageMetadata, StepPages

_PAGE_TOKENS = tl.constexpr(PAGE_TOKENS)


class Batch(NamedTuple):
    """The sequences of a step, as `begin_decode` is told them; ``context``: the table's width."""

    req_to_token: torch.Tensor
    context: int
    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    num_real: torch.Tensor


@triton.jit
def look_up_pages(
    batch: Batch,
    clock,
    metadata: PageMetadata,
    window,
    out: StepPages,
    PAGES: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Pages ``[program_id(1) * PAGES, ...)`` of sequence ``program_id(0)``: see `begin_decode`.

    Args:
        QUERIES: new tokens of the sequence.
    """
    b, block = tl.program_id(0), tl.program_id(1)
    length = tl.load(batch.seq_lens + b).to(tl.int32)
    length = tl.where(b < tl.load(batch.num_real), length, 0)
    # As the first new token's query sees it, which alone is known to be accepted.
    accepted = length - (QUERIES - 1)
    pages, width = tl.cdiv(length, _PAGE_TOKENS), tl.cdiv(batch.context, _PAGE_TOKENS)
    rows = out.rows + b * QUERIES
    if block == 0:
        tl.store(out.lengths + b, length)
        tl.store(out.count + b, pages)
        tl.store(out.last_len + b, length - tl.maximum(pages - 1, 0) * _PAGE_TOKENS)
        if pages == 0:
            for i in tl.static_range(QUERIES):
                tl.store(rows + i, tl.zeros([], tl.int64))
    if block * PAGES >= pages:
        return
    place = block * PAGES + tl.arange(0, PAGES)
    valid = place < pages
    row = batch.req_to_token + tl.load(batch.req_pool_indices + b).to(tl.int64) * batch.context
    page = tl.load(row + place * _PAGE_TOKENS, mask=valid, other=0) // _PAGE_TOKENS
    tl.store(out.table + b * width + place, page, mask=valid)
    tl.store(metadata.last_used + page, tl.load(clock) + tl.zeros_like(page), mask=valid)
    slot = tl.load(metadata.raw_slot + page, mask=valid, other=-1)
    is_open = slot >= 0
    closed = valid & (slot < 0)
    sealed = tl.load(metadata.sealed + page, mask=closed, other=1)
    unread = tl.sum((closed & (sealed == 0)).to(tl.int32))
    if unread > 0:  # never, unless the directory and the radix tree disagree
        tl.atomic_add(metadata.unread, unread, sem="relaxed")
    for i in tl.static_range(QUERIES):
        new = accepted - 1 + i
        row = tl.where(is_open, slot.to(tl.int64) * _PAGE_TOKENS + new % _PAGE_TOKENS, 0)
        tl.store(rows + i + tl.zeros_like(place), row, mask=place == new // _PAGE_TOKENS)
    tl.store(metadata.position + page, place, mask=is_open)
    tl.store(metadata.context + page, accepted + tl.zeros_like(page), mask=is_open)
    filled = tl.maximum(tl.minimum(accepted - place * _PAGE_TOKENS, _PAGE_TOKENS), 0)
    tl.store(metadata.filled + page, filled, mask=is_open)
    recent = is_open & ((place + 1) * _PAGE_TOKENS > accepted - window)
    tl.store(metadata.window_step + page, tl.load(clock + 1) + tl.zeros_like(page), mask=recent)
    if metadata.counts is not None:
        token = tl.arange(0, _PAGE_TOKENS)
        earlier = place[:, None] * _PAGE_TOKENS + token[None, :] < accepted - 1
        at = metadata.counts + slot[:, None] * _PAGE_TOKENS + token[None, :]
        # Sequences of a batch may share an open page.
        tl.atomic_add(at, 1.0, mask=is_open[:, None] & earlier, sem="relaxed")
