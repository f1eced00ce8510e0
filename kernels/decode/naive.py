# SPDX-License-Identifier: Apache-2.0
"""Readable references in float64: one sequence, KV head and page at a time."""

from __future__ import annotations

import math

import torch

from sglang_diffxkv.kernels.layout import META_BYTES, PAGE_TOKENS, PageLayout, head_counts
from sglang_diffxkv.kernels.merge import AttentionState
from sglang_diffxkv.kernels.pages import OpenPages, SealedPages
from sglang_diffxkv.kernels.softmax import LOG2_E, Softmax, capped


def read_bytes(
    arena: torch.Tensor, frames: torch.Tensor, offset: int, count: int, layout: PageLayout
) -> torch.Tensor:
    """``count`` bytes at ``offset`` of the virtual byte space whose frame table is ``frames``."""
    at = torch.arange(offset, offset + count)
    return arena[frames[at // layout.frame_bytes].long(), at % layout.frame_bytes]


def unpack_rows(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (float64 [n, D]) of rows of split-plane bytes [n, D * bits / 8]."""
    planes = [rows >> shift & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return torch.cat(planes, 1).double()


def read_section(
    arena: torch.Tensor,
    frames: torch.Tensor,
    start: int,
    bits: int,
    meta: torch.Tensor,
    layout: PageLayout,
    raw_dtype: torch.dtype,
) -> torch.Tensor:
    """Dequantized rows (float64 [n, D]) of the section at ``start``.

    Args:
        meta: fp16 [n, 2], scale and zero of each row; unused by raw rows (0 bits).
    """
    n, size = len(meta), layout.row_bytes(bits)
    rows = read_bytes(arena, frames, start, n * size, layout).view(n, size)
    if not bits:
        return rows.view(raw_dtype).double()
    scale, zero = meta.double().unsqueeze(2).unbind(1)
    return unpack_rows(rows, bits) * scale + zero


def read_head(
    arena: torch.Tensor,
    frames: torch.Tensor,
    record: torch.Tensor,
    layout: PageLayout,
    raw_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dequantized keys and values (float64 [n, D]) of one head of a sealed page."""
    offset = int(record[0])
    n_high, n_low = (int(n) for n in head_counts(record))
    s = layout.sections(n_high, n_low)
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    for tier, n, key, value, meta_start in (
        (layout.high, n_high, s.key_high, s.value_high, s.meta_high),
        (layout.low, n_low, s.key_low, s.value_low, s.meta_low),
    ):
        meta = torch.empty(n, 4, dtype=torch.float16)
        if not tier.is_raw:
            raw = read_bytes(arena, frames, offset + meta_start, n * META_BYTES, layout)
            meta = raw.view(torch.float16).view(n, 4)
        for rows, start, bits, pair in (
            (keys, key, tier.key_bits, meta[:, :2]),
            (values, value, tier.value_bits, meta[:, 2:]),
        ):
            rows.append(read_section(arena, frames, offset + start, bits, pair, layout, raw_dtype))
    return torch.cat(keys), torch.cat(values)


def attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, softmax: Softmax
) -> tuple[torch.Tensor, float]:
    """Attention of one query head [D] over [n, D]; returns (out [D], base-2 LSE)."""
    if not len(keys):
        return torch.zeros_like(q, dtype=torch.float64), -math.inf
    scores = capped(keys @ q.double() * softmax.scale, softmax.cap)
    lse = torch.logsumexp(scores, 0)
    return torch.exp(scores - lse) @ values, float(lse) * LOG2_E


def _attend_all(
    q: torch.Tensor, kv: list[list[tuple[torch.Tensor, torch.Tensor]]], softmax: Softmax
) -> AttentionState:
    """Attention of q [B, Hq, D] over kv[sequence][KV head] = (keys, values)."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    for b in range(q.shape[0]):
        group = q.shape[1] // len(kv[b])
        for h in range(q.shape[1]):
            keys, values = kv[b][h // group]
            out[b, h], lse[b, h] = attend(q[b, h], keys, values, softmax)
    return AttentionState(out.float(), lse.float())


def decode_sealed(q: torch.Tensor, sealed: SealedPages, softmax: Softmax) -> AttentionState:
    """See `decode.decode_sealed`."""
    arena, frames, heads, layout, indptr, pages = sealed
    empty = torch.empty(0, layout.head_dim, dtype=torch.float64)
    kv = []
    for b in range(q.shape[0]):
        listed = pages[indptr[b] : indptr[b + 1]].tolist()
        per_head = []
        for h in range(layout.num_kv_heads):
            parts = [read_head(arena, frames[p], heads[p, h], layout, q.dtype) for p in listed]
            keys = torch.cat([empty, *(k for k, _ in parts)])
            values = torch.cat([empty, *(v for _, v in parts)])
            per_head.append((keys, values))
        kv.append(per_head)
    return _attend_all(q, kv, softmax)


def decode_open(
    q: torch.Tensor, opened: OpenPages, last_len: torch.Tensor, softmax: Softmax
) -> AttentionState:
    """See `decode.decode_open`."""
    kv = []
    for b in range(q.shape[0]):
        mine = slice(int(opened.indptr[b]), int(opened.indptr[b + 1]))
        listed = opened.slots[mine].long()
        length = max(0, len(listed) - 1) * PAGE_TOKENS + (int(last_len[b]) if len(listed) else 0)
        position = opened.position[mine].long()[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)
        seen = torch.arange(len(listed) * PAGE_TOKENS) < length
        if softmax.window_left >= 0 and length:
            query = position.flatten()[length - 1]  # its own token is the last
            seen &= query - position.flatten() <= softmax.window_left
        keys = opened.keys[listed].flatten(0, 1)[seen].double()
        values = opened.values[listed].flatten(0, 1)[seen].double()
        kv.append([(keys[:, h], values[:, h]) for h in range(keys.shape[1])])
    return _attend_all(q, kv, softmax)
