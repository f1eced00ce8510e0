# SPDX-License-Identifier: Apache-2.0
"""Triton functions that unpack words of codes where tensor cores read them.

A lane of a warp holds certain rows and columns of a product's operands. The order of a head's
elements is ours to choose, for keys and queries as for values and outputs; here it is such that a
lane finds all codes of a word that it loads among those that it must hold. So words go from shared
memory to the lanes that need them, and their codes stay there: nothing is written back.

The compiler moves words, not codes, only if their tokens are split in two halves before and joined
after: it follows a product's layout back through joins, but a load's layout forward only up to a
split across lanes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def codes_of_word(bits):
    """Codes of a 32-bit word, which are half as many pairs."""
    return 32 // bits


@triton.jit
def code_pairs(word, byte_mask, BITS: tl.constexpr):
    """Pairs of codes in the halves of words, times ``2**-24`` and the planes' factors as fp16.

    Two codes at a time stay in the word that they were loaded in, which takes half the instructions
    of widening bytes. The compiler would undo that if it knew the mask: hence an argument.

    Args:
        word: uint32 of any shape.
        byte_mask: int32, always 0x00FF00FF.

    Returns:
        uint32 of word's shape and dimensions of 2: the byte of each half, then the plane's bits
        from the highest on.
    """
    pairs = tl.join(word, word >> 8)
    if BITS == 8:
        pairs = pairs & byte_mask
    elif BITS == 4:
        pairs = tl.join(pairs & (byte_mask & 0x000F000F), pairs & (byte_mask & 0x00F000F0))
    else:
        even = tl.join(pairs & (byte_mask & 0x00030003), pairs & (byte_mask & 0x00300030))
        odd = tl.join(pairs & (byte_mask & 0x000C000C), pairs & (byte_mask & 0x00C000C0))
        pairs = tl.join(even, odd)
    return pairs


@triton.jit
def halves(pairs):
    """The two codes of each pair, along a new last dimension: uint16."""
    return tl.join((pairs & 0xFFFF).to(tl.uint16), (pairs >> 16).to(tl.uint16))


@triton.jit
def split_tokens(word):
    """Even and odd rows of words [N, W], each [N / 2, W]."""
    return tl.split(tl.permute(tl.reshape(word, [word.shape[0] // 2, 2, word.shape[1]]), 0, 2, 1))


@triton.jit
def key_operand(word, byte_mask, BITS: tl.constexpr, DIM_BLOCK: tl.constexpr):
    """Codes of keys, to be multiplied with queries in the order of `key_element`.

    Columns, from the lowest bit up: the half of a word; three bits of the word's number, of which a
    lane holds two or all, as the compiler likes; then what a word and a lane have more than one of.

    Args:
        word: uint32 [N, W] of `payload.load_rows`; N is a multiple of 16.

    Returns:
        fp16 [N, DIM_BLOCK]; of 16 tokens first the even ones, then the odd ones.
    """
    N: tl.constexpr = word.shape[0]
    WORDS: tl.constexpr = word.shape[1]
    HIGH: tl.constexpr = min(4, WORDS)
    MIDDLE: tl.constexpr = min(2, WORDS // HIGH)
    LOW: tl.constexpr = WORDS // HIGH // MIDDLE
    even, odd = split_tokens(word)
    even, odd = halves(code_pairs(even, byte_mask, BITS)), halves(code_pairs(odd, byte_mask, BITS))
    codes = tl.join(even, odd)
    codes = tl.reshape(codes, [N // 16, 8, HIGH, MIDDLE, LOW, codes_of_word(BITS) // 2, 2, 2])
    codes = tl.permute(codes, 0, 7, 1, 4, 5, 3, 2, 6)
    return tl.reshape(codes, [N, DIM_BLOCK]).to(tl.float16, bitcast=True)


@triton.jit
def dots_by_lane(dots):
    """Products with `key_operand` [N, G] as lanes hold them: [N / 16, 2, 8, G].

    A lane has all but the third dimension; the second is of even and odd tokens.
    """
    return tl.reshape(dots, [dots.shape[0] // 16, 2, 8, dots.shape[1]])


@triton.jit
def by_lane(x):
    """What belongs to tokens, [N], beside `dots_by_lane`: [N / 16, 2, 8, 1]."""
    return tl.permute(tl.reshape(x, [x.shape[0] // 16, 8, 2]), 0, 2, 1)[:, :, :, None]


@triton.jit
def by_ordinal(x):
    """[N, G], in the order of tokens, of x in that of `dots_by_lane`."""
    return tl.reshape(tl.permute(x, 0, 2, 1, 3), [x.shape[0] * 16, x.shape[3]])


@triton.constexpr_function
def value_word(bits, dim_block):
    """Bits of the words that values are loaded in: of each there are eight, one to a lane."""
    return 32 if dim_block * bits >= 8 * 32 else 16


@triton.jit
def value_operand(word, byte_mask, BITS: tl.constexpr, DIM_BLOCK: tl.constexpr):
    """Codes of values, transposed; rows in the order of `value_element`.

    What tensor cores sum over, here tokens, lies in pairs in a register: so two tokens' words first
    exchange their halves.

    Args:
        word: uint32 or uint16 [N, W] of `payload.load_rows`, of as many bits as `value_word` says.

    Returns:
        fp16 [DIM_BLOCK, N].
    """
    N: tl.constexpr = word.shape[0]
    WORDS: tl.constexpr = word.shape[1]
    HIGH: tl.constexpr = min(8, WORDS)
    even, odd = split_tokens(word)
    if word.dtype == tl.uint16:
        pairs = even.to(tl.uint32) | (odd.to(tl.uint32) << 16)
    else:
        pairs = tl.join((even & 0xFFFF) | (odd << 16), (even >> 16) | (odd & 0xFFFF0000))
    codes = halves(code_pairs(pairs, byte_mask, BITS))
    codes = tl.reshape(codes, [N // 2, HIGH, WORDS // HIGH, DIM_BLOCK // WORDS, 2])
    codes = tl.permute(codes, 2, 3, 1, 0, 4)
    return tl.reshape(codes, [DIM_BLOCK, N]).to(tl.float16, bitcast=True)


@triton.jit
def key_element(column, BITS: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr):
    """Which element of a row each column of `key_operand` is, and its plane's weight.

    Args:
        column: int32.

    Returns:
        int32 elements, fp32 weights, and whether the column is not padding.
    """
    WORDS: tl.constexpr = DIM_BLOCK * BITS // 32
    HIGH: tl.constexpr = min(4, WORDS)
    MIDDLE: tl.constexpr = min(2, WORDS // HIGH)
    LOW: tl.constexpr = WORDS // HIGH // MIDDLE
    PAIRS: tl.constexpr = codes_of_word(BITS) // 2
    half, high, middle = column % 2, column // 2 % HIGH, column // (2 * HIGH) % MIDDLE
    rest = column // (2 * HIGH * MIDDLE)
    word = (high * MIDDLE + middle) * LOW + rest // PAIRS
    pair = rest % PAIRS
    odd = pair // (PAIRS // 2)
    return _element(word * 4 + half * 2 + odd, pair % (PAIRS // 2), BITS, DIM)


@triton.jit
def value_element(row, BITS: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr):
    """Which element of a value each row of `value_operand` is, as `key_element` tells it."""
    WORDS: tl.constexpr = DIM_BLOCK * BITS // value_word(BITS, DIM_BLOCK)
    HIGH: tl.constexpr = min(8, WORDS)
    CODES: tl.constexpr = DIM_BLOCK // WORDS
    PLANES: tl.constexpr = 8 // BITS
    word = row % HIGH * (WORDS // HIGH) + row // (HIGH * CODES)
    code = row // HIGH % CODES
    return _element(word * (CODES // PLANES) + code // PLANES, code % PLANES, BITS, DIM)


@triton.jit
def _element(byte, plane, BITS: tl.constexpr, DIM: tl.constexpr):
    BYTES: tl.constexpr = DIM * BITS // 8
    return byte + plane * BYTES, tl.exp2(-(plane * BITS).to(tl.float32)), byte < BYTES
