# SPDX-License-Identifier: Apache-2.0
"""Triton functions that know where a head's records, and the sections of its payload, lie."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from sglang_diffxkv.kernels.gpu.views import SealedView


class SectionStarts(NamedTuple):
    """Where the sections of a head's payload start, relative to it: int32 tensors of one shape."""

    key_high: tl.tensor
    value_high: tl.tensor
    key_low: tl.tensor
    value_low: tl.tensor
    meta_high: tl.tensor
    meta_low: tl.tensor
    token_metadata: tl.tensor


@triton.jit
def record_counts(word):
    """n_high and n_low of words 1 of the directory's records: `layout.head_counts`."""
    return word & 0xFF, word >> 8


@triton.jit
def align_up(x, MULTIPLE: tl.constexpr):
    return (x + (MULTIPLE - 1)) // MULTIPLE * MULTIPLE


@triton.jit
def sections(n_high, n_low, LAYOUT: tl.constexpr):
    """`PageLayout.sections`, without the total, for int32 tensors of counts."""
    KEY_HIGH: tl.constexpr = bytes_of_row(LAYOUT, LAYOUT.high.key_bits)
    VALUE_HIGH: tl.constexpr = bytes_of_row(LAYOUT, LAYOUT.high.value_bits)
    KEY_LOW: tl.constexpr = bytes_of_row(LAYOUT, LAYOUT.low.key_bits)
    VALUE_LOW: tl.constexpr = bytes_of_row(LAYOUT, LAYOUT.low.value_bits)
    value_high = align_up(n_high * KEY_HIGH, VALUE_HIGH)
    key_low = align_up(value_high + n_high * VALUE_HIGH, KEY_LOW)
    value_low = align_up(key_low + n_low * KEY_LOW, VALUE_LOW)
    cursor = value_low + n_low * VALUE_LOW
    meta_high = cursor
    if LAYOUT.high.key_bits:
        meta_high = align_up(cursor, 8)
        cursor = meta_high + n_high * 8
    meta_low = cursor
    if LAYOUT.low.key_bits:
        meta_low = align_up(cursor, 8)
        cursor = meta_low + n_low * 8
    return SectionStarts(
        n_high * 0, value_high, key_low, value_low, meta_high, meta_low, align_up(cursor, 2)
    )


class TierSections(NamedTuple):
    """Of one tier of some pages: tokens, and bytes at which its sections start, int32 tensors."""

    tokens: tl.tensor
    key: tl.tensor
    value: tl.tensor
    meta: tl.tensor


@triton.jit
def find_tier(heads, stride, page, valid, LAYOUT: tl.constexpr, IS_HIGH: tl.constexpr):
    """`TierSections` of one head of these pages; no tokens where they are not valid.

    Args:
        heads: pointer to the head's records, ``stride`` elements from page to page.
    """
    record = heads + page.to(tl.int64) * stride
    offset = tl.load(record, mask=valid, other=0)
    n_high, n_low = record_counts(tl.load(record + 1, mask=valid, other=0))
    starts = sections(n_high, n_low, LAYOUT)
    key = offset + (starts.key_high if IS_HIGH else starts.key_low)
    value = offset + (starts.value_high if IS_HIGH else starts.value_low)
    meta = offset + (starts.meta_high if IS_HIGH else starts.meta_low)
    return TierSections(n_high if IS_HIGH else n_low, key, value, meta)


@triton.constexpr_function
def bytes_of_row(layout, bits):
    """`PageLayout.row_bytes`."""
    return layout.row_bytes(bits)


@triton.jit
def records_from(sealed, head):
    """`SealedView` with the records from this KV head on."""
    return SealedView(
        sealed.arena,
        sealed.frames,
        sealed.heads + head * 2,
        sealed.frames_stride,
        sealed.heads_stride,
        sealed.byte_mask,
    )
