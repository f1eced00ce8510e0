# SPDX-License-Identifier: Apache-2.0
"""Readable reference: one sequence, one page at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS

if TYPE_CHECKING:
    from sglang_diffxkv.kernels.step import PageNotes, StepPages


def begin_decode(
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    num_real: torch.Tensor,
    clock: torch.Tensor,
    notes: PageNotes,
    window: int,
) -> StepPages:
    """See :func:`sglang_diffxkv.kernels.step.begin_decode`."""
    from sglang_diffxkv.kernels.step import StepPages

    batch, width = len(rows), -(-req_to_token.shape[1] // PAGE_TOKENS)
    table = torch.zeros(batch, width, dtype=torch.int32)
    lengths, count, last_len = torch.zeros(3, batch, dtype=torch.int32)
    new_rows = torch.zeros(batch, dtype=torch.int64)
    step, decode_step = clock.tolist()
    for b in range(int(num_real)):
        length = int(seq_lens[b])
        pages = -(-length // PAGE_TOKENS)
        lengths[b], count[b], last_len[b] = length, pages, (length - 1) % PAGE_TOKENS + 1
        for place in range(pages):
            page = int(req_to_token[rows[b], place * PAGE_TOKENS]) // PAGE_TOKENS
            table[b, place] = page
            notes.last_used[page] = step
            slot = int(notes.raw_slot[page])
            if slot < 0:
                continue
            if place == pages - 1:
                new_rows[b] = slot * PAGE_TOKENS + (length - 1) % PAGE_TOKENS
            notes.position[page] = place
            notes.context[page] = length
            notes.filled[page] = min(PAGE_TOKENS, length - place * PAGE_TOKENS)
            if (place + 1) * PAGE_TOKENS > length - window:
                notes.window_step[page] = decode_step
            if notes.counts is not None:
                earlier = min(PAGE_TOKENS, length - 1 - place * PAGE_TOKENS)
                notes.counts[slot, :earlier] += 1
    return StepPages(table, lengths, count, last_len, new_rows)
