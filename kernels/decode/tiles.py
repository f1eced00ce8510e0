# SPDX-License-Identifier: Apache-2.0
"""Triton: what decode attention does with a tile of tokens, whatever their kind."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_diffxkv.kernels.gpu.payload import CODE_UNIT, element

WEIGHT_UNIT: tl.constexpr = tl.constexpr(2.0**4)
"""Weights times value scales are this much larger in fp16: scales of 4,000 do not overflow, and
those of values around 0.001 are clear of its subnormals."""


@triton.jit
def attend_rows(
    top,
    total,
    zeros,
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
    scores = tl.where(mask[:, None], scores * score_scale, -float("inf"))
    weights, top, total, zeros, acc = softmax_step(top, total, zeros, acc, scores)
    if IN_FP32:
        acc = tl.dot(value.to(tl.float32), weights, acc, input_precision="ieee")
    else:
        # Weights of 8 bits would be the largest error by far: the rest of each is a second product.
        rounded = weights.to(key.dtype)
        acc = tl.dot(value, rounded, acc)
        acc = tl.dot(value, (weights - rounded.to(tl.float32)).to(key.dtype), acc)
    return top, total, zeros, acc


@triton.jit
def load_query(
    q,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    """The group's queries, transposed: fp32 [DIM_BLOCK, GROUP_BLOCK].

    Args:
        BITS: of the codes that they meet, in whose order they are (`element`); 0: of raw rows.
    """
    row, column = tl.arange(0, DIM_BLOCK), tl.arange(0, GROUP_BLOCK)
    at, weight, inside = row, 1.0, row < DIM
    if BITS:
        at, weight, inside = element(row, BITS, DIM)
        weight = weight[:, None]
    mask = inside[:, None] & (column < GROUP)[None, :]
    return (
        tl.load(q + column[None, :] * DIM + at[:, None], mask=mask, other=0).to(tl.float32) * weight
    )


@triton.jit
def empty_state(GROUP_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr):
    """Running maximum, sums of weights and of weighted zeros, and sum of weighted values."""
    nothing = tl.zeros([GROUP_BLOCK], tl.float32)
    acc = tl.zeros([DIM_BLOCK, GROUP_BLOCK], tl.float32)
    return tl.full([GROUP_BLOCK], -float("inf"), tl.float32), nothing, nothing, acc


@triton.jit
def softmax_step(top, total, zeros, acc, scores):
    """Weights of a tile's scores [BLOCK_N, GROUP_BLOCK], and the state at its new maximum."""
    new_top = tl.maximum(top, tl.max(scores, 0))
    weights = tl.exp2(scores - new_top[None, :])
    fade = tl.exp2(top - new_top)
    total = total * fade + tl.sum(weights, 0)
    return weights, new_top, total, zeros * fade, acc * fade[None, :]


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
    some = total > 0
    total = tl.where(some, total, 1.0)
    row, column = tl.arange(0, DIM_BLOCK), tl.arange(0, GROUP_BLOCK)
    at, inside = row, row < DIM
    if BITS:
        at, weight, inside = element(row, BITS, DIM)
        acc *= (weight * (CODE_UNIT / WEIGHT_UNIT))[:, None]
    mask = inside[:, None] & (column < GROUP)[None, :]
    result = (acc + zeros[None, :]) / total[None, :]
    tl.store(out + column[None, :] * DIM + at[:, None], result, mask=mask)
    tl.store(lse + column, tl.where(some, top + tl.log2(total), -float("inf")), mask=column < GROUP)
