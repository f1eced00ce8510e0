# SPDX-License-Identifier: Apache-2.0
"""Vectorised fp32 torch versions, for any device: the fallback where no compiled kernel exists."""

from __future__ import annotations

import math

import torch

from sglang_diffxkv.kernels.layout import META_BYTES, PAGE_TOKENS, PageLayout, TierFormat
from sglang_diffxkv.kernels.merge import AttentionState, merge_states

LOG2_E = math.log2(math.e)


def unpack_rows(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of split-plane rows: uint8 [..., D * bits / 8] to fp32 [..., D]."""
    planes = [rows >> shift & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return torch.cat(planes, -1).float()


def _section_starts(n: torch.Tensor, layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Starts of (key, value, meta) of the high and the low tier, each [..., 3].

    Args:
        n: int64 [..., 2], tokens in the high and in the low tier.
    """
    high, low = layout.high, layout.low
    n_high, n_low = n.unbind(-1)
    sizes = (
        (n_high, layout.row_bytes(high.key_bits)),
        (n_high, layout.row_bytes(high.value_bits)),
        (n_low, layout.row_bytes(low.key_bits)),
        (n_low, layout.row_bytes(low.value_bits)),
        (n_high, 0 if high.is_raw else META_BYTES),
        (n_low, 0 if low.is_raw else META_BYTES),
    )
    starts, cursor = [], torch.zeros_like(n_high)
    for count, row in sizes:
        cursor = (cursor + row - 1) // row * row if row else cursor
        starts.append(cursor)
        cursor = cursor + count * row
    key_high, value_high, key_low, value_low, meta_high, meta_low = starts
    return (
        torch.stack((key_high, value_high, meta_high), -1),
        torch.stack((key_low, value_low, meta_low), -1),
    )


def _gather_tier(
    arena: torch.Tensor,
    frames: torch.Tensor,
    page: torch.Tensor,
    starts: torch.Tensor,
    tier: TierFormat,
    layout: PageLayout,
    raw_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (fp32 [T, D]) of T tokens.

    Args:
        page: int64 [T], the token's page.
        starts: int64 [T, 3], byte offsets of the token's key, value and meta row.
    """
    flat = arena.view(-1)

    def rows(which: int, size: int) -> torch.Tensor:
        at = starts[:, which]
        frame = frames[page, at // layout.frame_bytes].long()
        first = frame * layout.frame_bytes + at % layout.frame_bytes
        return flat[first.unsqueeze(1) + torch.arange(size, device=flat.device)]

    keys = rows(0, layout.row_bytes(tier.key_bits))
    values = rows(1, layout.row_bytes(tier.value_bits))
    if tier.is_raw:
        return keys.view(raw_dtype).float(), values.view(raw_dtype).float()
    meta = rows(2, META_BYTES).view(torch.float16).float()
    keys = unpack_rows(keys, tier.key_bits) * meta[:, 0:1] + meta[:, 1:2]
    values = unpack_rows(values, tier.value_bits) * meta[:, 2:3] + meta[:, 3:4]
    return keys, values


def _attend_rows(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, row: torch.Tensor, sm_scale: float
) -> AttentionState:
    """Segmented attention: token t is attended by the whole group ``row[t]``.

    Args:
        q: fp32 [rows, G, D]; keys, values: fp32 [T, D]; row: int64 [T].
    """
    rows, group, _ = q.shape
    scores = torch.einsum("td,tgd->tg", keys, q[row]) * (sm_scale * LOG2_E)
    index = row.unsqueeze(1).expand(-1, group)
    top = torch.full((rows, group), -math.inf, device=q.device)
    top = top.scatter_reduce(0, index, scores, "amax")
    weights = torch.exp2(scores - top[row])
    total = torch.zeros_like(top).index_add_(0, row, weights)
    out = torch.zeros_like(q).index_add_(0, row, weights.unsqueeze(-1) * values.unsqueeze(1))
    out = out / torch.where(total > 0, total, torch.ones_like(total)).unsqueeze(-1)
    return AttentionState(out, top + torch.log2(total))


def _flatten(part: AttentionState, q: torch.Tensor) -> AttentionState:
    return AttentionState(part.out.reshape(q.shape), part.lse.reshape(q.shape[:2]))


def decode_sealed(
    q: torch.Tensor,
    arena: torch.Tensor,
    frames: torch.Tensor,
    heads: torch.Tensor,
    indptr: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    sm_scale: float,
) -> AttentionState:
    """See :func:`sglang_diffxkv.kernels.decode.decode_sealed`."""
    batch, kv_heads, device = q.shape[0], layout.num_kv_heads, q.device
    grouped = q.float().reshape(batch * kv_heads, -1, layout.head_dim)
    page = pages.long()
    sequence = torch.repeat_interleave(
        torch.arange(batch, device=device), (indptr[1:] - indptr[:-1]).long()
    )
    # One entry per (page, head), then one per (page, head, token of the tier).
    row = (sequence.unsqueeze(1) * kv_heads + torch.arange(kv_heads, device=device)).flatten()
    page = page.repeat_interleave(kv_heads)
    record = heads[pages.long()].reshape(-1, 2).long()
    counts = torch.stack((record[:, 1] & 0xFF, record[:, 1] >> 8 & 0xFF), -1)
    parts = []
    tiers = (layout.high, layout.low)
    for i, (tier, starts) in enumerate(zip(tiers, _section_starts(counts, layout), strict=True)):
        n = counts[:, i]
        entry = torch.repeat_interleave(torch.arange(len(n), device=device), n)
        within = torch.arange(len(entry), device=device) - (n.cumsum(0) - n)[entry]
        sizes = (layout.row_bytes(tier.key_bits), layout.row_bytes(tier.value_bits), META_BYTES)
        step = within.unsqueeze(1) * torch.tensor(sizes, device=device)
        at = record[entry, :1] + starts[entry] + step
        keys, values = _gather_tier(arena, frames, page[entry], at, tier, layout, q.dtype)
        parts.append(_attend_rows(grouped, keys, values, row[entry], sm_scale))
    return _flatten(merge_states(*parts), q)


def decode_open(
    q: torch.Tensor,
    k_raw: torch.Tensor,
    v_raw: torch.Tensor,
    indptr: torch.Tensor,
    slots: torch.Tensor,
    last_len: torch.Tensor,
    sm_scale: float,
) -> AttentionState:
    """See :func:`sglang_diffxkv.kernels.decode.decode_open`."""
    batch, kv_heads, device = q.shape[0], k_raw.shape[2], q.device
    grouped = q.float().reshape(batch * kv_heads, -1, q.shape[2])
    sequence = torch.repeat_interleave(
        torch.arange(batch, device=device), (indptr[1:] - indptr[:-1]).long()
    )
    is_last = torch.arange(len(slots), device=device) == indptr[1:].long()[sequence] - 1
    n = torch.where(is_last, last_len.long()[sequence], PAGE_TOKENS)
    entry, token = torch.nonzero(
        torch.arange(PAGE_TOKENS, device=device) < n.unsqueeze(1), as_tuple=True
    )
    slot = slots.long()[entry]
    row = sequence[entry].unsqueeze(1) * kv_heads + torch.arange(kv_heads, device=device)
    keys = k_raw[slot, token].float().flatten(0, 1)
    values = v_raw[slot, token].float().flatten(0, 1)
    return _flatten(_attend_rows(grouped, keys, values, row.flatten(), sm_scale), q)
