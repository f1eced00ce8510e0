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
    req_to_token, req_pool_indices, seq_lens, num_real, queries = requests
    batch, width = len(req_pool_indices), -(-req_to_token.shape[1] // PAGE_TOKENS)
    table = torch.zeros(batch, width, dtype=torch.int32)
    lengths, count, last_len = torch.zeros(3, batch, dtype=torch.int32)
    new_rows = torch.zeros(batch, queries, dtype=torch.int64)
    step, decode_step = clock.tolist()
    for b in range(int(num_real)):
        length = int(seq_lens[b])
        pages = -(-length // PAGE_TOKENS)
        lengths[b], count[b], last_len[b] = length, pages, (length - 1) % PAGE_TOKENS + 1
        accepted = length - queries + 1
        for place in range(pages):
            begin = place * PAGE_TOKENS
            page = int(req_to_token[req_pool_indices[b], begin]) // PAGE_TOKENS
            table[b, place] = page
            metadata.last_used[page] = step
            slot = int(metadata.raw_slot[page])
            if slot < 0:
                metadata.unread[0] += not metadata.sealed[page]
                continue
            for i, token in enumerate(range(length - queries, length)):
                if begin <= token < begin + PAGE_TOKENS:
                    new_rows[b, i] = slot * PAGE_TOKENS + token - begin
            metadata.position[page] = place
            metadata.context[page] = accepted
            metadata.filled[page] = min(max(accepted - begin, 0), PAGE_TOKENS)
            if begin + PAGE_TOKENS > accepted - window:
                metadata.window_step[page] = decode_step
            if metadata.counts is not None:
                earlier = min(max(accepted - 1 - begin, 0), PAGE_TOKENS)
                metadata.counts[slot, :earlier] += 1
    return StepPages(table, lengths, count, last_len, new_rows.flatten())
