# SPDX-License-Identifier: Apache-2.0
"""Triton: orders of the columns of queries, of raw rows, and of sums of values.

Codes come out of their words in an order of their own (`gpu.payload.element`), another one for each
width. Queries are loaded in the order of the keys that they meet. Sums of values are kept in one
order for all formats, and turned into that of a tier's codes before its first token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_diffxkv.kernels.gpu.payload import CODE_UNIT, element


@triton.jit
def quarters(column, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr):
    """Rows as four quarters, each padded on its own: int32 elements, and which are not padding.

    In this order sums of values serve all formats: it is that of the planes of 2 bits.
    """
    if DIM == DIM_BLOCK:
        return column, column < DIM
    within = column % (DIM_BLOCK // 4)
    return column // (DIM_BLOCK // 4) * (DIM // 4) + within, within < DIM // 4


@triton.jit
def ordered_queries(rows, seen, BITS: tl.constexpr, TRAITS: tl.constexpr):
    """Queries [M, dim_block] as keys of these bits want them, and their sums as rounded, fp32 [M].

    Args:
        rows: pointers [M]. seen: [M].
        BITS: of the keys; 0: raw ones, which are in the order of quarters.
    """
    DIM: tl.constexpr = TRAITS.shape.dim
    DIM_BLOCK: tl.constexpr = TRAITS.shape.dim_block
    column = tl.arange(0, DIM_BLOCK)
    if BITS:
        at, weight, inside = element(column, BITS, DIM)
    else:
        at, inside = quarters(column, DIM, DIM_BLOCK)
        weight = tl.full([DIM_BLOCK], 1.0, tl.float32)
    mask = seen[:, None] & inside[None, :]
    queries = tl.load(rows[:, None] + at[None, :], mask=mask, other=0).to(tl.float32)
    # Adding 0 changes no bit that matters. Plain loads would be read by the products from shared
    # memory, which takes more instructions, for the addresses, and no fewer registers.
    queries = (queries * weight[None, :] + 0.0).to(tl.float16 if BITS else TRAITS.compute)
    # Zeros cancel against codes exactly only if both meet the same, rounded queries.
    if BITS:
        # Dot products with 16 times 1/16, for exact sums in the layout of scores.
        ones = tl.broadcast_to((0.0625 / weight).to(tl.float16)[:, None], [DIM_BLOCK, 16])
        return queries, tl.sum(tl.dot(queries, ones), 1)
    else:
        return queries, tl.zeros([rows.shape[0]], tl.float32)


@triton.jit
def load_raw(rows, COMPUTE, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr):
    """Rows at pointers [N] of the model's dtype: [N, DIM_BLOCK]; 0 where padded."""
    column = tl.arange(0, DIM_BLOCK)
    at, inside = quarters(column, DIM, DIM_BLOCK)
    elements = tl.load(rows[:, None] + at[None, :], mask=inside[None, :], other=0)
    return elements.to(tl.float32).to(COMPUTE)


@triton.constexpr_function
def parts(BITS):
    """Quarters of values that lie side by side in a row of codes; the others are further planes."""
    return BITS // 2


@triton.jit
def _value_unit(BITS: tl.constexpr, DIM_BLOCK: tl.constexpr):
    """By what sums of codes are to be multiplied, fp32 [1, DIM_BLOCK], in the order of quarters."""
    quarter = tl.arange(0, DIM_BLOCK) // (DIM_BLOCK // 4)
    plane = quarter // parts(BITS)
    return (tl.exp2(-(plane * BITS).to(tl.float32)) * CODE_UNIT)[None, :]


@triton.jit
def values_of_codes(acc, BITS: tl.constexpr):
    """Sums [M, DIM_BLOCK] of codes, as `unpack_words` orders them, as those of values."""
    ROWS: tl.constexpr = acc.shape[0]
    DIM_BLOCK: tl.constexpr = acc.shape[1]
    acc = tl.reshape(acc, [ROWS, parts(BITS), DIM_BLOCK // 16, 2, 8 // BITS, 2])
    acc = tl.reshape(tl.permute(acc, [0, 4, 1, 2, 5, 3]), [ROWS, DIM_BLOCK])
    return acc * _value_unit(BITS, DIM_BLOCK)


@triton.jit
def codes_of_values(acc, BITS: tl.constexpr):
    """The inverse of `values_of_codes`."""
    ROWS: tl.constexpr = acc.shape[0]
    DIM_BLOCK: tl.constexpr = acc.shape[1]
    acc *= 1 / _value_unit(BITS, DIM_BLOCK)
    acc = tl.reshape(acc, [ROWS, 8 // BITS, parts(BITS), DIM_BLOCK // 16, 2, 2])
    return tl.reshape(tl.permute(acc, [0, 2, 3, 5, 1, 4]), [ROWS, DIM_BLOCK])
