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

WEIGHT_LOG2: tl.constexpr = tl.constexpr(4.0)
"""Weights are 2**4 times larger than those of softmax: times value scales of 4,000 they do not
overflow in fp16, and times scales around 0.001 they are clear of its subnormals."""


class LaneState(NamedTuple):
    """Online softmax of G queries: fp32.

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
    GROUP: tl.constexpr = TRAITS.group_block
    DIM: tl.constexpr = TRAITS.dim_block
    parts = tl.zeros([8, GROUP], tl.float32)
    top = tl.full([GROUP], -float("inf"), tl.float32)
    return LaneState(top, parts, parts, tl.zeros([DIM, GROUP], tl.float32))


@triton.jit
def softmax_step(state, scores):
    """Weights of a tile's scores, what the state fades by, and the state at its new maximum.

    Args:
        scores: fp32 [N / 16, 2, 8, G], as lanes hold products: the eight are in different ones.

    Returns:
        Weights, as scores; fade [1, G]; the state, of which zeros are as they were.
    """
    top = tl.maximum(state.top, tl.max(tl.max(tl.max(scores, 1), 0), 0))
    weights = tl.exp2(scores - (top - WEIGHT_LOG2)[None, None, None, :])
    fade = tl.exp2(state.top - top)[None, :]
    total = state.total * fade + lane_sums(weights)
    return weights, fade, LaneState(top, total, state.zeros, state.acc * fade)


@triton.jit
def lane_sums(x):
    """Sums over what a lane holds of x [N / 16, 2, 8, G]: [8, G]."""
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def attend_rows(state, query, keys, values, mask, score_scale, TRAITS: tl.constexpr):
    """Take a tile of raw tokens, given by pointers to their rows, into the state."""
    DIM: tl.constexpr = TRAITS.dim
    DIM_BLOCK: tl.constexpr = TRAITS.dim_block
    column = tl.arange(0, DIM_BLOCK)
    inside = mask[:, None]
    if DIM != DIM_BLOCK:
        inside = inside & (column < DIM)[None, :]
    key = tl.load(keys[:, None] + column[None, :], mask=inside, other=0)
    value = tl.trans(tl.load(values[:, None] + column[None, :], mask=inside, other=0))
    if TRAITS.in_fp32:
        scores = tl.dot(key.to(tl.float32), query, input_precision="ieee")
    else:
        scores = tl.dot(key, query.to(key.dtype))
    scores = tl.reshape(scores, [scores.shape[0] // 16, 2, 8, scores.shape[1]])
    inside = tl.reshape(mask, [scores.shape[0], 2, 8])[:, :, :, None]
    scores = tl.where(inside, scores * score_scale, -float("inf"))
    weights, _, state = softmax_step(state, scores)
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
def load_query(q, BITS: tl.constexpr, TRAITS: tl.constexpr):
    """The group's queries: fp32 [group_block, dim_block].

    Args:
        BITS: of the codes that they meet, in whose order they are (`key_element`); 0: of raw rows.
    """
    row, column = tl.arange(0, TRAITS.group_block), tl.arange(0, TRAITS.dim_block)
    at, weight, inside = column, 1.0, column < TRAITS.dim
    if BITS:
        at, weight, inside = key_element(column, BITS, TRAITS.dim, TRAITS.dim_block)
        weight = weight[None, :]
    mask = inside[None, :] & (row < TRAITS.group)[:, None]
    queries = tl.load(q + row[:, None] * TRAITS.dim + at[None, :], mask=mask, other=0)
    return queries.to(tl.float32) * weight


@triton.jit
def store_state(state, part, BITS: tl.constexpr, TRAITS: tl.constexpr):
    """Normalise, and write the attention state of the group; -inf where there was no token.

    Args:
        part: `AttentionState` of pointers: to out, fp32 [group, D], and to lse, fp32 [group].
        BITS: of the values' codes; 0: they were raw.
    """
    total, zeros = tl.sum(state.total, 0), tl.sum(state.zeros, 0)
    some = total > 0
    total = tl.where(some, total, 1.0)
    row, column = tl.arange(0, TRAITS.dim_block), tl.arange(0, TRAITS.group_block)
    acc = state.acc
    at, inside = row, row < TRAITS.dim
    if BITS:
        at, weight, inside = value_element(row, BITS, TRAITS.dim, TRAITS.dim_block)
        acc *= (weight * CODE_UNIT)[:, None]
    mask = inside[:, None] & (column < TRAITS.group)[None, :]
    result = (acc + zeros[None, :]) / total[None, :]
    tl.store(part.out + column[None, :] * TRAITS.dim + at[:, None], result, mask=mask)
    log_sum = tl.where(some, state.top + tl.log2(total) - WEIGHT_LOG2, -float("inf"))
    tl.store(part.lse + column, log_sum, mask=column < TRAITS.group)
