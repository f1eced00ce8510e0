# SPDX-License-Identifier: Apache-2.0
"""Triton: pages of one sequence of a decode step."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def look_up_pages(
    req_to_token,
    context,
    rows,
    seq_lens,
    num_real,
    clock,
    counts,
    window,
    page_raw_slot,
    page_position,
    page_context,
    page_filled,
    page_window_step,
    page_last_used,
    table,
    lengths,
    count,
    last_len,
    new_rows,
    width,
    HAS_COUNTS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    PAGES: tl.constexpr,
):
    """Pages ``[program_id(1) * PAGES, ...)`` of sequence ``program_id(0)``: see `begin_decode`."""
    b, block = tl.program_id(0), tl.program_id(1)
    length = tl.load(seq_lens + b).to(tl.int32)
    length = tl.where(b < tl.load(num_real), length, 0)
    pages = tl.cdiv(length, PAGE_TOKENS)
    if block == 0:
        tl.store(lengths + b, length)
        tl.store(count + b, pages)
        tl.store(last_len + b, length - tl.maximum(pages - 1, 0) * PAGE_TOKENS)
        if pages == 0:
            tl.store(new_rows + b, tl.zeros([], tl.int64))
    if block * PAGES >= pages:
        return
    place = block * PAGES + tl.arange(0, PAGES)
    valid = place < pages
    row = req_to_token + tl.load(rows + b).to(tl.int64) * context
    page = tl.load(row + place * PAGE_TOKENS, mask=valid, other=0) // PAGE_TOKENS
    tl.store(table + b * width + place, page, mask=valid)
    tl.store(page_last_used + page, tl.load(clock) + tl.zeros_like(page), mask=valid)
    slot = tl.load(page_raw_slot + page, mask=valid, other=-1)
    is_open = slot >= 0
    written = tl.where(is_open, slot.to(tl.int64) * PAGE_TOKENS + (length - 1) % PAGE_TOKENS, 0)
    tl.store(new_rows + b + tl.zeros_like(place), written, mask=place == pages - 1)
    tl.store(page_position + page, place, mask=is_open)
    tl.store(page_context + page, length + tl.zeros_like(page), mask=is_open)
    filled = tl.minimum(length - place * PAGE_TOKENS, PAGE_TOKENS)
    tl.store(page_filled + page, filled, mask=is_open)
    recent = is_open & ((place + 1) * PAGE_TOKENS > length - window)
    tl.store(page_window_step + page, tl.load(clock + 1) + tl.zeros_like(page), mask=recent)
    if HAS_COUNTS:
        token = tl.arange(0, PAGE_TOKENS)
        earlier = place[:, None] * PAGE_TOKENS + token[None, :] < length - 1
        at = counts + slot[:, None] * PAGE_TOKENS + token[None, :]
        # Sequences of a batch may share an open page.
        tl.atomic_add(at, 1.0, mask=is_open[:, None] & earlier, sem="relaxed")
