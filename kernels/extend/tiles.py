# SPDX-License-Identifier: Apache-2.0
"""Triton: attention of a block of query rows over what a group of pages keeps in one tier.

Tiles are full: the group's tokens are one range of ranks (`gpu.ranks`). Scales and zeros never
touch an element, but are folded into the scores and the weights; rows are read in quarters
(`gpu.payload`), into four accumulators that serve all formats.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_diffxkv.kernels.extend.rows import softmax_step
from sglang_diffxkv.kernels.gpu.payload import (
    CODE_UNIT,
    arena_offset,
    load_meta,
    load_quarter,
    load_raw_quarter,
    plane_weight,
    row_bytes,
)
from sglang_diffxkv.kernels.gpu.ranks import page_of_rank

WEIGHT_UNIT: tl.constexpr = tl.constexpr(2.0**8)
"""Weights times value scales are this much larger in fp16, to stay clear of its subnormals."""


@triton.constexpr_function
def _alignment(NBYTES):
    """Largest power of two, at most 16, that divides a row's bytes."""
    return 16 if NBYTES % 16 == 0 else NBYTES & -NBYTES


@triton.constexpr_function
def _ends_plane(i, BITS):
    """Whether quarter ``i + 1`` is of the next plane."""
    return BITS == 2 or (BITS == 4 and i == 1)


@triton.jit
def _rows_of_ranks(frames, table, start, page, rank, mask, NBYTES: tl.constexpr, FRAME_BYTES):
    """Byte offsets in the arena, int64 [N], of rows of one section.

    Args:
        table: int64 [PAGES], where each page's row of the frame table starts.
        start: int32 [PAGES], where the section would start, had its page all earlier ranks too.
        page, rank, mask: [N].
    """
    virtual = tl.where(mask, tl.gather(start, page, 0) + rank * NBYTES, 0)
    rows = frames + tl.gather(table, page, 0)
    return arena_offset(rows, virtual, mask, FRAME_BYTES, _alignment(NBYTES))


@triton.jit
def _load_rows(arena, at, mask, BITS: tl.constexpr, RAW, QUARTER, BLOCK):
    """The four quarters of rows at byte offsets ``at``: codes in fp16, or raw elements in fp32."""
    if BITS == 0:
        rows = (arena + at).to(tl.pointer_type(RAW))
        return (
            load_raw_quarter(rows, mask, 0, QUARTER, BLOCK),
            load_raw_quarter(rows, mask, 1, QUARTER, BLOCK),
            load_raw_quarter(rows, mask, 2, QUARTER, BLOCK),
            load_raw_quarter(rows, mask, 3, QUARTER, BLOCK),
        )
    else:
        return (
            load_quarter(arena, at, mask, 0, BITS, QUARTER, BLOCK),
            load_quarter(arena, at, mask, 1, BITS, QUARTER, BLOCK),
            load_quarter(arena, at, mask, 2, BITS, QUARTER, BLOCK),
            load_quarter(arena, at, mask, 3, BITS, QUARTER, BLOCK),
        )


@triton.jit
def _dot_keys(q, keys, BITS: tl.constexpr, PRECISION: tl.constexpr):
    """q.k [M, N]; codes count in units of ``1 / CODE_UNIT``."""
    dots = tl.dot(q[3].to(keys[3].dtype), tl.trans(keys[3]), input_precision=PRECISION)
    # From the last plane to the first: each is as many times too large as its weight is small.
    for i in tl.static_range(2, -1, -1):
        if _ends_plane(i, BITS):
            dots *= 2.0**-BITS
        dots = tl.dot(q[i].to(keys[i].dtype), tl.trans(keys[i]), dots, input_precision=PRECISION)
    return dots


@triton.jit
def _add_values(acc, fade, weights, values, i: tl.constexpr, BITS: tl.constexpr, PRECISION):
    """Accumulators [M, BLOCK] of quarter ``i``, faded, plus the tile's weighted values."""
    if BITS:
        weights *= plane_weight(i, BITS)
    acc *= fade[:, None]
    return tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)


@triton.jit
def _settled(x):
    """x [N], computed once and not again by every thread that needs it.

    Triton recomputes what it deems cheap in the layout of its use, where a thread has many tokens:
    here, the search for each token's page. A sum over one element ends what it looks at.
    """
    return tl.sum(x[:, None], 1)


@triton.jit
def attend_tier(
    state,
    q,
    q_sum,
    arena,
    frames,
    table,
    counts,
    key_start,
    value_start,
    meta_start,
    score_scale,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGES: tl.constexpr,
    FRAME_BYTES: tl.constexpr,
):
    """All tokens that a group of pages keeps in one tier.

    Args:
        state: running maxima, sums and weighted zeros [M], and four accumulators [M, BLOCK] in
            units of ``CODE_UNIT / WEIGHT_UNIT``.
        q: four quarters fp32 [M, BLOCK]. q_sum: fp32 [M], the sum of their values in fp16.
        counts: int32 [PAGES]. key_start, value_start, meta_start: int32 [PAGES], sections.
    """
    KEY_BYTES: tl.constexpr = row_bytes(DIM, KEY_BITS, RAW.primitive_bitwidth // 8)
    VALUE_BYTES: tl.constexpr = row_bytes(DIM, VALUE_BITS, RAW.primitive_bitwidth // 8)
    QUARTER: tl.constexpr = DIM // 4
    ends = tl.cumsum(counts, 0)
    before = ends - counts
    key_start -= before * KEY_BYTES
    value_start -= before * VALUE_BYTES
    meta_start -= before * 8
    n = tl.sum(counts, 0)
    for first in tl.range(0, n, BLOCK_N, disable_licm=True):
        top, total, zeros, a0, a1, a2, a3 = state
        rank = first + tl.arange(0, BLOCK_N)
        mask = rank < n
        page = page_of_rank(ends, rank, PAGES)
        key_at = _rows_of_ranks(frames, table, key_start, page, rank, mask, KEY_BYTES, FRAME_BYTES)
        value_at = _rows_of_ranks(
            frames, table, value_start, page, rank, mask, VALUE_BYTES, FRAME_BYTES
        )
        # All loads before the first product, so that their latencies overlap.
        keys = _load_rows(arena, key_at, mask, KEY_BITS, RAW, QUARTER, BLOCK)
        if KEY_BITS == 0:
            scores = _dot_keys(q, keys, KEY_BITS, PRECISION) * score_scale
        else:
            meta_at = _rows_of_ranks(frames, table, meta_start, page, rank, mask, 8, FRAME_BYTES)
            key_scale, key_zero, value_scale, value_zero = load_meta(arena, meta_at, mask)
            scores = _dot_keys(q, keys, KEY_BITS, PRECISION)
            scores *= _settled(key_scale * (score_scale * CODE_UNIT))[None, :]
            scores += q_sum[:, None] * _settled(key_zero * score_scale)[None, :]
        values = _load_rows(arena, value_at, mask, VALUE_BITS, RAW, QUARTER, BLOCK)
        scores = tl.where(mask[None, :], scores, -float("inf"))
        weights, fade, top, total = softmax_step(top, total, scores)
        zeros *= fade
        if KEY_BITS == 0:
            weights *= WEIGHT_UNIT / CODE_UNIT
        else:
            zeros += tl.sum(weights * _settled(value_zero)[None, :], 1)
            weights *= _settled(value_scale * WEIGHT_UNIT)[None, :]
        a0 = _add_values(a0, fade, weights, values[0], 0, VALUE_BITS, PRECISION)
        a1 = _add_values(a1, fade, weights, values[1], 1, VALUE_BITS, PRECISION)
        a2 = _add_values(a2, fade, weights, values[2], 2, VALUE_BITS, PRECISION)
        a3 = _add_values(a3, fade, weights, values[3], 3, VALUE_BITS, PRECISION)
        state = top, total, zeros, a0, a1, a2, a3
    return state
