# SPDX-License-Identifier: Apache-2.0
"""Triton functions that find, write and read the rows of tokens of either tier.

A token is of one tier only, so both tiers are handled in one go: every token has one address per
row, and what depends on the format is masked by tier. 0 bits are raw elements.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from sglang_diffxkv.kernels.gpu.payload import (
    CODE_UNIT,
    arena_offset,
    load_quarter,
    load_raw_quarter,
    plane_weight,
)
from sglang_diffxkv.kernels.gpu.sections import bytes_of_row, record_counts, sections
from sglang_diffxkv.kernels.layout import META_BYTES, PAGE_TOKENS, TOKEN_METADATA_BYTES
from sglang_diffxkv.kernels.pack.quantize import CLIP, FP16_MAX

_TOKENS = tl.constexpr(PAGE_TOKENS)
_META, _TOKEN_METADATA = tl.constexpr(META_BYTES), tl.constexpr(TOKEN_METADATA_BYTES)
_FP16_MAX = tl.constexpr(FP16_MAX)
_CLIP_2, _CLIP_4, _CLIP_8 = (tl.constexpr(CLIP[bits]) for bits in (2, 4, 8))
_ROUND = tl.constexpr(1.5 * 2**23)
"""Added to a small number it rounds it, ties to even, and leaves it in the lowest bits."""


class TierMask(NamedTuple):
    """Which of N tokens are of these tiers: bool [N] each."""

    high: tl.tensor
    low: tl.tensor


class RowOffsets(NamedTuple):
    """Byte offsets in the arena of N tokens' rows: int64 [N] each."""

    key: tl.tensor
    value: tl.tensor
    meta: tl.tensor
    token_metadata: tl.tensor


class StoredRows(NamedTuple):
    """Key or value rows of N tokens.

    Attributes:
        arena: uint8 pointer. at: int64 [N], byte offsets.
        raw: pointers [N] to the same rows as of the model's dtype.
        scale, zero: fp32 [N]; not used for raw tiers.
    """

    arena: tl.tensor
    raw: tl.tensor
    at: tl.tensor
    scale: tl.tensor
    zero: tl.tensor


class Quarters(NamedTuple):
    """The four quarters (`gpu.payload`) of N rows: [N, BLOCK] each."""

    q0: tl.tensor
    q1: tl.tensor
    q2: tl.tensor
    q3: tl.tensor


@triton.constexpr_function
def quarter_block(dim):
    """The power of two that a quarter of a row is padded to."""
    return triton.next_power_of_2(dim // 4)


@triton.jit
def ordinal_in_tier(tiers, token):
    """Tier codes of tokens, and their number among the head's tokens of the same tier.

    Args:
        tiers: pointer to the head's 64 tier codes.
        token: int32 [N].
    """
    other = tl.arange(0, _TOKENS)
    tier = tl.load(tiers + token)
    same = tl.load(tiers + other)[None, :] == tier[:, None]
    earlier = other[None, :] < token[:, None]
    return tier, tl.sum((same & earlier).to(tl.int32), axis=1)


@triton.jit
def row_offsets(entry, frames, tier: TierMask, ordinal, LAYOUT: tl.constexpr):
    """`RowOffsets` of tokens; of those of neither tier, and of meta of raw ones, they mean nothing.

    Args:
        entry: pointer to the head's directory record. frames: to the page's row of the frame table.
        ordinal: int32 [N], number of each token in its tier.
    """
    KEY_HIGH: tl.constexpr = bytes_of_row(LAYOUT, LAYOUT.high.key_bits)
    KEY_LOW: tl.constexpr = bytes_of_row(LAYOUT, LAYOUT.low.key_bits)
    VALUE_HIGH: tl.constexpr = bytes_of_row(LAYOUT, LAYOUT.high.value_bits)
    VALUE_LOW: tl.constexpr = bytes_of_row(LAYOUT, LAYOUT.low.value_bits)
    META_HIGH: tl.constexpr = _META if LAYOUT.high.key_bits else 0
    META_LOW: tl.constexpr = _META if LAYOUT.low.key_bits else 0
    KEYS: tl.constexpr = KEY_HIGH | KEY_LOW
    VALUES: tl.constexpr = VALUE_HIGH | VALUE_LOW
    high, kept = tier.high, tier.high | tier.low
    start = tl.load(entry)
    n_high, n_low = record_counts(tl.load(entry + 1))
    at = sections(n_high, n_low, LAYOUT)
    key = start + tl.where(high, at.key_high + ordinal * KEY_HIGH, at.key_low + ordinal * KEY_LOW)
    value = start + tl.where(
        high, at.value_high + ordinal * VALUE_HIGH, at.value_low + ordinal * VALUE_LOW
    )
    meta = start + tl.where(
        high, at.meta_high + ordinal * META_HIGH, at.meta_low + ordinal * META_LOW
    )
    metadata = start + at.token_metadata + tl.where(high, ordinal, n_high + ordinal) * 2
    BYTES: tl.constexpr = LAYOUT.frame_bytes
    return RowOffsets(
        arena_offset(frames, tl.where(kept, key, 0), kept, BYTES, KEYS & -KEYS),
        arena_offset(frames, tl.where(kept, value, 0), kept, BYTES, VALUES & -VALUES),
        arena_offset(frames, tl.where(kept, meta, 0), kept, BYTES, _META),
        arena_offset(frames, tl.where(kept, metadata, 0), kept, BYTES, _TOKEN_METADATA),
    )


@triton.jit
def has_meta(tier: TierMask, LAYOUT: tl.constexpr):
    """Which tokens are of a tier with metadata: bool [N]."""
    mask = tier.high & tier.low
    if LAYOUT.high.key_bits:
        mask = mask | tier.high
    if LAYOUT.low.key_bits:
        mask = mask | tier.low
    return mask


@triton.jit
def write_rows(
    source,
    arena,
    at,
    tier: TierMask,
    HIGH_BITS: tl.constexpr,
    LOW_BITS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Quantize key or value rows, as `naive.quantize_row` does, and store them.

    Args:
        source: pointers [N] to rows of the model's dtype.
        at: int64 [N], byte offsets in the arena.

    Returns:
        int64 [N], fp16 bits of the scale and, 16 bits above, of the zero; nonsense for raw tiers.
    """
    QUARTER: tl.constexpr = DIM // 4
    BLOCK: tl.constexpr = quarter_block(DIM)
    high, low = tier.high, tier.low
    kept = high | low
    x0 = load_raw_quarter(source, kept, 0, QUARTER, BLOCK)
    x1 = load_raw_quarter(source, kept, 1, QUARTER, BLOCK)
    x2 = load_raw_quarter(source, kept, 2, QUARTER, BLOCK)
    x3 = load_raw_quarter(source, kept, 3, QUARTER, BLOCK)
    raw = (arena + at).to(source.dtype)
    if HIGH_BITS == 0:
        _store_quarters(raw, high, Quarters(x0, x1, x2, x3), DIM)
    if LOW_BITS == 0:
        _store_quarters(raw, low, Quarters(x0, x1, x2, x3), DIM)

    lowest = tl.minimum(tl.minimum(x0, x1), tl.minimum(x2, x3))
    highest = tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3))
    if QUARTER != BLOCK:
        inside = (tl.arange(0, BLOCK) < QUARTER)[None, :]
        lowest = tl.where(inside, lowest, float("inf"))
        highest = tl.where(inside, highest, float("-inf"))
    levels = tl.where(high, _levels(HIGH_BITS), _levels(LOW_BITS))
    clip = tl.where(high, _clip(HIGH_BITS), _clip(LOW_BITS))
    scale, zero = _scale_and_zero(tl.min(lowest, axis=1), tl.max(highest, axis=1), levels, clip)
    codes = Quarters(
        _codes(x0, scale, zero, levels),
        _codes(x1, scale, zero, levels),
        _codes(x2, scale, zero, levels),
        _codes(x3, scale, zero, levels),
    )
    if HIGH_BITS > 0:
        _store_codes(arena + at, high, codes, HIGH_BITS, DIM)
    if LOW_BITS > 0:
        _store_codes(arena + at, low, codes, LOW_BITS, DIM)
    return _bits(scale) | _bits(zero) << 16


@triton.jit
def read_quarter(
    rows: StoredRows,
    tier: TierMask,
    i: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    LOW_BITS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Quarter ``i`` of dequantized key or value rows, fp32 [N, BLOCK]."""
    QUARTER: tl.constexpr = DIM // 4
    BLOCK: tl.constexpr = quarter_block(DIM)
    codes = tl.zeros([rows.at.shape[0], BLOCK], tl.float32)
    if HIGH_BITS > 0:
        codes += _load_codes(rows, tier.high, i, HIGH_BITS, DIM)
    if LOW_BITS > 0:
        codes += _load_codes(rows, tier.low, i, LOW_BITS, DIM)
    x = codes * rows.scale[:, None] + rows.zero[:, None]
    if HIGH_BITS == 0:
        raw = load_raw_quarter(rows.raw, tier.high, i, QUARTER, BLOCK)
        x = tl.where(tier.high[:, None], raw, x)
    if LOW_BITS == 0:
        raw = load_raw_quarter(rows.raw, tier.low, i, QUARTER, BLOCK)
        x = tl.where(tier.low[:, None], raw, x)
    return x


@triton.jit
def store_quarter(rows, mask, x, i: tl.constexpr, DIM: tl.constexpr):
    """Store quarter ``i`` of rows, [N, BLOCK], at pointers [N], in the pointers' dtype."""
    QUARTER: tl.constexpr = DIM // 4
    BLOCK: tl.constexpr = quarter_block(DIM)
    column = tl.arange(0, BLOCK)
    inside = mask[:, None]
    if QUARTER != BLOCK:
        inside = inside & (column < QUARTER)[None, :]
    x = x.to(rows.dtype.element_ty)
    tl.store(rows[:, None] + (i * QUARTER + column)[None, :], x, mask=inside)


@triton.jit
def _store_quarters(rows, mask, x: Quarters, DIM: tl.constexpr):
    store_quarter(rows, mask, x.q0, 0, DIM)
    store_quarter(rows, mask, x.q1, 1, DIM)
    store_quarter(rows, mask, x.q2, 2, DIM)
    store_quarter(rows, mask, x.q3, 3, DIM)


@triton.jit
def _store_codes(rows, mask, codes: Quarters, BITS: tl.constexpr, DIM: tl.constexpr):
    """Store codes int32 [N, BLOCK] of rows at pointers [N] in split-plane order."""
    c0, c1, c2, c3 = codes.q0, codes.q1, codes.q2, codes.q3
    if BITS == 8:
        _store_quarters(rows, mask, codes, DIM)
    elif BITS == 4:
        store_quarter(rows, mask, c0 | c2 << 4, 0, DIM)
        store_quarter(rows, mask, c1 | c3 << 4, 1, DIM)
    else:
        store_quarter(rows, mask, c0 | c1 << 2 | c2 << 4 | c3 << 6, 0, DIM)


@triton.jit
def _load_codes(rows: StoredRows, mask, i: tl.constexpr, BITS: tl.constexpr, DIM: tl.constexpr):
    BLOCK: tl.constexpr = quarter_block(DIM)
    codes = load_quarter(rows.arena, rows.at, mask, i, BITS, DIM // 4, BLOCK).to(tl.float32)
    return codes * (CODE_UNIT * plane_weight(i, BITS))


@triton.jit
def _levels(BITS: tl.constexpr):
    return 3.0 if BITS == 2 else (15.0 if BITS == 4 else 255.0)


@triton.jit
def _clip(BITS: tl.constexpr):
    return _CLIP_2 if BITS == 2 else (_CLIP_4 if BITS == 4 else _CLIP_8)


@triton.jit
def _scale_and_zero(lowest, highest, levels, clip):
    """fp16 scale and zero; only exact products are added, so fused multiply-adds change nothing."""
    scale = tl.div_rn((highest - lowest) * clip, levels)
    scale = tl.minimum(scale, _FP16_MAX).to(tl.float16)
    zero = 0.5 * lowest + 0.5 * highest - scale.to(tl.float32) * (0.5 * levels)
    return scale, tl.minimum(tl.maximum(zero, -_FP16_MAX), _FP16_MAX).to(tl.float16)


@triton.jit
def _codes(x, scale, zero, levels):
    """int32 codes of elements [N, BLOCK]."""
    step = tl.where(scale > 0, scale.to(tl.float32), 1.0)
    steps = tl.div_rn(x - zero.to(tl.float32)[:, None], tl.broadcast_to(step[:, None], x.shape))
    steps = tl.minimum(tl.maximum(steps, 0.0), levels[:, None])
    return (steps + _ROUND).to(tl.int32, bitcast=True) & 0xFF


@triton.jit
def _bits(x):
    return x.to(tl.uint16, bitcast=True).to(tl.int64)
