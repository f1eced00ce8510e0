# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `pack.triton`: one program for some of the tokens of one head of one page."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_diffxkv.kernels.gpu.payload import load_meta
from sglang_diffxkv.kernels.layout import HIGH, LOW, PAGE_TOKENS
from sglang_diffxkv.kernels.pack.triton_rows import (
    has_meta,
    rank_in_tier,
    read_quarter,
    row_offsets,
    store_quarter,
    write_rows,
)

_HIGH, _LOW, _TOKENS = tl.constexpr(HIGH), tl.constexpr(LOW), tl.constexpr(PAGE_TOKENS)


# Tables of one layer start anywhere: not to be compiled for each alignment.
@triton.jit(do_not_specialize_on_alignment=["frames", "heads"])
def pack_kernel(
    k_raw,
    v_raw,
    slots,
    tiers,
    importance,
    frames,
    heads,
    arena,
    k_page,
    k_token,
    k_head,
    v_page,
    v_token,
    v_head,
    max_frames,
    DIM: tl.constexpr,
    KEY_HIGH: tl.constexpr,
    VALUE_HIGH: tl.constexpr,
    KEY_LOW: tl.constexpr,
    VALUE_LOW: tl.constexpr,
    META_HIGH: tl.constexpr,
    META_LOW: tl.constexpr,
    FRAME_BYTES: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (S, H, 64 / TOKENS); k_page ... v_head are strides in elements."""
    page = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    entry = page * tl.num_programs(1) + head
    tier, rank = rank_in_tier(tiers + entry * _TOKENS, token)
    high = tier == _HIGH
    low = tier == _LOW
    kept = high | low
    key_at, value_at, meta_at, note_at = row_offsets(
        heads + entry * 2, frames + page * max_frames, high, rank, kept,
        KEY_HIGH, VALUE_HIGH, KEY_LOW, VALUE_LOW, META_HIGH, META_LOW, FRAME_BYTES,
    )  # fmt: skip
    slot = tl.load(slots + page).to(tl.int64)
    keys = k_raw + slot * k_page + head * k_head + token * k_token
    values = v_raw + slot * v_page + head * v_head + token * v_token
    key_meta = write_rows(keys, arena, key_at, high, low, KEY_HIGH, KEY_LOW, DIM, BLOCK)
    value_meta = write_rows(values, arena, value_at, high, low, VALUE_HIGH, VALUE_LOW, DIM, BLOCK)
    if META_HIGH or META_LOW:
        tl.store(
            (arena + meta_at).to(tl.pointer_type(tl.int64)),
            key_meta | value_meta << 32,
            mask=has_meta(high, low, META_HIGH, META_LOW),
        )
    code = tl.load(importance + entry * _TOKENS + token).to(tl.int32)
    note = (token | code << 8).to(tl.uint16)
    tl.store((arena + note_at).to(tl.pointer_type(tl.uint16)), note, mask=kept)


@triton.jit(do_not_specialize_on_alignment=["frames", "heads"])
def unpack_kernel(
    arena,
    raw_arena,
    frames,
    heads,
    pages,
    first,
    k,
    v,
    notes,
    frames_stride,
    heads_stride,
    DIM: tl.constexpr,
    KEY_HIGH: tl.constexpr,
    VALUE_HIGH: tl.constexpr,
    KEY_LOW: tl.constexpr,
    VALUE_LOW: tl.constexpr,
    META_HIGH: tl.constexpr,
    META_LOW: tl.constexpr,
    FRAME_BYTES: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (N, H, 64 / TOKENS); raw_arena is the arena as elements of the model's dtype."""
    page = tl.load(pages + tl.program_id(0)).to(tl.int64)
    head = tl.program_id(1)
    place = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    entry = heads + page * heads_stride + head * 2
    counts = tl.load(entry + 1)
    n_high = counts & 0xFF
    kept = place < n_high + (counts >> 8)
    high = place < n_high
    low = kept & (place >= n_high)
    key_at, value_at, meta_at, note_at = row_offsets(
        entry, frames + page * frames_stride, high, tl.where(high, place, place - n_high), kept,
        KEY_HIGH, VALUE_HIGH, KEY_LOW, VALUE_LOW, META_HIGH, META_LOW, FRAME_BYTES,
    )  # fmt: skip
    key_scale, key_zero, value_scale, value_zero = load_meta(
        arena, meta_at, has_meta(high, low, META_HIGH, META_LOW)
    )
    row = tl.load(first + tl.program_id(0) * tl.num_programs(1) + head) + place
    raw_keys = (arena + key_at).to(raw_arena.dtype)
    raw_values = (arena + value_at).to(raw_arena.dtype)
    for i in tl.static_range(4):
        x = read_quarter(
            arena, raw_keys, key_at, high, low, key_scale, key_zero, i,
            KEY_HIGH, KEY_LOW, DIM, BLOCK,
        )  # fmt: skip
        store_quarter(k + row * DIM, kept, x, i, DIM // 4, BLOCK)
    for i in tl.static_range(4):
        x = read_quarter(
            arena, raw_values, value_at, high, low, value_scale, value_zero, i,
            VALUE_HIGH, VALUE_LOW, DIM, BLOCK,
        )  # fmt: skip
        store_quarter(v + row * DIM, kept, x, i, DIM // 4, BLOCK)
    if notes is not None:
        note = tl.load((arena + note_at).to(tl.pointer_type(tl.uint16)), mask=kept)
        tl.store((notes + row * 2).to(tl.pointer_type(tl.uint16)), note, mask=kept)


@triton.jit
def copy_kernel(
    old_arena,
    old_frames,
    old_heads,
    old_tiers,
    new_arena,
    new_frames,
    new_heads,
    new_tiers,
    old_max_frames,
    new_max_frames,
    DIM: tl.constexpr,
    KEY_HIGH: tl.constexpr,
    VALUE_HIGH: tl.constexpr,
    KEY_LOW: tl.constexpr,
    VALUE_LOW: tl.constexpr,
    META_HIGH: tl.constexpr,
    META_LOW: tl.constexpr,
    FRAME_BYTES: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (S, H, 64 / TOKENS)."""
    page = tl.program_id(0).to(tl.int64)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    entry = page * tl.num_programs(1) + tl.program_id(1)
    old_tier, old_rank = rank_in_tier(old_tiers + entry * _TOKENS, token)
    new_tier, new_rank = rank_in_tier(new_tiers + entry * _TOKENS, token)
    high = (old_tier == _HIGH) & (new_tier == _HIGH)
    low = (old_tier == _LOW) & (new_tier == _LOW)
    old_key, old_value, old_meta, _ = row_offsets(
        old_heads + entry * 2, old_frames + page * old_max_frames, high, old_rank, high | low,
        KEY_HIGH, VALUE_HIGH, KEY_LOW, VALUE_LOW, META_HIGH, META_LOW, FRAME_BYTES,
    )  # fmt: skip
    new_key, new_value, new_meta, _ = row_offsets(
        new_heads + entry * 2, new_frames + page * new_max_frames, high, new_rank, high | low,
        KEY_HIGH, VALUE_HIGH, KEY_LOW, VALUE_LOW, META_HIGH, META_LOW, FRAME_BYTES,
    )  # fmt: skip
    _copy_words(old_arena + old_key, new_arena + new_key, high, low, KEY_HIGH, KEY_LOW, BLOCK)
    _copy_words(
        old_arena + old_value, new_arena + new_value, high, low, VALUE_HIGH, VALUE_LOW, BLOCK
    )
    _copy_words(old_arena + old_meta, new_arena + new_meta, high, low, META_HIGH, META_LOW, 2)


@triton.jit
def _copy_words(
    source,
    target,
    high,
    low,
    HIGH_BYTES: tl.constexpr,
    LOW_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy rows of as many bytes as their tier has, at pointers [N], BLOCK words at a time.

    A word has 4 bytes; rows are of whole words, as head_dim is a multiple of 16.
    """
    source = source.to(tl.pointer_type(tl.int32))[:, None]
    target = target.to(tl.pointer_type(tl.int32))[:, None]
    words = tl.where(high, HIGH_BYTES // 4, tl.where(low, LOW_BYTES // 4, 0))[:, None]
    for start in range(0, max(HIGH_BYTES, LOW_BYTES) // 4, BLOCK):
        column = (start + tl.arange(0, BLOCK))[None, :]
        inside = column < words
        tl.store(target + column, tl.load(source + column, mask=inside), mask=inside)
