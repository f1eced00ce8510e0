# SPDX-License-Identifier: Apache-2.0
"""Packing and unpacking in vectorised torch, on any device: the reference for many pages.

Rows never straddle frames and every row starts at a multiple of its own size, so the arena may be
seen as a table of rows of any size that occurs, and a row as one index into it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_diffxkv.kernels.layout import (
    HIGH,
    LOW,
    META_BYTES,
    PAGE_TOKENS,
    TOKEN_METADATA_BYTES,
    head_counts,
)
from sglang_diffxkv.kernels.pack import Grades, RawTokens, TokenRows
from sglang_diffxkv.kernels.pack.quantize import CLIP, FP16_MAX
from sglang_diffxkv.kernels.pages import SealedTables


@dataclass(frozen=True)
class TierRows:
    """The M kept tokens of one tier, over several pages and all heads.

    Fields (all int64 [M]):
        page, head: which page of the tables, which KV head.
        key, value, meta: indices of their rows in the arena as a table of rows of that size.
        token_metadata: the same.
    """

    page: torch.Tensor
    head: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    meta: torch.Tensor
    token_metadata: torch.Tensor


def locate_rows(
    tables: SealedTables, page: torch.Tensor, head: torch.Tensor, ordinal: torch.Tensor, code: int
) -> TierRows:
    """Find where the rows of M tokens of one tier lie.

    Args:
        page, head, ordinal: int64 [M]; ordinal: number among the tokens of this page, head, tier.
    """
    layout, entry = tables.layout, tables.heads[page, head]
    n_high, n_low = head_counts(entry)
    at = layout.sections(n_high, n_low)
    if code == HIGH:
        tier, before = layout.high, torch.zeros_like(n_high)
        key, value, meta = at.key_high, at.value_high, at.meta_high
    else:
        tier, before = layout.low, n_high
        key, value, meta = at.key_low, at.value_low, at.meta_low

    def index(section: torch.Tensor, number: torch.Tensor, size: int) -> torch.Tensor:
        virtual = entry[:, 0].long() + section + number * size
        frame = tables.frames[page, virtual // layout.frame_bytes].long()
        return (frame * layout.frame_bytes + virtual % layout.frame_bytes) // size

    return TierRows(
        page,
        head,
        index(key, ordinal, layout.row_bytes(tier.key_bits)),
        index(value, ordinal, layout.row_bytes(tier.value_bits)),
        index(meta, ordinal, META_BYTES),
        index(at.token_metadata, before + ordinal, TOKEN_METADATA_BYTES),
    )


def pack(raw: RawTokens, grades: Grades, tables: SealedTables) -> None:
    """As `kernels.pack.pack`."""
    for code in (HIGH, LOW):
        tier = tables.layout.high if code == HIGH else tables.layout.low
        chosen = grades.tiers == code
        page, head, token = chosen.nonzero().unbind(1)
        rows = locate_rows(tables, page, head, chosen.cumsum(-1)[page, head, token] - 1, code)
        slot = raw.slots[page].long()
        meta = []
        for source, bits, index in (
            (raw.keys, tier.key_bits, rows.key),
            (raw.values, tier.value_bits, rows.value),
        ):
            data = source[slot, token, head]
            if bits:
                data, scale_zero = quantize_rows(data.float(), bits)
                meta.append(scale_zero)
            _write(tables, index, data.view(torch.uint8))
        if meta:
            _write(tables, rows.meta, torch.cat(meta, dim=1).view(torch.uint8))
        importance = grades.importance[page, head, token]
        _write(tables, rows.token_metadata, torch.stack([token.to(torch.uint8), importance], 1))


def copy_rows(
    old: SealedTables, old_tiers: torch.Tensor, new: SealedTables, new_tiers: torch.Tensor
) -> None:
    """As `kernels.pack.copy_rows`."""
    layout = new.layout
    for code in (HIGH, LOW):
        tier = layout.high if code == HIGH else layout.low
        same = (old_tiers == code) & (new_tiers == code)
        page, head, token = same.nonzero().unbind(1)
        source, target = (
            locate_rows(tables, page, head, (tiers == code).cumsum(-1)[page, head, token] - 1, code)
            for tables, tiers in ((old, old_tiers), (new, new_tiers))
        )
        for at, to, size in (
            (source.key, target.key, layout.row_bytes(tier.key_bits)),
            (source.value, target.value, layout.row_bytes(tier.value_bits)),
            (source.meta, target.meta, 0 if tier.is_raw else META_BYTES),
        ):
            if size:
                _write(new, to, _read(old, at, size))


def _write(tables: SealedTables, index: torch.Tensor, data: torch.Tensor) -> None:
    """Store rows uint8 [M, size]."""
    tables.arena.view(-1, data.shape[1])[index] = data


def _read(tables: SealedTables, index: torch.Tensor, size: int) -> torch.Tensor:
    return tables.arena.view(-1, size)[index]


def unpack_into(
    tables: SealedTables, pages: torch.Tensor, rows: TokenRows, raw_dtype: torch.dtype
) -> None:
    """As `kernels.pack.unpack_into`."""
    layout, pages = tables.layout, pages.long()
    n_high, n_low = head_counts(tables.heads[pages])
    slot = torch.arange(PAGE_TOKENS, device=pages.device)
    for code in (HIGH, LOW):
        tier = layout.high if code == HIGH else layout.low
        kept = slot < (n_high if code == HIGH else n_low)[..., None]
        n, head, ordinal = kept.nonzero().unbind(1)
        found = locate_rows(tables, pages[n], head, ordinal, code)
        target = rows.first[n, head] + ordinal
        if code == LOW:
            target += n_high[n, head]
        if not tier.is_raw:
            meta = _read(tables, found.meta, META_BYTES).view(torch.float16)
        for out, bits, index, half in (
            (rows.keys, tier.key_bits, found.key, slice(0, 2)),
            (rows.values, tier.value_bits, found.value, slice(2, 4)),
        ):
            data = _read(tables, index, layout.row_bytes(bits))
            values = dequantize_rows(data, meta[:, half], bits) if bits else data.view(raw_dtype)
            out[target] = values.to(out.dtype)
        if rows.token_metadata is not None:
            data = _read(tables, found.token_metadata, TOKEN_METADATA_BYTES)
            rows.token_metadata[target] = data


def quantize_rows(rows: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize every row fp32 [M, D] to `CLIP` of its own min/max range.

    Returns:
        Bytes uint8 [M, D * bits / 8] in split-plane order, and fp16 [M, 2] of (scale, zero).
    """
    levels = 2**bits - 1
    low, high = rows.aminmax(dim=1, keepdim=True)
    scale = ((high - low) * CLIP[bits] / levels).clamp(max=FP16_MAX).half()
    # All products are exact, so that a fused multiply-add elsewhere gives the same bits.
    zero = (0.5 * low + 0.5 * high) - scale.float() * (levels / 2)
    zero = zero.clamp(-FP16_MAX, FP16_MAX).half()
    # A constant row has scale 0 and is its zero: divide by 1 instead, any code will do.
    step = torch.where(scale > 0, scale, 1.0).float()
    codes = ((rows - zero.float()) / step).round().clamp(0, levels).to(torch.uint8)
    planes = codes.chunk(8 // bits, dim=1)
    packed = planes[0].clone()
    for j, plane in enumerate(planes[1:], 1):
        packed |= plane << (j * bits)
    return packed, torch.cat([scale, zero], dim=1)


def dequantize_rows(packed: torch.Tensor, meta: torch.Tensor, bits: int) -> torch.Tensor:
    """fp32 [M, D] of `quantize_rows` bytes [M, D * bits / 8] and meta fp16 [M, 2]."""
    scale, zero = meta.float().unbind(1)
    planes = [(packed >> shift) & 2**bits - 1 for shift in range(0, 8, bits)]
    return torch.addcmul(zero[:, None], torch.cat(planes, dim=1).float(), scale[:, None])
