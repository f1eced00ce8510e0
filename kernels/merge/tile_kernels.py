# SPDX-License-Identifier: Apache-2.0
"""Triton: the work tiles of a decode step become the attention of each query."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_diffxkv.kernels.gpu.hadamard import hadamard_rows

ELEMENTS: tl.constexpr = tl.constexpr(4096)
"""Of tiles that are merged at a time, so that they stay in registers: a lone long sequence has
hundreds."""


@triton.constexpr_function
def rotated_block(dim):
    """Size of the blocks of `kernels.basis.rotation`."""
    return dim & -dim


@triton.jit
def merge_work_tiles(parts, segment_start, queries, key_mean, merged, SHAPE: tl.constexpr):
    """Merge the tiles of query head ``program_id(0)``, of B * Hq, by their base-2 LSE.

    Args:
        parts: `AttentionState` of the tiles, fp32 [N, group, D] and [N, group].
        segment_start: int32 [B * H * 3 + 1].
        queries: `QueryView`, not rotated.
        key_mean: fp32 [H, D], which sealed keys lack: sealed tiles come back from the basis of
            sealed pages (`kernels.basis.sealed`). None: they do not.
        merged: `AttentionState`, [B * Hq, D] of any float type, and fp32 [B * Hq]; 0 and -inf
            where nothing was attended.
        SHAPE: `HeadShape`.
    """
    DIM: tl.constexpr = SHAPE.dim
    DIM_BLOCK: tl.constexpr = SHAPE.dim_block
    PARTS: tl.constexpr = ELEMENTS // DIM_BLOCK
    SIZE: tl.constexpr = rotated_block(DIM)
    query = tl.program_id(0)
    row, member = query // SHAPE.group, query % SHAPE.group
    first = tl.load(segment_start + row * 3)
    sealed = tl.load(segment_start + row * 3 + 1)
    end = tl.load(segment_start + row * 3 + 3)
    column = tl.arange(0, DIM_BLOCK)
    lacking = 0.0
    if key_mean is not None:
        at = (query // SHAPE.q_heads).to(tl.int64) * queries.stride
        at += query % SHAPE.q_heads * DIM
        inside = column < DIM
        elements = tl.load(queries.data + at + column, mask=inside, other=0).to(tl.float32)
        mean = tl.load(key_mean + row % SHAPE.kv_heads * DIM + column, mask=inside, other=0)
        lacking = tl.sum(elements * mean, 0) * queries.score_scale
    tops = tl.full([PARTS], -float("inf"), tl.float32)
    for at in range(first, end, PARTS):
        tile = at + tl.arange(0, PARTS)
        found = _tile_lse(parts.lse, tile, end, member, SHAPE)
        tops = tl.maximum(tops, found + tl.where(tile < sealed, 0.0, lacking))
    top = tl.max(tops, 0)
    # Where all is empty, any finite base keeps -inf - -inf = NaN out.
    base = tl.where(top == -float("inf"), 0.0, top)
    if key_mean is not None:
        total, out = _sum_tiles(parts, sealed, end, base - lacking, member, SHAPE)
        out = hadamard_rows(tl.reshape(out, [DIM_BLOCK // SIZE, SIZE])) * (SIZE**-0.5)
        open_total, open_out = _sum_tiles(parts, first, sealed, base, member, SHAPE)
        out = tl.reshape(out, [DIM_BLOCK]) + open_out
        total += open_total
    else:
        total, out = _sum_tiles(parts, first, end, base, member, SHAPE)
    out = out / tl.where(total > 0, total, 1.0)
    out = out.to(merged.out.dtype.element_ty)
    tl.store(merged.out + query.to(tl.int64) * DIM + column, out, mask=column < DIM)
    tl.store(merged.lse + query, base + tl.log2(total))


@triton.jit
def _sum_tiles(parts, first, end, base, member, SHAPE: tl.constexpr):
    """Weights of tiles ``[first, end)`` relative to exp2(base), and their weighted sum [D]."""
    DIM: tl.constexpr = SHAPE.dim
    DIM_BLOCK: tl.constexpr = SHAPE.dim_block
    PARTS: tl.constexpr = ELEMENTS // DIM_BLOCK
    column = tl.arange(0, DIM_BLOCK)
    totals = tl.zeros([PARTS], tl.float32)
    acc = tl.zeros([PARTS, DIM_BLOCK], tl.float32)
    for at in range(first, end, PARTS):
        tile = at + tl.arange(0, PARTS)
        weights = tl.exp2(_tile_lse(parts.lse, tile, end, member, SHAPE) - base)
        rows = parts.out + (tile.to(tl.int64) * SHAPE.group + member)[:, None] * DIM
        inside = (tile < end)[:, None] & (column < DIM)[None, :]
        acc += weights[:, None] * tl.load(rows + column[None, :], mask=inside, other=0)
        totals += weights
    return tl.sum(totals, 0), tl.sum(acc, 0)


@triton.jit
def _tile_lse(lse, tile, end, member, SHAPE: tl.constexpr):
    return tl.load(lse + tile * SHAPE.group + member, mask=tile < end, other=-float("inf"))
