# SPDX-License-Identifier: Apache-2.0
"""Many queries over sealed pages.

On a GPU a Triton kernel reads the sealed bytes themselves, on a CPU compiled C++ (`cpu`). Without a
compiler torch dequantises a bounded block of pages, then attends to it as to dense tokens.
"""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels.extend import cpu
from sglang_diffxkv.kernels.extend.dense import attend_all
from sglang_diffxkv.kernels.extend.lists import PageList
from sglang_diffxkv.kernels.gpu.device import on_gpu
from sglang_diffxkv.kernels.layout import PAGE_TOKENS, PageLayout, head_counts
from sglang_diffxkv.kernels.merge import AttentionState, concat_states, empty_state, merge_states
from sglang_diffxkv.kernels.pack import TokenRows, unpack_into
from sglang_diffxkv.kernels.pages import SealedTables

BLOCK_BYTES = 64 << 20
"""Most bytes of dequantised keys and values that exist at one time."""


def extend_sealed(
    q: torch.Tensor,
    q_indptr: torch.Tensor,
    arena: torch.Tensor,
    frames: torch.Tensor,
    heads: torch.Tensor,
    indptr: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    sm_scale: float,
) -> AttentionState:
    """Attention of every query over all kept tokens of its sequence's sealed pages.

    The pages lie before every query, so there is no causal mask. Computed in fp32; on a GPU with
    queries and weights in fp16, where the keys and values are codes.

    Args:
        q: [T, Hq, D] fp32, bf16 or fp16; elements of raw tiers are of the same dtype. Rotated,
            where the sealed keys are.
        q_indptr: int32 [B + 1], queries of each sequence.
        arena: uint8 [F, frame_bytes].
        frames, heads: int32 [V, max_frames] and [V, H, 2], this layer's directory tables.
        indptr: int32 [B + 1], into ``pages``.
        pages: int32 [N], rows of the tables.
        layout: byte layout.
        sm_scale: factor of the scores.
    """
    if on_gpu(q):
        from sglang_diffxkv.kernels.extend import triton

        return triton.extend_sealed(
            q, q_indptr, arena, frames, heads, indptr, pages, layout, sm_scale
        )
    library = cpu.library()
    if library is not None:
        step = cpu.Extend(library, q_indptr, None, PageList(indptr, pages))
        tables = SealedTables(arena, frames, heads, layout)
        return step.run(q, None, tables, sm_scale)
    parts = []
    page_bytes = 2 * PAGE_TOKENS * layout.num_kv_heads * layout.head_dim * 4
    block_pages = max(1, BLOCK_BYTES // page_bytes)
    queries, bounds = q_indptr.tolist(), indptr.tolist()
    for b in range(len(bounds) - 1):
        mine = q[queries[b] : queries[b + 1]]
        blocks = pages[bounds[b] : bounds[b + 1]].split(block_pages)
        part = _attend_block(mine, arena, frames, heads, blocks[0], layout, sm_scale)
        for block in blocks[1:]:
            part = merge_states(
                part, _attend_block(mine, arena, frames, heads, block, layout, sm_scale)
            )
        parts.append(part)
    return concat_states(parts) if parts else empty_state(q)


def _attend_block(
    q: torch.Tensor,
    arena: torch.Tensor,
    frames: torch.Tensor,
    heads: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    sm_scale: float,
) -> AttentionState:
    """Attention of q [t, Hq, D] over these pages, the kept tokens of a head side by side.

    Pruned tokens thus cost nothing; heads with fewer tokens than the fullest are masked at the end.
    """
    if len(q) == 0 or len(pages) == 0:
        return empty_state(q)
    n_high, n_low = head_counts(heads[pages])
    counts = n_high + n_low
    totals = counts.sum(0)
    length = int(totals.max())
    if length == 0:
        return empty_state(q)
    h = layout.num_kv_heads
    k, v = arena.new_zeros((2, h, length, layout.head_dim), dtype=torch.float32)
    first = counts.cumsum(0) - counts + torch.arange(0, h * length, length)
    rows = TokenRows(k.flatten(0, 1), v.flatten(0, 1))
    unpack_into(SealedTables(arena, frames, heads, layout), pages, first, rows, q.dtype)
    vacant = torch.arange(length) >= totals[:, None]
    bias = torch.zeros(h, length).masked_fill_(vacant, -torch.inf)
    part = attend_all(q, k, v, sm_scale, bias)
    # torch's kernel reports LSE 0 for a head without tokens.
    empty = (totals == 0).repeat_interleave(q.shape[1] // h)
    return AttentionState(part.out, part.lse.masked_fill(empty, -torch.inf))
