# SPDX-License-Identifier: Apache-2.0
"""Ways to quantize keys or values, simulated: rows come back as fp32 with the error of each way."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.basis.rotation import rotate
from sglang_diffxkv.kernels.layout import PAGE_TOKENS, TOKEN_METADATA_BYTES, TierFormat

META_BYTES = 4
"""fp16 scale and zero of a group."""
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)


class Side(NamedTuple):
    """How keys, or how values, are quantized."""

    clip: float | None = 1.0
    """Share of the min/max range that codes cover, about its centre; None: whichever of `CLIPS`
    has the least squared error, row by row."""
    rotated: bool = False
    groups: int = 1
    """Ranges of a row, for equal parts of it."""
    by_channel: bool = False
    """A range for each channel of a page instead of each token (KIVI, arXiv 2402.02750)."""

    def meta_bytes(self, dim: int) -> float:
        """Bytes of metadata per token; by channel: if all tokens of a page are in one tier."""
        return META_BYTES * (dim / PAGE_TOKENS if self.by_channel else self.groups)


def token_bytes(tier: TierFormat, key: Side, value: Side, dim: int) -> float:
    """Bytes of a token of one KV head with D = dim, metadata and notes included."""
    rows = dim * (tier.key_bits + tier.value_bits) / 8
    return rows + key.meta_bytes(dim) + value.meta_bytes(dim) + TOKEN_METADATA_BYTES


def quantized(x: torch.Tensor, bits: int, side: Side) -> torch.Tensor:
    """What fp32 rows [..., n, D] are read back as; by channel, n is a multiple of a page."""
    if side.rotated:
        return rotate(quantized(rotate(x), bits, side._replace(rotated=False)))
    if side.by_channel:
        rows = x.unflatten(-2, (-1, PAGE_TOKENS)).mT
        return _rows(rows, bits, side.clip).mT.flatten(-3, -2)
    return _rows(x.unflatten(-1, (side.groups, -1)), bits, side.clip).flatten(-2)


def _rows(rows: torch.Tensor, bits: int, clip: float | None) -> torch.Tensor:
    if clip is not None:
        return _clipped(rows, bits, clip)
    best, least = rows, torch.full_like(rows[..., :1], torch.inf)
    for share in CLIPS:
        tried = _clipped(rows, bits, share)
        error = (tried - rows).square().sum(-1, keepdim=True)
        best = torch.where(error < least, tried, best)
        least = torch.minimum(error, least)
    return best


def _clipped(rows: torch.Tensor, bits: int, clip: float) -> torch.Tensor:
    levels = 2**bits - 1
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    scale = ((high - low) * clip / levels).half().float()
    zero = (0.5 * low + 0.5 * high - scale * (levels / 2)).half().float()
    step = torch.where(scale > 0, scale, 1.0)
    return ((rows - zero) / step).round_().clamp_(0, levels).mul_(scale).add_(zero)
