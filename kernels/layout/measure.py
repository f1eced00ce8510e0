# SPDX-License-Identifier: Apache-2.0
"""Records of the page directory, and sizes of sealed pages before any byte is written."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.layout.page import HIGH, LOW, PageLayout

COUNT_BITS = 8


def head_records(offset: torch.Tensor, n_high: torch.Tensor, n_low: torch.Tensor) -> torch.Tensor:
    """Directory records int32 [..., 2] of heads: payload offset, ``n_high | n_low << 8``.

    Args:
        offset, n_high, n_low: integers [...].
    """
    return torch.stack([offset, n_high | n_low << COUNT_BITS], dim=-1).int()


def head_counts(heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """n_high and n_low, int64 [...], of `head_records` [..., 2]."""
    word = heads[..., 1].long()
    return word & (2**COUNT_BITS - 1), word >> COUNT_BITS


class Measured(NamedTuple):
    """Directory records of (page, layer)s that are to be sealed.

    Fields:
        heads: int32 [..., H, 2], `head_records`; offsets in the virtual space of a (page, layer).
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
    sizes = layout.sections(n_high, n_low).total
    ends = sizes.cumsum(-1)
    return Measured(head_records(ends - sizes, n_high, n_low), ends[..., -1].int())
