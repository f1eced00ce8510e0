# SPDX-License-Identifier: Apache-2.0
"""Triton: what decode attention does with a tile of tokens, whatever their kind.

The state of the online softmax lies as lanes hold products: sums are of eight parts of the tokens,
those of different lanes, which meet only at the end.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from sglang_diffxkv.kernels.gpu.fragments import key_element, value_element
from sglang_diffxkv.kernels.gpu.payload import CODE_UNIT
from sglang_diffxkv.kernels.gpu.scores import capped

WEIGHT_LOG2: tl.constexpr = tl.constexpr(4.0)
"""Weights are 2**4 times larger than those of softmax: times value scales of 4,000 they do not
overflow in fp16, and times scales around 0.001 they are clear of its subnormals."""


class RawTile(NamedTuple):
    """Some raw tokens: [N] each.

    Attributes:
        k, v: pointers to their rows.
        mask: whether there is such a token.
        place: int32, in the sequence's list, whose pages have 64 places each.
    """

    k: tl.tensor
    v: tl.tensor
    mask: tl.tensor
    place: tl.tensor


class LaneState(NamedTuple):
    """Online softmax of G rows, queries of one head each: fp32.

    Attributes:
        top: [G], the maximum of the scores.
        total, zeros: [8, G], sums of weights, and of weighted zeros.
        acc: [D, G], sum of weighted values.
    """

    top: tl.tensor
    total: tl.tensor
    zeros: tl.tensor
    acc: tl.tensor


@triton.jit
def empty_state(TRAITS: tl.constexpr):
    """The `LaneState` of no tokens."""
    ROWS: tl.constexpr = TRAITS.rows_block
    DIM: tl.constexpr = TRAITS.dim_block
    parts = tl.zeros([8, ROWS], tl.float32)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    return LaneState(top, parts, parts, tl.zeros([DIM, ROWS], tl.float32))


@triton.jit
def softmax_step(state, scores, MAY_SEE_NONE: tl.constexpr):
    """Weights of a tile's scores, what the state fades by, and the state at its new maximum.

    Args:
        scores: fp32 [N / 16, 2, 8, G], as lanes hold products: the eight are in different ones.
        MAY_SEE_NONE: whether a row may have seen no token yet.

    Returns:
        Weights, as scores; fade [1, G]; the state, of which zeros are as they were.
    """
    top = tl.maximum(state.top, tl.max(tl.max(tl.max(scores, 1), 0), 0))
    base = top
    if MAY_SEE_NONE:  # any finite base keeps -inf - -inf = NaN out
        base = tl.where(top == -float("inf"), 0.0, top)
    weights = tl.exp2(scores - (base - WEIGHT_LOG2)[None, None, None, :])
    fade = tl.exp2(state.top - base)[None, :]
    total = state.total * fade + lane_sums(weights)
    return weights, fade, LaneState(top, total, state.zeros, state.acc * fade)


@triton.jit
def lane_sums(x):
    """Sums over what a lane holds of x [N / 16, 2, 8, G]: [8, G]."""
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def attend_rows(state, query, tile, ends, queries, TRAITS: tl.constexpr):
    """Take a tile of raw tokens into the state.

    Args:
        query: fp32 [dim_block, G], of `load_query`.
        tile: `RawTile`.
        ends: int32 [G], places before which each row sees, in its window; None: all rows see all.
        queries: `QueryView` that they are of.
    """
    DIM: tl.constexpr = TRAITS.dim
    DIM_BLOCK: tl.constexpr = TRAITS.dim_block
    column = tl.arange(0, DIM_BLOCK)
    inside = tile.mask[:, None]
    if DIM != DIM_BLOCK:
        inside = inside & (column < DIM)[None, :]
    key = tl.load(tile.k[:, None] + column[None, :], mask=inside, other=0)
    value = tl.trans(tl.load(tile.v[:, None] + column[None, :], mask=inside, other=0))
    if TRAITS.in_fp32:
        scores = tl.dot(key.to(tl.float32), query, input_precision="ieee")
    else:
        scores = tl.dot(key, query.to(key.dtype))
    scores = tl.reshape(scores, [scores.shape[0] // 16, 2, 8, scores.shape[1]])
    inside = tl.reshape(tile.mask, [scores.shape[0], 2, 8])[:, :, :, None]
    place = tl.reshape(tile.place, [scores.shape[0], 2, 8])[:, :, :, None]
    WINDOW: tl.constexpr = ends is not None and queries.window_left is not None
    CAUSAL: tl.constexpr = ends is not None and TRAITS.queries > 1
    if WINDOW:
        inside = inside & (place >= (ends - 1 - queries.window_left)[None, None, None, :])
    if CAUSAL:
        inside = inside & (place < ends[None, None, None, :])
    scores = capped(scores * queries.score_scale, queries.cap)
    scores = tl.where(inside, scores, -float("inf"))
    weights, _, state = softmax_step(state, scores, WINDOW or CAUSAL)
    weights = tl.reshape(weights, [key.shape[0], query.shape[1]])
    if TRAITS.in_fp32:
        acc = tl.dot(value.to(tl.float32), weights, state.acc, input_precision="ieee")
    else:
        # Weights of 8 bits would be the largest error by far: the rest of each is a second product.
        rounded = weights.to(key.dtype)
        acc = tl.dot(value, rounded, state.acc)
        acc = tl.dot(value, (weights - rounded.to(tl.float32)).to(key.dtype), acc)
    return LaneState(state.top, state.total, state.zeros, acc)


@triton.jit
def load_query(queries, at_row, BITS: tl.constexpr, TRAITS: tl.constexpr):
    """Some rows of a KV head: fp32 [G, dim_block].

    Args:
        queries: `QueryView`, from its first one on.
        at_row: the first of them: a group's queries of one new token, then of the next one.
        BITS: of the codes that they meet, in whose order they are (`key_element`); 0: of raw rows.
    """
    # Numbered here and in `store_state`: handed through they would take registers all the time.
    rows, column = at_row + tl.arange(0, TRAITS.rows_block), tl.arange(0, TRAITS.dim_block)
    at, weight, inside = column, 1.0, column < TRAITS.dim
    if BITS:
        at, weight, inside = key_element(column, BITS, TRAITS.dim, TRAITS.dim_block)
        weight = weight[None, :]
    mask = inside[None, :] & (rows < TRAITS.rows)[:, None]
    start = rows * TRAITS.dim
    if TRAITS.queries > 1:
        start = rows // TRAITS.group * queries.stride + rows % TRAITS.group * TRAITS.dim
    q = tl.load(queries.data + start[:, None] + at[None, :], mask=mask, other=0)
    return q.to(tl.float32) * weight


@triton.jit
def store_state(state, at_row, part, BITS: tl.constexpr, TRAITS: tl.constexpr):
    """Normalise, and write the attention state of some rows; -inf where there was no token.

    Args:
        at_row: the first of them.
        part: `AttentionState` of pointers: to out, fp32 [TRAITS.rows, D], and to lse, fp32 of each.
        BITS: of the values' codes; 0: they were raw.
    """
    total, zeros = tl.sum(state.total, 0), tl.sum(state.zeros, 0)
    some = total > 0
    total = tl.where(some, total, 1.0)
    rows, element = at_row + tl.arange(0, TRAITS.rows_block), tl.arange(0, TRAITS.dim_block)
    acc = state.acc
    at, inside = element, element < TRAITS.dim
    if BITS:
        at, weight, inside = value_element(element, BITS, TRAITS.dim, TRAITS.dim_block)
        acc *= (weight * CODE_UNIT)[:, None]
    mask = inside[:, None] & (rows < TRAITS.rows)[None, :]
    result = (acc + zeros[None, :]) / total[None, :]
    tl.store(part.out + rows[None, :] * TRAITS.dim + at[:, None], result, mask=mask)
    log_sum = tl.where(some, state.top + tl.log2(total) - WEIGHT_LOG2, -float("inf"))
    tl.store(part.lse + rows, log_sum, mask=rows < TRAITS.rows)
