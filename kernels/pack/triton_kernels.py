# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `pack.triton`: one program for some of the tokens of one head of one page."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sglang_diffxkv.kernels.gpu.payload import load_meta
from sglang_diffxkv.kernels.gpu.sections import bytes_of_row, record_counts
from sglang_diffxkv.kernels.gpu.views import SealedView
from sglang_diffxkv.kernels.layout import HIGH, LOW, META_BYTES, PAGE_TOKENS
from sglang_diffxkv.kernels.pack import Grades
from sglang_diffxkv.kernels.pack.triton_rows import (
    StoredRows,
    TierMask,
    has_meta,
    ordinal_in_tier,
    quarter_block,
    read_quarter,
    row_offsets,
    store_quarter,
    write_rows,
)

_HIGH, _LOW, _TOKENS = tl.constexpr(HIGH), tl.constexpr(LOW), tl.constexpr(PAGE_TOKENS)
_META = tl.constexpr(META_BYTES)


class RawPages(NamedTuple):
    """`RawTokens`, and how many elements apart pages are, of keys and of values."""

    k: torch.Tensor
    v: torch.Tensor
    slots: torch.Tensor
    k_stride: int
    v_stride: int


class Rows(NamedTuple):
    """`TokenRows`; ``values`` is no name of a field (`gpu.views`)."""

    k: torch.Tensor
    v: torch.Tensor
    token_metadata: torch.Tensor | None
    first: torch.Tensor


# Tables of one layer start anywhere: not to be compiled for each alignment.
@triton.jit(do_not_specialize_on_alignment=["frames", "heads"])
def pack_kernel(
    raw: RawPages,
    grades: Grades,
    arena,
    frames,
    heads,
    LAYOUT: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Grid (S, H, 64 / TOKENS); frames int32 [S, max_frames] and heads are contiguous."""
    DIM: tl.constexpr = LAYOUT.head_dim
    page = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    entry = page * LAYOUT.num_kv_heads + head
    code, ordinal = ordinal_in_tier(grades.tiers + entry * _TOKENS, token)
    tier = TierMask(code == _HIGH, code == _LOW)
    kept = tier.high | tier.low
    table = frames + page * LAYOUT.max_frames
    at = row_offsets(heads + entry * 2, table, tier, ordinal, LAYOUT)
    slot = tl.load(raw.slots + page).to(tl.int64)
    row = (token * LAYOUT.num_kv_heads + head) * DIM
    keys, values = raw.k + slot * raw.k_stride + row, raw.v + slot * raw.v_stride + row
    key_meta = write_rows(keys, arena, at.key, tier, LAYOUT.high.key_bits, LAYOUT.low.key_bits, DIM)
    value_meta = write_rows(
        values, arena, at.value, tier, LAYOUT.high.value_bits, LAYOUT.low.value_bits, DIM
    )
    if LAYOUT.high.key_bits or LAYOUT.low.key_bits:
        words = (arena + at.meta).to(tl.pointer_type(tl.int64))
        tl.store(words, key_meta | value_meta << 32, mask=has_meta(tier, LAYOUT))
    importance = tl.load(grades.importance + entry * _TOKENS + token).to(tl.int32)
    metadata = (token | importance << 8).to(tl.uint16)
    tl.store((arena + at.token_metadata).to(tl.pointer_type(tl.uint16)), metadata, mask=kept)


@triton.jit
def unpack_kernel(
    tables: SealedView, raw_arena, pages, rows: Rows, LAYOUT: tl.constexpr, TOKENS: tl.constexpr
):
    """Grid (N, H, 64 / TOKENS); raw_arena is the arena as elements of the model's dtype."""
    DIM: tl.constexpr = LAYOUT.head_dim
    arena = tables.arena
    page = tl.load(pages + tl.program_id(0)).to(tl.int64)
    head = tl.program_id(1)
    place = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    entry = tables.heads + page * tables.heads_stride + head * 2
    n_high, n_low = record_counts(tl.load(entry + 1))
    kept = place < n_high + n_low
    tier = TierMask(place < n_high, kept & (place >= n_high))
    ordinal = tl.where(tier.high, place, place - n_high)
    at = row_offsets(entry, tables.frames + page * tables.frames_stride, tier, ordinal, LAYOUT)
    meta = load_meta(arena, at.meta, has_meta(tier, LAYOUT))
    row = tl.load(rows.first + tl.program_id(0) * tl.num_programs(1) + head) + place
    keys = StoredRows(arena, (arena + at.key).to(raw_arena.dtype), at.key, meta[0], meta[1])
    for i in tl.static_range(4):
        x = read_quarter(keys, tier, i, LAYOUT.high.key_bits, LAYOUT.low.key_bits, DIM)
        store_quarter(rows.k + row * DIM, kept, x, i, DIM)
    values = StoredRows(arena, (arena + at.value).to(raw_arena.dtype), at.value, meta[2], meta[3])
    for i in tl.static_range(4):
        x = read_quarter(values, tier, i, LAYOUT.high.value_bits, LAYOUT.low.value_bits, DIM)
        store_quarter(rows.v + row * DIM, kept, x, i, DIM)
    if rows.token_metadata is not None:
        source = (arena + at.token_metadata).to(tl.pointer_type(tl.uint16))
        target = (rows.token_metadata + row * 2).to(tl.pointer_type(tl.uint16))
        tl.store(target, tl.load(source, mask=kept), mask=kept)


@triton.jit
def copy_kernel(
    old: SealedView, old_tiers, new: SealedView, new_tiers, LAYOUT: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Grid (S, H, 64 / TOKENS); frames and heads are contiguous."""
    page = tl.program_id(0).to(tl.int64)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    entry = page * tl.num_programs(1) + tl.program_id(1)
    old_code, old_ordinal = ordinal_in_tier(old_tiers + entry * _TOKENS, token)
    new_code, new_ordinal = ordinal_in_tier(new_tiers + entry * _TOKENS, token)
    tier = TierMask(
        (old_code == _HIGH) & (new_code == _HIGH), (old_code == _LOW) & (new_code == _LOW)
    )
    at = page * LAYOUT.max_frames
    source = row_offsets(old.heads + entry * 2, old.frames + at, tier, old_ordinal, LAYOUT)
    target = row_offsets(new.heads + entry * 2, new.frames + at, tier, new_ordinal, LAYOUT)
    KEY_HIGH: tl.constexpr = bytes_of_row(LAYOUT, LAYOUT.high.key_bits)
    KEY_LOW: tl.constexpr = bytes_of_row(LAYOUT, LAYOUT.low.key_bits)
    VALUE_HIGH: tl.constexpr = bytes_of_row(LAYOUT, LAYOUT.high.value_bits)
    VALUE_LOW: tl.constexpr = bytes_of_row(LAYOUT, LAYOUT.low.value_bits)
    META_HIGH: tl.constexpr = _META if LAYOUT.high.key_bits else 0
    META_LOW: tl.constexpr = _META if LAYOUT.low.key_bits else 0
    BLOCK: tl.constexpr = quarter_block(LAYOUT.head_dim)
    _copy_words(old.arena + source.key, new.arena + target.key, tier, KEY_HIGH, KEY_LOW, BLOCK)
    _copy_words(
        old.arena + source.value, new.arena + target.value, tier, VALUE_HIGH, VALUE_LOW, BLOCK
    )
    _copy_words(old.arena + source.meta, new.arena + target.meta, tier, META_HIGH, META_LOW, 2)


@triton.jit
def _copy_words(
    source,
    target,
    tier: TierMask,
    HIGH_BYTES: tl.constexpr,
    LOW_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy rows of as many bytes as their tier has, at pointers [N], BLOCK words at a time.

    A word has 4 bytes; rows are of whole words, as head_dim is a multiple of 16.
    """
    source = source.to(tl.pointer_type(tl.int32))[:, None]
    target = target.to(tl.pointer_type(tl.int32))[:, None]
    words = tl.where(tier.high, HIGH_BYTES // 4, tl.where(tier.low, LOW_BYTES // 4, 0))[:, None]
    for start in range(0, max(HIGH_BYTES, LOW_BYTES) // 4, BLOCK):
        column = (start + tl.arange(0, BLOCK))[None, :]
        inside = column < words
        tl.store(target + column, tl.load(source + column, mask=inside), mask=inside)
