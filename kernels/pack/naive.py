# SPDX-License-Identifier: Apache-2.0
"""Readable reference of packing and unpacking: one token of one head of one page at a time."""

from __future__ import annotations

from itertools import product

import numpy as np
import torch

from sglang_diffxkv.kernels.layout import (
    HIGH,
    LOW,
    META_BYTES,
    NOTE_BYTES,
    PAGE_TOKENS,
    PageLayout,
    TierFormat,
)
from sglang_diffxkv.kernels.layout.payload import Payload
from sglang_diffxkv.kernels.pack.quantize import CLIP, FP16_MAX


def quantize_row(row: np.ndarray, bits: int) -> tuple[np.ndarray, np.float16, np.float16]:
    """Bytes (split-plane order), scale and zero of one row fp32 [D]."""
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


def _bytes_at(
    arena: torch.Tensor, frames: torch.Tensor, position: int, size: int, frame_bytes: int
) -> torch.Tensor:
    """The arena bytes (a view) of a row at a virtual position of the page with these frames."""
    frame, offset = divmod(position, frame_bytes)
    return arena[frames[frame], offset : offset + size]


def _tier_rows(
    layout: PageLayout, head: torch.Tensor, *, high: bool
) -> list[tuple[TierFormat, int, int, int, int, int]]:
    """(format, row in storage order, key, value, meta, notes position) of each token of a tier."""
    start, counts = head.tolist()
    n_high, n_low = counts & 0xFF, counts >> 8
    at = layout.sections(n_high, n_low)
    if high:
        tier, n, skipped, key, value, meta = (
            layout.high, n_high, 0, at.key_high, at.value_high, at.meta_high
        )  # fmt: skip
    else:
        tier, n, skipped, key, value, meta = (
            layout.low, n_low, n_high, at.key_low, at.value_low, at.meta_low
        )  # fmt: skip
    return [
        (
            tier,
            skipped + i,
            start + key + i * layout.row_bytes(tier.key_bits),
            start + value + i * layout.row_bytes(tier.value_bits),
            start + meta + i * META_BYTES,
            start + at.notes + (skipped + i) * NOTE_BYTES,
        )
        for i in range(n)
    ]


def pack(
    k_raw: torch.Tensor,
    v_raw: torch.Tensor,
    slots: torch.Tensor,
    tiers: torch.Tensor,
    importance: torch.Tensor,
    frames: torch.Tensor,
    heads: torch.Tensor,
    arena: torch.Tensor,
    layout: PageLayout,
) -> None:
    """See `pack.pack`."""
    for s, slot in enumerate(slots.tolist()):
        for h in range(layout.num_kv_heads):
            for code in (HIGH, LOW):
                tokens = [t for t in range(PAGE_TOKENS) if tiers[s, h, t] == code]
                rows = _tier_rows(layout, heads[s, h], high=code == HIGH)
                for token, (tier, _, key, value, meta, note) in zip(tokens, rows, strict=True):
                    scales = []
                    for raw, bits, at in (
                        (k_raw, tier.key_bits, key),
                        (v_raw, tier.value_bits, value),
                    ):
                        row = raw[slot, token, h]
                        if bits:
                            packed, scale, zero = quantize_row(row.float().numpy(), bits)
                            data = torch.from_numpy(packed)
                            scales += [scale, zero]
                        else:
                            data = row.view(torch.uint8)
                        _bytes_at(arena, frames[s], at, len(data), layout.frame_bytes)[:] = data
                    if scales:
                        words = torch.tensor(np.array(scales)).view(torch.uint8)
                        _bytes_at(arena, frames[s], meta, META_BYTES, layout.frame_bytes)[:] = words
                    notes = torch.tensor([token, int(importance[s, h, token])], dtype=torch.uint8)
                    _bytes_at(arena, frames[s], note, NOTE_BYTES, layout.frame_bytes)[:] = notes


def copy_rows(old: Payload, new: Payload, layout: PageLayout) -> None:
    """See `torch_ops.copy_rows`."""
    size = layout.frame_bytes
    for s, h, code in product(range(len(old.tiers)), range(layout.num_kv_heads), (HIGH, LOW)):
        rows = []
        for payload in (old, new):
            tokens = [t for t in range(PAGE_TOKENS) if payload.tiers[s, h, t] == code]
            located = _tier_rows(layout, payload.heads[s, h], high=code == HIGH)
            rows.append(dict(zip(tokens, located, strict=True)))
        for token in rows[0].keys() & rows[1].keys():
            tier, _, *source, _ = rows[0][token]
            _, _, *target, _ = rows[1][token]
            meta = 0 if tier.is_raw else META_BYTES
            widths = (layout.row_bytes(tier.key_bits), layout.row_bytes(tier.value_bits), meta)
            for at, to, width in zip(source, target, widths, strict=True):
                if not width:
                    continue
                data = _bytes_at(old.arena, old.frames[s], at, width, size)
                _bytes_at(new.arena, new.frames[s], to, width, size)[:] = data


def unpack_into(
    arena: torch.Tensor,
    frames: torch.Tensor,
    heads: torch.Tensor,
    pages: torch.Tensor,
    first: torch.Tensor,
    layout: PageLayout,
    raw_dtype: torch.dtype,
    k: torch.Tensor,
    v: torch.Tensor,
    notes: torch.Tensor | None = None,
) -> None:
    """See `pack.unpack_into`."""
    size = layout.frame_bytes
    for n, page in enumerate(pages.tolist()):
        for h in range(layout.num_kv_heads):
            for high in (True, False):
                for tier, i, key, value, meta, note in _tier_rows(
                    layout, heads[page, h], high=high
                ):
                    row = int(first[n, h]) + i
                    for out, bits, at, half in (
                        (k, tier.key_bits, key, 0),
                        (v, tier.value_bits, value, 2),
                    ):
                        data = _bytes_at(arena, frames[page], at, layout.row_bytes(bits), size)
                        if bits:
                            words = _bytes_at(arena, frames[page], meta, META_BYTES, size)
                            scale, zero = words.view(torch.float16).numpy()[half : half + 2]
                            values = dequantize_row(data.numpy(), scale, zero, bits)
                            out[row] = torch.from_numpy(values)
                        else:
                            out[row] = data.view(raw_dtype)
                    if notes is not None:
                        notes[row] = _bytes_at(arena, frames[page], note, NOTE_BYTES, size)
