# SPDX-License-Identifier: Apache-2.0
"""Readable reference of packing and unpacking: one token of one head of one page at a time."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np
import torch

from sglang_diffxkv.kernels.layout import (
    HIGH,
    LOW,
    META_BYTES,
    PAGE_TOKENS,
    TOKEN_METADATA_BYTES,
    TierFormat,
    head_counts,
)
from sglang_diffxkv.kernels.pack import Grades, RawTokens, TokenRows
from sglang_diffxkv.kernels.pack.quantize import CLIP, FP16_MAX
from sglang_diffxkv.kernels.pages import SealedTables


def quantize_row(row: np.ndarray, bits: int) -> tuple[np.ndarray, np.float16, np.float16]:
    """Bytes (split-plane order), scale and zero of one row fp32 [D].

    Scale and zero are rounded to fp16 first and the codes computed against the rounded values, so
    that reading adds no error of its own.
    """
    levels = 2**bits - 1
    span = (row.max() - row.min()) * np.float32(CLIP[bits])
    scale = np.float16(min(span / np.float32(levels), FP16_MAX))
    half = np.float32(0.5)
    centre = half * row.min() + half * row.max()
    first = centre - np.float32(scale) * np.float32(levels / 2)
    zero = np.float16(np.clip(first, -FP16_MAX, FP16_MAX))
    step = scale if scale > 0 else 1  # a constant row is its zero, whatever its codes
    steps = (row - np.float32(zero)) / np.float32(step)
    codes = np.clip(np.rint(steps), 0, levels).astype(np.uint8)
    packed = np.zeros(len(row) * bits // 8, dtype=np.uint8)
    for element, code in enumerate(codes):
        plane, byte = divmod(element, len(packed))
        packed[byte] |= code << (plane * bits)
    return packed, scale, zero


def dequantize_row(
    packed: np.ndarray, scale: np.float16, zero: np.float16, bits: int
) -> np.ndarray:
    """fp32 [D] of `quantize_row`."""
    dim = len(packed) * 8 // bits
    row = np.zeros(dim, dtype=np.float32)
    for element in range(dim):
        plane, byte = divmod(element, len(packed))
        code = packed[byte] >> (plane * bits) & (2**bits - 1)
        row[element] = np.float32(code) * np.float32(scale) + np.float32(zero)
    return row


class _Row(NamedTuple):
    """Where a kept token lies: positions of its rows in the virtual space of the (page, layer).

    Attributes:
        ordinal: of the token among the head's kept ones, in storage order.
    """

    tier: TierFormat
    ordinal: int
    key: int
    value: int
    meta: int
    token_metadata: int


def _rows_of(tables: SealedTables, page: int, head: int, code: int) -> list[_Row]:
    """Rows of the tokens of one tier, by position."""
    layout, record = tables.layout, tables.heads[page, head]
    start, (n_high, n_low) = int(record[0]), (int(n) for n in head_counts(record))
    at = layout.sections(n_high, n_low)
    if code == HIGH:
        tier, n, before = layout.high, n_high, 0
        key, value, meta = at.key_high, at.value_high, at.meta_high
    else:
        tier, n, before = layout.low, n_low, n_high
        key, value, meta = at.key_low, at.value_low, at.meta_low
    return [
        _Row(
            tier,
            before + i,
            start + key + i * layout.row_bytes(tier.key_bits),
            start + value + i * layout.row_bytes(tier.value_bits),
            start + meta + i * META_BYTES,
            start + at.token_metadata + (before + i) * TOKEN_METADATA_BYTES,
        )
        for i in range(n)
    ]


def _rows_by_token(
    tables: SealedTables, tiers: torch.Tensor, page: int, head: int, code: int
) -> dict[int, _Row]:
    tokens = [t for t in range(PAGE_TOKENS) if tiers[page, head, t] == code]
    return dict(zip(tokens, _rows_of(tables, page, head, code), strict=True))


def _bytes_at(tables: SealedTables, page: int, position: int, size: int) -> torch.Tensor:
    """The arena's bytes (a view) at a virtual position of the page."""
    frame, offset = divmod(position, tables.layout.frame_bytes)
    return tables.arena[tables.frames[page, frame], offset : offset + size]


def pack(raw: RawTokens, grades: Grades, tables: SealedTables) -> None:
    """See `pack.pack`."""
    heads = range(tables.layout.num_kv_heads)
    for (s, slot), h, code in product(enumerate(raw.slots.tolist()), heads, (HIGH, LOW)):
        for token, row in _rows_by_token(tables, grades.tiers, s, h, code).items():
            scales = []
            for source, bits, at in (
                (raw.keys, row.tier.key_bits, row.key),
                (raw.values, row.tier.value_bits, row.value),
            ):
                elements = source[slot, token, h]
                if bits:
                    packed, scale, zero = quantize_row(elements.float().numpy(), bits)
                    data = torch.from_numpy(packed)
                    scales += [scale, zero]
                else:
                    data = elements.view(torch.uint8)
                _bytes_at(tables, s, at, len(data))[:] = data
            if scales:
                words = torch.tensor(np.array(scales)).view(torch.uint8)
                _bytes_at(tables, s, row.meta, META_BYTES)[:] = words
            metadata = torch.tensor([token, int(grades.importance[s, h, token])])
            _bytes_at(tables, s, row.token_metadata, TOKEN_METADATA_BYTES)[:] = metadata


def copy_rows(
    old: SealedTables, old_tiers: torch.Tensor, new: SealedTables, new_tiers: torch.Tensor
) -> None:
    """See `pack.copy_rows`."""
    layout = new.layout
    for s, h, code in product(range(len(new_tiers)), range(layout.num_kv_heads), (HIGH, LOW)):
        sources = _rows_by_token(old, old_tiers, s, h, code)
        targets = _rows_by_token(new, new_tiers, s, h, code)
        for token in sources.keys() & targets.keys():
            source, target, tier = sources[token], targets[token], targets[token].tier
            for at, to, size in (
                (source.key, target.key, layout.row_bytes(tier.key_bits)),
                (source.value, target.value, layout.row_bytes(tier.value_bits)),
                (source.meta, target.meta, 0 if tier.is_raw else META_BYTES),
            ):
                if size:
                    _bytes_at(new, s, to, size)[:] = _bytes_at(old, s, at, size)


def unpack_into(
    tables: SealedTables, pages: torch.Tensor, rows: TokenRows, raw_dtype: torch.dtype
) -> None:
    """See `pack.unpack_into`."""
    layout = tables.layout
    for (n, page), h, code in product(
        enumerate(pages.tolist()), range(layout.num_kv_heads), (HIGH, LOW)
    ):
        for row in _rows_of(tables, page, h, code):
            out = int(rows.first[n, h]) + row.ordinal
            for to, bits, at, half in (
                (rows.keys, row.tier.key_bits, row.key, 0),
                (rows.values, row.tier.value_bits, row.value, 2),
            ):
                data = _bytes_at(tables, page, at, layout.row_bytes(bits))
                if bits:
                    meta = _bytes_at(tables, page, row.meta, META_BYTES).view(torch.float16)
                    scale, zero = meta.numpy()[half : half + 2]
                    to[out] = torch.from_numpy(dequantize_row(data.numpy(), scale, zero, bits))
                else:
                    to[out] = data.view(raw_dtype)
            if rows.token_metadata is not None:
                bytes_ = _bytes_at(tables, page, row.token_metadata, TOKEN_METADATA_BYTES)
                rows.token_metadata[out] = bytes_
