# SPDX-License-Identifier: Apache-2.0
"""Addresses of payload rows in the arena, for vectorised torch.

Rows never straddle frames and every row starts at a multiple of its own size, so the arena may be
seen as a table of rows of any size that occurs, and a row as one index into it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_diffxkv.kernels.layout import META_BYTES, NOTE_BYTES, PageLayout
from sglang_diffxkv.kernels.layout.measure import head_counts, section_tensors


@dataclass(frozen=True)
class TierRows:
    """The M kept tokens of one tier, over several pages and all heads.

    Fields (all int64 [M]):
        page, head: which page of the batch, which KV head.
        rank: number among the tokens of this page, head and tier.
        key, value, meta: byte positions of their rows in the virtual space of the (page, layer).
        note: the same for the notes row.
    """

    page: torch.Tensor
    head: torch.Tensor
    rank: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    meta: torch.Tensor
    note: torch.Tensor


def locate_rows(
    page: torch.Tensor,
    head: torch.Tensor,
    rank: torch.Tensor,
    heads: torch.Tensor,
    layout: PageLayout,
    *,
    high: bool,
) -> TierRows:
    """Find where the rows of M tokens of one tier lie.

    Args:
        page, head, rank: int64 [M], see `TierRows`.
        heads: int32 [N, H, 2], directory entries of the batch's pages.
        high: whether the tokens are of the high tier.
    """
    entry = heads[page, head]
    n_high, n_low = head_counts(entry)
    start = entry[:, 0].long()
    at = section_tensors(n_high, n_low, layout)
    if high:
        tier, first_note = layout.high, torch.zeros_like(n_high)
        key, value, meta = at.key_high, at.value_high, at.meta_high
    else:
        tier, first_note = layout.low, n_high
        key, value, meta = at.key_low, at.value_low, at.meta_low
    return TierRows(
        page,
        head,
        rank,
        key=start + key + rank * layout.row_bytes(tier.key_bits),
        value=start + value + rank * layout.row_bytes(tier.value_bits),
        meta=start + meta + rank * META_BYTES,
        note=start + at.notes + (first_note + rank) * NOTE_BYTES,
    )


def row_index(
    virtual: torch.Tensor, page: torch.Tensor, frames: torch.Tensor, frame_bytes: int, size: int
) -> torch.Tensor:
    """Index of rows in ``arena.view(-1, size)``.

    Args:
        virtual: int64 [M] byte positions in the virtual space of a (page, layer).
        page: int64 [M], row of ``frames`` for each.
        frames: int32 [N, max_frames].
        size: bytes of a row.
    """
    frame = frames[page, virtual // frame_bytes].long()
    return (frame * frame_bytes + virtual % frame_bytes) // size
