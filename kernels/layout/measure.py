# SPDX-License-Identifier: Apache-2.0
"""Sizes of sealed pages from their tier maps, before any byte is written."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.layout.page import HIGH, LOW, META_BYTES, NOTE_BYTES, PageLayout

COUNT_BITS = 8
"""Word 1 of a head's directory entry is ``n_high | n_low << COUNT_BITS``."""


class SectionTensors(NamedTuple):
    """`layout.Sections` of many heads: int64 tensors of one shape."""

    key_high: torch.Tensor
    value_high: torch.Tensor
    key_low: torch.Tensor
    value_low: torch.Tensor
    meta_high: torch.Tensor
    meta_low: torch.Tensor
    notes: torch.Tensor
    total: torch.Tensor


def section_tensors(
    n_high: torch.Tensor, n_low: torch.Tensor, layout: PageLayout
) -> SectionTensors:
    """`PageLayout.sections` for int64 tensors of counts, any shape."""
    high, low = layout.high, layout.low
    rows = (
        (n_high, layout.row_bytes(high.key_bits)),
        (n_high, layout.row_bytes(high.value_bits)),
        (n_low, layout.row_bytes(low.key_bits)),
        (n_low, layout.row_bytes(low.value_bits)),
        (n_high, 0 if high.is_raw else META_BYTES),
        (n_low, 0 if low.is_raw else META_BYTES),
        (n_high + n_low, NOTE_BYTES),
    )
    starts, cursor = [], torch.zeros_like(n_high)
    for n, row in rows:
        start = _align_up(cursor, row) if row else cursor
        starts.append(start)
        cursor = start + n * row
    starts.append(_align_up(cursor, layout.align))
    return SectionTensors(*starts)


def _align_up(x: torch.Tensor, multiple: int) -> torch.Tensor:
    return (x + multiple - 1) // multiple * multiple


class Measured(NamedTuple):
    """Directory entries of (page, layer)s that are to be sealed.

    Fields:
        heads: int32 [..., H, 2], word 0 the byte offset of the head's payload in the virtual space
            of its (page, layer), word 1 ``n_high | n_low << 8``.
        nbytes: int32 [...], payload of the (page, layer); it needs
            ``ceil(nbytes / frame_bytes)`` frames.
    """

    heads: torch.Tensor
    nbytes: torch.Tensor


def measure(tiers: torch.Tensor, layout: PageLayout) -> Measured:
    """Lay the heads of every (page, layer) one after the other.

    Args:
        tiers: uint8 [..., H, 64] tier codes (`layout.PRUNED`, `LOW`, `HIGH`).
        layout: byte layout.
    """
    n_high = (tiers == HIGH).sum(-1)
    n_low = (tiers == LOW).sum(-1)
    sizes = section_tensors(n_high, n_low, layout).total
    ends = sizes.cumsum(-1)
    words = torch.stack([ends - sizes, n_high | n_low << COUNT_BITS], dim=-1)
    return Measured(words.int(), ends[..., -1].int())


def head_counts(heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """n_high and n_low, int64 [...], of directory entries int32 [..., 2]."""
    word = heads[..., 1].long()
    return word & (2**COUNT_BITS - 1), word >> COUNT_BITS
