# SPDX-License-Identifier: Apache-2.0
"""Triton: the work tiles of a decode step become the attention of each query."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_diffxkv.kernels.gpu.hadamard import hadamard_rows
from sglang_diffxkv.kernels.softmax import LOG2_E

_LOG2_E = tl.constexpr(LOG2_E)

ELEMENTS: tl.constexpr = tl.constexpr(4096)
"""Of tiles that are merged at a time, so that they stay in registers: a lone long sequence has
hundreds."""


@triton.constexpr_function
def rotated_block(dim):
    """Size of the blocks of `kernels.basis.rotation`."""
    return dim & -dim


@triton.jit
def merge_work_tiles(parts, segment_start, queries, key_mean, sinks, merged, SHAPE: tl.constexpr):
    """Merge the tiles of query head ``program_id(0)``, of B * N * Hq, by their base-2 LSE.

    Args:
        parts: `AttentionState` of the tiles, fp32 [tiles, rows, D] and [tiles, rows]; rows are a
            group's queries of one token, then of the next one.
        segment_start: int32 [B * H * 3 + 1].
        queries: `QueryView`, not rotated.
        key_mean: fp32 [H, D], which sealed keys lack: sealed tiles come back from the basis of
            sealed pages (`kernels.basis.sealed`). None: they do not.
        sinks: of `Softmax`, which count as one more part; None: there are none.
        merged: `AttentionState`, [B * N * Hq, D] of any float type, and fp32 LSE; 0 and -inf
            where nothing was attended.
        SHAPE: `HeadShape`, with N queries.
    """
    DIM: tl.constexpr = SHAPE.dim
    DIM_BLOCK: tl.constexpr = SHAPE.dim_block
    PARTS: tl.constexpr = ELEMENTS // DIM_BLOCK
    SIZE: tl.constexpr = rotated_block(DIM)
    query = tl.program_id(0)
    token, q_head = query // SHAPE.q_heads, query % SHAPE.q_heads
    head = q_head // SHAPE.group
    segments = segment_start + (token // SHAPE.queries * SHAPE.kv_heads + head) * 3
    member = token % SHAPE.queries * SHAPE.group + q_head % SHAPE.group
    ROWS: tl.constexpr = SHAPE.group * SHAPE.queries
    first = tl.load(segments)
    sealed = tl.load(segments + 1)
    end = tl.load(segments + 3)
    column = tl.arange(0, DIM_BLOCK)
    lacking = 0.0
    if key_mean is not None:
        at = token.to(tl.int64) * queries.stride + q_head * DIM
        inside = column < DIM
        elements = tl.load(queries.data + at + column, mask=inside, other=0).to(tl.float32)
        mean = tl.load(key_mean + head * DIM + column, mask=inside, other=0)
        lacking = tl.sum(elements * mean, 0) * queries.score_scale
    tops = tl.full([PARTS], -float("inf"), tl.float32)
    for at in range(first, end, PARTS):
        tile = at + tl.arange(0, PARTS)
        found = _tile_lse(parts.lse, tile, end, member, ROWS)
        tops = tl.maximum(tops, found + tl.where(tile < sealed, 0.0, lacking))
    top = tl.max(tops, 0)
    if sinks is not None:
        sink = tl.load(sinks + q_head) * _LOG2_E
        top = tl.maximum(top, sink)
    # Where all is empty, any finite base keeps -inf - -inf = NaN out.
    base = tl.where(top == -float("inf"), 0.0, top)
    if key_mean is not None:
        total, out = _sum_tiles(parts, sealed, end, base - lacking, member, SHAPE, ROWS)
        out = hadamard_rows(tl.reshape(out, [DIM_BLOCK // SIZE, SIZE])) * (SIZE**-0.5)
        open_total, open_out = _sum_tiles(parts, first, sealed, base, member, SHAPE, ROWS)
        out = tl.reshape(out, [DIM_BLOCK]) + open_out
        total += open_total
    else:
        total, out = _sum_tiles(parts, first, end, base, member, SHAPE, ROWS)
    if sinks is not None:
        total += tl.exp2(sink - base)
    out = out / tl.where(total > 0, total, 1.0)
    out = out.to(merged.out.dtype.element_ty)
    tl.store(merged.out + query.to(tl.int64) * DIM + column, out, mask=column < DIM)
    tl.store(merged.lse + query, base + tl.log2(total))


@triton.jit
def _sum_tiles(parts, first, end, base, member, SHAPE: tl.constexpr, ROWS: tl.constexpr):
    """Weights of tiles ``[first, end)`` relative to exp2(base), and their weighted sum [D]."""
    DIM: tl.constexpr = SHAPE.dim
    DIM_BLOCK: tl.constexpr = SHAPE.dim_block
    PARTS: tl.constexpr = ELEMENTS // DIM_BLOCK
    column = tl.arange(0, DIM_BLOCK)
    totals = tl.zeros([PARTS], tl.float32)
    acc = tl.zeros([PARTS, DIM_BLOCK], tl.float32)
    for at in range(first, end, PARTS):
        tile = at + tl.arange(0, PARTS)
        weights = tl.exp2(_tile_lse(parts.lse, tile, end, member, ROWS) - base)
        rows = parts.out + (tile.to(tl.int64) * ROWS + member)[:, None] * DIM
        inside = (tile < end)[:, None] & (column < DIM)[None, :]
        acc += weights[:, None] * tl.load(rows + column[None, :], mask=inside, other=0)
        totals += weights
    return tl.sum(totals, 0), tl.sum(acc, 0)


@triton.jit
def _tile_lse(lse, tile, end, member, ROWS: tl.constexpr):
    return tl.load(lse + tile * ROWS + member, mask=tile < end, other=-float("inf"))
