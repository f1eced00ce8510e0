# SPDX-License-Identifier: Apache-2.0
"""Triton: what decode attention does with a tile of tokens, whatever their kind."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_diffxkv.kernels.gpu.fragments import key_element, value_element
from sglang_diffxkv.kernels.gpu.payload import CODE_UNIT

WEIGHT_LOG2: tl.constexpr = tl.constexpr(4.0)
"""Weights are 2**4 times larger than those of softmax: times value scales of 4,000 they do not
overflow in fp16, and times scales around 0.001 they are clear of its subnormals."""


@triton.jit
def attend_rows(
    top,
    total,
    acc,
    query,
    keys,
    values,
    mask,
    score_scale,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    IN_FP32: tl.constexpr,
):
    """A tile of raw tokens, given by pointers to their rows."""
    column = tl.arange(0, DIM_BLOCK)
    inside = mask[:, None]
    if DIM != DIM_BLOCK:
        inside = inside & (column < DIM)[None, :]
    key = tl.load(keys[:, None] + column[None, :], mask=inside, other=0)
    value = tl.trans(tl.load(values[:, None] + column[None, :], mask=inside, other=0))
    if IN_FP32:
        scores = tl.dot(key.to(tl.float32), query, input_precision="ieee")
    else:
        scores = tl.dot(key, query.to(key.dtype))
    scores = tl.reshape(scores, [scores.shape[0] // 16, 2, 8, scores.shape[1]])
    inside = tl.reshape(mask, [scores.shape[0], 2, 8])[:, :, :, None]
    scores = tl.where(inside, scores * score_scale, -float("inf"))
    weights, _, top, total, acc = softmax_step(top, total, acc, scores)
    weights = tl.reshape(weights, [key.shape[0], query.shape[1]])
    if IN_FP32:
        acc = tl.dot(value.to(tl.float32), weights, acc, input_precision="ieee")
    else:
        # Weights of 8 bits would be the largest error by far: the rest of each is a second product.
        rounded = weights.to(key.dtype)
        acc = tl.dot(value, rounded, acc)
        acc = tl.dot(value, (weights - rounded.to(tl.float32)).to(key.dtype), acc)
    return top, total, acc


@triton.jit
def load_query(
    q,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    """The group's queries: fp32 [GROUP_BLOCK, DIM_BLOCK].

    Args:
        BITS: of the codes that they meet, in whose order they are (`key_element`); 0: of raw rows.
    """
    row, column = tl.arange(0, GROUP_BLOCK), tl.arange(0, DIM_BLOCK)
    at, weight, inside = column, 1.0, column < DIM
    if BITS:
        at, weight, inside = key_element(column, BITS, DIM, DIM_BLOCK)
        weight = weight[None, :]
    mask = inside[None, :] & (row < GROUP)[:, None]
    return tl.load(q + row[:, None] * DIM + at[None, :], mask=mask, other=0).to(tl.float32) * weight


@triton.jit
def empty_state(GROUP_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr):
    """Running maximum, sums of weights and of weighted zeros, and sum of weighted values.

    The sums are of eight parts of the tokens, those of different lanes, which meet only at the end.
    """
    parts = tl.zeros([8, GROUP_BLOCK], tl.float32)
    acc = tl.zeros([DIM_BLOCK, GROUP_BLOCK], tl.float32)
    return tl.full([GROUP_BLOCK], -float("inf"), tl.float32), parts, parts, acc


@triton.jit
def softmax_step(top, total, acc, scores):
    """Weights of a tile's scores, what the state fades by, and the state at its new maximum.

    Args:
        scores: fp32 [N / 16, 2, 8, G], as lanes hold products: the eight are in different ones.

    Returns:
        Weights, as scores; fade [1, G]; the maximum [G], sum [8, G] and accumulator [D, G].
    """
    new_top = tl.maximum(top, tl.max(tl.max(tl.max(scores, 1), 0), 0))
    weights = tl.exp2(scores - (new_top - WEIGHT_LOG2)[None, None, None, :])
    fade = tl.exp2(top - new_top)[None, :]
    return weights, fade, new_top, total * fade + lane_sums(weights), acc * fade


@triton.jit
def lane_sums(x):
    """Sums over what a lane holds of x [N / 16, 2, 8, G]: [8, G]."""
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def store_part(
    top,
    total,
    zeros,
    acc,
    out,
    lse,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    """Normalise, and write fp32 out [GROUP, DIM] and lse [GROUP]; -inf where there was no token."""
    total, zeros = tl.sum(total, 0), tl.sum(zeros, 0)
    some = total > 0
    total = tl.where(some, total, 1.0)
    row, column = tl.arange(0, DIM_BLOCK), tl.arange(0, GROUP_BLOCK)
    at, inside = row, row < DIM
    if BITS:
        at, weight, inside = value_element(row, BITS, DIM, DIM_BLOCK)
        acc *= (weight * CODE_UNIT)[:, None]
    mask = inside[:, None] & (column < GROUP)[None, :]
    result = (acc + zeros[None, :]) / total[None, :]
    tl.store(out + column[None, :] * DIM + at[:, None], result, mask=mask)
    log_sum = tl.where(some, top + tl.log2(total) - WEIGHT_LOG2, -float("inf"))
    tl.store(lse + column, log_sum, mask=column < GROUP)
