# SPDX-License-Identifier: Apache-2.0
"""Triton functions that find and read the rows of sealed pages (`kernels.layout`).

Rows are read in *quarters*: tiles of D / 4 consecutive elements, whatever the format. A byte of a
split-plane row holds elements that lie D / f apart, so every plane of every byte quarter is a
quarter of elements, and one set of four accumulators serves 8, 4 and 2 bits alike.

Codes are read as fp16 subnormals: the bits of code c are those of ``c * 2**-24``, which costs no
conversion. Planes stay where they are in their byte, so plane j has codes ``2**(bits * j)`` times
too large; `plane_weight` says by what the other operand is to be multiplied instead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_diffxkv.kernels.gpu.fragments import code_pairs, halves

CODE_UNIT: tl.constexpr = tl.constexpr(2.0**24)
"""What products with codes as `load_quarter` returns them are to be multiplied by."""


@triton.jit
def arena_offset(frames, virtual, mask, FRAME_BYTES: tl.constexpr, ALIGN: tl.constexpr):
    """Byte offsets in the arena, int64 [N], of positions in the virtual space of (page, layer)s.

    Args:
        frames: pointers to the first entry of each page's frame table row; of virtual's shape.
        virtual: int32 byte positions, N in any shape, multiples of ALIGN (a power of two); 0 where
            masked.
    """
    frame = tl.load(frames + virtual // FRAME_BYTES, mask=mask, other=0)
    at = frame.to(tl.int64) * FRAME_BYTES + virtual % FRAME_BYTES
    return tl.multiple_of(tl.reshape(at, [at.numel]), ALIGN)


@triton.jit
def arena_row(frames, row, FRAME_BYTES: tl.constexpr, ROW_BYTES: tl.constexpr):
    """Numbers of rows in the arena, as an array of such rows, from those in a virtual space.

    No row straddles frames, and frames are whole numbers of rows of all sizes (`kernels.layout`).

    Args:
        frames: pointers to the first entry of each page's frame table row; of row's shape.
        row: int32, N in any shape.

    Returns:
        [N]: uint32 where those suffice for 256 GiB, else int64.
    """
    FRAME_ROWS: tl.constexpr = FRAME_BYTES // ROW_BYTES
    entry = (row.to(tl.uint32) // FRAME_ROWS).to(tl.int32)
    frame = tl.load(frames + entry) - entry
    if ROW_BYTES < 64:
        at = frame.to(tl.int64) * FRAME_ROWS + row
    else:
        at = (frame * FRAME_ROWS + row).to(tl.uint32)
    return tl.reshape(at, [row.numel])


@triton.jit
def load_rows(
    arena, row, BITS: tl.constexpr, WORD: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr
):
    """Whole rows as words, uint32 or uint16 [N, DIM_BLOCK * BITS / WORD]; 0 where padded.

    Args:
        arena: uint8 pointer.
        row: [N], of `arena_row`.
        WORD: bits of a word.
        DIM_BLOCK: the power of two that DIM is padded to.
    """
    WORDS: tl.constexpr = DIM * BITS // WORD
    column = tl.arange(0, DIM_BLOCK * BITS // WORD)[None, :]
    if WORD == 32:
        words = arena.to(tl.pointer_type(tl.uint32)) + column
    else:
        words = arena.to(tl.pointer_type(tl.uint16)) + column
    at = words + (row.to(tl.int64) * WORDS)[:, None]
    return tl.load(at) if DIM == DIM_BLOCK else tl.load(at, mask=column < WORDS, other=0)


@triton.constexpr_function
def plane_weight(i, bits):
    """By what products with quarter ``i`` of `load_quarter` are to be multiplied."""
    return 2.0 ** (-bits * (i // (bits // 2)))


@triton.constexpr_function
def row_bytes(dim, bits, itemsize):
    """`PageLayout.row_bytes`: bytes of a row at ``bits`` per element, 0 for raw ones."""
    return dim * bits // 8 if bits else dim * itemsize


@triton.jit
def load_quarter(
    arena, at, mask, i: tl.constexpr, BITS: tl.constexpr, QUARTER: tl.constexpr, BLOCK: tl.constexpr
):
    """Quarter ``i`` of rows, as fp16 codes times ``2**-24`` and the plane's factor.

    Args:
        arena: uint8 pointer.
        at: int64 [N], byte offsets of the rows. mask: [N].
        QUARTER, BLOCK: D / 4, and the power of two that it is padded to.

    Returns:
        fp16 [N, BLOCK]; 0 where masked or padded.
    """
    # A row is BITS / 2 quarters of bytes; of 4-bit rows, those hold quarters 0, 1 and 2, 3.
    PART: tl.constexpr = i % (BITS // 2)
    PLANE: tl.constexpr = i // (BITS // 2)
    column = tl.arange(0, BLOCK)
    inside = mask[:, None]
    if QUARTER != BLOCK:
        inside = inside & (column < QUARTER)[None, :]
    byte = tl.load(arena + at[:, None] + (PART * QUARTER + column)[None, :], mask=inside, other=0)
    if BITS < 8:
        byte = byte & ((1 << BITS) - 1 << BITS * PLANE)
    return byte.to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def load_words_at(
    words,
    at,
    mask,
    BITS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Whole rows as words: uint32 [N, DIM_BLOCK * BITS / 32]; 0 where masked or padded.

    Args:
        words: uint32 pointer.
        at: int64 [N], offsets of the rows in words. mask: [N].
        DIM_BLOCK: the power of two that DIM is padded to.
        PARTS: the parts of a row that are padded each on its own.
    """
    WORDS: tl.constexpr = DIM * BITS // 32 // PARTS
    BLOCK: tl.constexpr = DIM_BLOCK * BITS // 32 // PARTS
    column = tl.arange(0, BLOCK * PARTS)
    inside = mask[:, None]
    if DIM != DIM_BLOCK:
        inside = inside & (column % BLOCK < WORDS)[None, :]
        column = column // BLOCK * WORDS + column % BLOCK
    return tl.load(words + at[:, None] + column[None, :], mask=inside, other=0)


@triton.jit
def unpack_words(word, byte_mask, BITS: tl.constexpr, DIM_BLOCK: tl.constexpr):
    """Codes of whole rows, times ``2**-24`` and the planes' factors, in the order of `element`.

    Args:
        word, byte_mask: as `code_pairs` takes them.

    Returns:
        fp16 [N, DIM_BLOCK].
    """
    codes = halves(code_pairs(word, byte_mask, BITS))
    codes = tl.reshape(codes, [word.shape[0], DIM_BLOCK, 1]).to(tl.float16, bitcast=True)
    # A sum over one element costs nothing, and ends what Triton looks at when it chooses how a
    # product reads its operands: it would halve the width once more for the joins.
    return tl.sum(codes, 2)


@triton.jit
def element(column, BITS: tl.constexpr, DIM: tl.constexpr):
    """Which element of a row each column of `unpack_words` is, and its plane's weight.

    Args:
        column: int32, columns of `unpack_words`.

    Returns:
        int32 elements, fp32 weights, and whether the column is not padding.
    """
    half = column % 2
    if BITS == 8:
        plane, odd, word = 0 * column, column // 2 % 2, column // 4
    elif BITS == 4:
        plane, odd, word = column // 2 % 2, column // 4 % 2, column // 8
    else:
        plane = column // 2 % 4
        odd, word = column // 8 % 2, column // 16
    byte = word * 4 + half * 2 + odd
    weight = tl.exp2(-(plane * BITS).to(tl.float32))
    return byte + plane * (DIM * BITS // 8), weight, byte < DIM * BITS // 8


@triton.jit
def load_raw_quarter(rows, mask, i: tl.constexpr, QUARTER: tl.constexpr, BLOCK: tl.constexpr):
    """Quarter ``i`` of rows of the model's dtype, as fp32 [N, BLOCK]; 0 where masked or padded.

    Args:
        rows: pointers [N] to the rows. mask: [N].
    """
    column = tl.arange(0, BLOCK)
    inside = mask[:, None]
    if QUARTER != BLOCK:
        inside = inside & (column < QUARTER)[None, :]
    return tl.load(rows[:, None] + (i * QUARTER + column)[None, :], mask=inside, other=0).to(
        tl.float32
    )


@triton.jit
def load_meta(arena, at, mask):
    """Scale and zero of keys, then of values, fp32 [N] each, of metadata at byte offsets [N]."""
    packed = tl.load((arena + at).to(tl.pointer_type(tl.int64)), mask=mask, other=0)
    return (
        _half(packed, 0),
        _half(packed, 16),
        _half(packed, 32),
        _half(packed, 48),
    )


@triton.jit
def _half(packed, shift: tl.constexpr):
    bits = (packed >> shift & 0xFFFF).to(tl.uint16)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def load_meta_at(arena, row):
    """`load_meta`, without a mask, of rows given by `arena_row`."""
    packed = tl.load(arena.to(tl.pointer_type(tl.int64)) + row)
    return _half(packed, 0), _half(packed, 16), _half(packed, 32), _half(packed, 48)
