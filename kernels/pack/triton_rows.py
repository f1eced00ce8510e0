# SPDX-License-Identifier: Apache-2.0
"""Triton functions that find, write and read the rows of tokens of either tier.

A token is of one tier only, so both tiers are handled in one go: every token has one address per
row, and what depends on the format is masked by tier. A tier of more than D bytes a row is raw.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_diffxkv.kernels.gpu.payload import (
    CODE_UNIT,
    arena_offset,
    load_quarter,
    load_raw_quarter,
    plane_weight,
    section_starts,
)
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.pack.quantize import CLIP, FP16_MAX

_TOKENS = tl.constexpr(PAGE_TOKENS)
_FP16_MAX = tl.constexpr(FP16_MAX)
_CLIP_2, _CLIP_4, _CLIP_8 = (tl.constexpr(CLIP[bits]) for bits in (2, 4, 8))
_ROUND = tl.constexpr(1.5 * 2**23)
"""Added to a small number it rounds it, ties to even, and leaves it in the lowest bits."""


@triton.jit
def rank_in_tier(tiers, token):
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
def row_offsets(
    entry,
    frames,
    high,
    rank,
    kept,
    KEY_HIGH: tl.constexpr,
    VALUE_HIGH: tl.constexpr,
    KEY_LOW: tl.constexpr,
    VALUE_LOW: tl.constexpr,
    META_HIGH: tl.constexpr,
    META_LOW: tl.constexpr,
    FRAME_BYTES: tl.constexpr,
):
    """Byte offsets in the arena, int64 [N], of tokens' rows: key, value, meta, notes.

    Args:
        entry: pointer to the head's directory entry. frames: pointer to the page's frame table row.
        high: bool [N], tier of each token. rank: int32 [N], its number in that tier.
        kept: bool [N]; the offsets of other tokens, and of the meta of raw tiers, mean nothing.
    """
    start = tl.load(entry)
    counts = tl.load(entry + 1)
    n_high = counts & 0xFF
    key_high, value_high, key_low, value_low, meta_high, meta_low, notes = section_starts(
        n_high, counts >> 8, KEY_HIGH, VALUE_HIGH, KEY_LOW, VALUE_LOW, META_HIGH, META_LOW
    )
    key = start + tl.where(high, key_high + rank * KEY_HIGH, key_low + rank * KEY_LOW)
    value = start + tl.where(high, value_high + rank * VALUE_HIGH, value_low + rank * VALUE_LOW)
    meta = start + tl.where(high, meta_high + rank * META_HIGH, meta_low + rank * META_LOW)
    note = start + notes + tl.where(high, rank, n_high + rank) * 2
    KEYS: tl.constexpr = KEY_HIGH | KEY_LOW
    VALUES: tl.constexpr = VALUE_HIGH | VALUE_LOW
    return (
        arena_offset(frames, tl.where(kept, key, 0), kept, FRAME_BYTES, KEYS & -KEYS),
        arena_offset(frames, tl.where(kept, value, 0), kept, FRAME_BYTES, VALUES & -VALUES),
        arena_offset(frames, tl.where(kept, meta, 0), kept, FRAME_BYTES, 8),
        arena_offset(frames, tl.where(kept, note, 0), kept, FRAME_BYTES, 2),
    )


@triton.jit
def has_meta(high, low, META_HIGH: tl.constexpr, META_LOW: tl.constexpr):
    """Which tokens of masks high and low, bool [N], are of a tier with metadata."""
    mask = high & low
    if META_HIGH:
        mask = mask | high
    if META_LOW:
        mask = mask | low
    return mask


@triton.jit
def write_rows(
    source,
    arena,
    at,
    high,
    low,
    HIGH_BYTES: tl.constexpr,
    LOW_BYTES: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantize key or value rows, as `quantize.quantize_rows` does, and store them.

    Args:
        source: pointers [N] to rows of the model's dtype.
        at: int64 [N], byte offsets in the arena.
        high, low: bool [N], which tokens are of these tiers.
        BLOCK: the power of two that D / 4 is padded to.

    Returns:
        int64 [N], fp16 bits of the scale and, 16 bits above, of the zero; nonsense for raw tiers.
    """
    QUARTER: tl.constexpr = DIM // 4
    kept = high | low
    x0 = load_raw_quarter(source, kept, 0, QUARTER, BLOCK)
    x1 = load_raw_quarter(source, kept, 1, QUARTER, BLOCK)
    x2 = load_raw_quarter(source, kept, 2, QUARTER, BLOCK)
    x3 = load_raw_quarter(source, kept, 3, QUARTER, BLOCK)
    raw = (arena + at).to(source.dtype)
    if HIGH_BYTES > DIM:
        _store_raw(raw, high, x0, x1, x2, x3, QUARTER, BLOCK)
    if LOW_BYTES > DIM:
        _store_raw(raw, low, x0, x1, x2, x3, QUARTER, BLOCK)

    lowest = tl.minimum(tl.minimum(x0, x1), tl.minimum(x2, x3))
    highest = tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3))
    if QUARTER != BLOCK:
        inside = (tl.arange(0, BLOCK) < QUARTER)[None, :]
        lowest = tl.where(inside, lowest, float("inf"))
        highest = tl.where(inside, highest, float("-inf"))
    HIGH_BITS: tl.constexpr = HIGH_BYTES * 8 // DIM
    LOW_BITS: tl.constexpr = LOW_BYTES * 8 // DIM
    levels = tl.where(high, _levels(HIGH_BITS), _levels(LOW_BITS))
    clip = tl.where(high, _clip(HIGH_BITS), _clip(LOW_BITS))
    scale, zero = _scale_and_zero(tl.min(lowest, axis=1), tl.max(highest, axis=1), levels, clip)
    c0 = _codes(x0, scale, zero, levels)
    c1 = _codes(x1, scale, zero, levels)
    c2 = _codes(x2, scale, zero, levels)
    c3 = _codes(x3, scale, zero, levels)
    if HIGH_BYTES <= DIM:
        _store_codes(arena, at, high, c0, c1, c2, c3, HIGH_BITS, QUARTER, BLOCK)
    if LOW_BYTES <= DIM:
        _store_codes(arena, at, low, c0, c1, c2, c3, LOW_BITS, QUARTER, BLOCK)
    return _bits(scale) | _bits(zero) << 16


@triton.jit
def read_quarter(
    arena,
    raw,
    at,
    high,
    low,
    scale,
    zero,
    i: tl.constexpr,
    HIGH_BYTES: tl.constexpr,
    LOW_BYTES: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quarter ``i`` of dequantized key or value rows, fp32 [N, BLOCK].

    Args:
        raw: pointers [N] to the same rows as of the model's dtype.
        scale, zero: fp32 [N]; not used for raw tiers.
        at, high, low, BLOCK: as in `write_rows`.
    """
    QUARTER: tl.constexpr = DIM // 4
    codes = tl.zeros([at.shape[0], BLOCK], tl.float32)
    if HIGH_BYTES <= DIM:
        codes += _load_codes(arena, at, high, i, HIGH_BYTES * 8 // DIM, QUARTER, BLOCK)
    if LOW_BYTES <= DIM:
        codes += _load_codes(arena, at, low, i, LOW_BYTES * 8 // DIM, QUARTER, BLOCK)
    x = codes * scale[:, None] + zero[:, None]
    if HIGH_BYTES > DIM:
        x = tl.where(high[:, None], load_raw_quarter(raw, high, i, QUARTER, BLOCK), x)
    if LOW_BYTES > DIM:
        x = tl.where(low[:, None], load_raw_quarter(raw, low, i, QUARTER, BLOCK), x)
    return x


@triton.jit
def store_quarter(rows, mask, x, i: tl.constexpr, QUARTER: tl.constexpr, BLOCK: tl.constexpr):
    """Store quarter ``i`` of rows, [N, BLOCK], at pointers [N], in the pointers' dtype."""
    column = tl.arange(0, BLOCK)
    inside = mask[:, None]
    if QUARTER != BLOCK:
        inside = inside & (column < QUARTER)[None, :]
    x = x.to(rows.dtype.element_ty)
    tl.store(rows[:, None] + (i * QUARTER + column)[None, :], x, mask=inside)


@triton.jit
def _store_raw(rows, mask, x0, x1, x2, x3, QUARTER: tl.constexpr, BLOCK: tl.constexpr):
    store_quarter(rows, mask, x0, 0, QUARTER, BLOCK)
    store_quarter(rows, mask, x1, 1, QUARTER, BLOCK)
    store_quarter(rows, mask, x2, 2, QUARTER, BLOCK)
    store_quarter(rows, mask, x3, 3, QUARTER, BLOCK)


@triton.jit
def _store_codes(
    arena,
    at,
    mask,
    c0,
    c1,
    c2,
    c3,
    BITS: tl.constexpr,
    QUARTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store codes int32 [N, BLOCK] of the four quarters of rows in split-plane order."""
    rows = arena + at
    if BITS == 8:
        _store_raw(rows, mask, c0, c1, c2, c3, QUARTER, BLOCK)
    elif BITS == 4:
        store_quarter(rows, mask, c0 | c2 << 4, 0, QUARTER, BLOCK)
        store_quarter(rows, mask, c1 | c3 << 4, 1, QUARTER, BLOCK)
    else:
        store_quarter(rows, mask, c0 | c1 << 2 | c2 << 4 | c3 << 6, 0, QUARTER, BLOCK)


@triton.jit
def _load_codes(
    arena, at, mask, i: tl.constexpr, BITS: tl.constexpr, QUARTER: tl.constexpr, BLOCK: tl.constexpr
):
    codes = load_quarter(arena, at, mask, i, BITS, QUARTER, BLOCK).to(tl.float32)
    return codes * (CODE_UNIT * plane_weight(i, BITS))


@triton.jit
def _levels(BITS: tl.constexpr):
    return 255.0 if BITS >= 8 else (15.0 if BITS == 4 else 3.0)


@triton.jit
def _clip(BITS: tl.constexpr):
    return _CLIP_8 if BITS >= 8 else (_CLIP_4 if BITS == 4 else _CLIP_2)


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
