# SPDX-License-Identifier: Apache-2.0
"""Readable reference: one sequence, one page at a time."""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.step import PageMetadata, StepPages, StepRequests


def begin_decode(
    requests: StepRequests, metadata: PageMetadata, clock: torch.Tensor, window: int
) -> StepPages:
    """See `step.begin_decode`."""
    req_to_token, req_pool_indices, seq_lens, num_real = requests
    batch, width = len(req_pool_indices), -(-req_to_token.shape[1] // PAGE_TOKENS)
    table = torch.zeros(batch, width, dtype=torch.int32)
    lengths, count, last_len = torch.zeros(3, batch, dtype=torch.int32)
    new_rows = torch.zeros(batch, dtype=torch.int64)
    step, decode_step = clock.tolist()
    for b in range(int(num_real)):
        length = int(seq_lens[b])
        pages = -(-length // PAGE_TOKENS)
        lengths[b], count[b], last_len[b] = length, pages, (length - 1) % PAGE_TOKENS + 1
        for place in range(pages):
            page = int(req_to_token[req_pool_indices[b], place * PAGE_TOKENS]) // PAGE_TOKENS
            table[b, place] = page
            metadata.last_used[page] = step
            slot = int(metadata.raw_slot[page])
            if slot < 0:
                continue
            if place == pages - 1:
                new_rows[b] = slot * PAGE_TOKENS + (length - 1) % PAGE_TOKENS
            metadata.position[page] = place
            metadata.context[page] = length
            metadata.filled[page] = min(PAGE_TOKENS, length - place * PAGE_TOKENS)
            if (place + 1) * PAGE_TOKENS > length - window:
                metadata.window_step[page] = decode_step
            if metadata.counts is not None:
                earlier = min(PAGE_TOKENS, length - 1 - place * PAGE_TOKENS)
                metadata.counts[slot, :earlier] += 1
    return StepPages(table, lengths, count, last_len, new_rows)
