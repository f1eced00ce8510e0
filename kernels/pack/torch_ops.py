# SPDX-License-Identifier: Apache-2.0
"""Writing and reading sealed payload in vectorised torch: one pass per tier over its tokens."""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels.layout import HIGH, LOW, META_BYTES, NOTE_BYTES, PAGE_TOKENS, PageLayout
from sglang_diffxkv.kernels.layout.measure import head_counts
from sglang_diffxkv.kernels.layout.payload import Payload
from sglang_diffxkv.kernels.pack.quantize import dequantize_rows, quantize_rows
from sglang_diffxkv.kernels.pack.rows import TierRows, locate_rows, row_index


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
    """Write the payload of S pages of one layer; arguments as in `pack.pack`."""
    for code in (HIGH, LOW):
        high = code == HIGH
        tier = layout.high if high else layout.low
        chosen = tiers == code
        page, head, token = chosen.nonzero().unbind(1)
        rank = chosen.cumsum(-1)[page, head, token] - 1
        rows = locate_rows(page, head, rank, heads, layout, high=high)
        slot = slots[page].long()
        meta = []
        for raw, bits, virtual in (
            (k_raw, tier.key_bits, rows.key),
            (v_raw, tier.value_bits, rows.value),
        ):
            source = raw[slot, token, head]
            if bits:
                data, scale_zero = quantize_rows(source.float(), bits)
                meta.append(scale_zero)
            else:
                data = source.view(torch.uint8)
            _write(arena, virtual, rows, frames, data)
        if meta:
            _write(arena, rows.meta, rows, frames, torch.cat(meta, dim=1).view(torch.uint8))
        notes = torch.stack([token.to(torch.uint8), importance[page, head, token]], dim=1)
        _write(arena, rows.note, rows, frames, notes)


def copy_rows(old: Payload, new: Payload, layout: PageLayout) -> None:
    """Give tokens of the same tier in both payloads their old bytes; see `pack.copy_rows`."""
    for code in (HIGH, LOW):
        tier = layout.high if code == HIGH else layout.low
        same = (old.tiers == code) & (new.tiers == code)
        source, target = (_rows_of(same, code, payload, layout) for payload in (old, new))
        for at, to, size in (
            (source.key, target.key, layout.row_bytes(tier.key_bits)),
            (source.value, target.value, layout.row_bytes(tier.value_bits)),
            (source.meta, target.meta, 0 if tier.is_raw else META_BYTES),
        ):
            if size:
                data = _read(old.arena, at, source, old.frames, size)
                _write(new.arena, to, target, new.frames, data)


def _rows_of(chosen: torch.Tensor, code: int, payload: Payload, layout: PageLayout) -> TierRows:
    """Rows of the chosen tokens (bool [S, H, 64]), which are all of the tier ``code``."""
    page, head, token = chosen.nonzero().unbind(1)
    rank = (payload.tiers == code).cumsum(-1)[page, head, token] - 1
    return locate_rows(page, head, rank, payload.heads, layout, high=code == HIGH)


def _write(
    arena: torch.Tensor,
    virtual: torch.Tensor,
    rows: TierRows,
    frames: torch.Tensor,
    data: torch.Tensor,
) -> None:
    """Store rows uint8 [M, size] at virtual positions int64 [M] of their pages."""
    size = data.shape[1]
    index = row_index(virtual, rows.page, frames, arena.shape[1], size)
    arena.view(-1, size)[index] = data


def _read(
    arena: torch.Tensor, virtual: torch.Tensor, rows: TierRows, frames: torch.Tensor, size: int
) -> torch.Tensor:
    """Rows uint8 [M, size] from virtual positions int64 [M] of their pages."""
    return arena.view(-1, size)[row_index(virtual, rows.page, frames, arena.shape[1], size)]


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
    """Dequantise N pages of one layer into chosen rows; arguments as in `pack.unpack_into`."""
    frames, heads = frames[pages], heads[pages]
    n_high, n_low = head_counts(heads)
    slot = torch.arange(PAGE_TOKENS, device=arena.device)
    for high in (True, False):
        tier = layout.high if high else layout.low
        mask = slot < (n_high if high else n_low)[..., None]
        page, head, rank = mask.nonzero().unbind(1)
        rows = locate_rows(page, head, rank, heads, layout, high=high)
        target = first[page, head] + rank
        if not high:
            target += n_high[page, head]
        if not tier.is_raw:
            meta = _read(arena, rows.meta, rows, frames, META_BYTES).view(torch.float16)
        for out, bits, virtual, half in (
            (k, tier.key_bits, rows.key, slice(0, 2)),
            (v, tier.value_bits, rows.value, slice(2, 4)),
        ):
            data = _read(arena, virtual, rows, frames, layout.row_bytes(bits))
            values = dequantize_rows(data, meta[:, half], bits) if bits else data.view(raw_dtype)
            out[target] = values.to(out.dtype)
        if notes is not None:
            notes[target] = _read(arena, rows.note, rows, frames, NOTE_BYTES)
