# SPDX-License-Identifier: Apache-2.0
"""Asymmetric quantization of rows: codes, an fp16 scale and an fp16 zero per row."""

from __future__ import annotations

import torch

FP16_MAX = 65504.0
CLIP = {8: 1.0, 4: 1.0, 2: 0.8}
"""By bits: share of a row's min/max range that codes cover, about its centre; what lies outside
saturates (``docs/decisions/016``)."""


def quantize_rows(rows: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize every row to `CLIP` of its own min/max range.

    Scale and zero are rounded to fp16 first and the codes computed against the rounded values, so
    that reading adds no error of its own. Values outside fp16's range saturate.

    Args:
        rows: fp32 [M, D].
        bits: 2, 4 or 8.

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
    return pack_planes(codes, bits), torch.cat([scale, zero], dim=1)


def dequantize_rows(packed: torch.Tensor, meta: torch.Tensor, bits: int) -> torch.Tensor:
    """fp32 [M, D] of `quantize_rows` bytes [M, D * bits / 8] and meta fp16 [M, 2]."""
    scale, zero = meta.float().unbind(1)
    return torch.addcmul(zero[:, None], unpack_planes(packed, bits).float(), scale[:, None])


def pack_planes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [M, D] -> bytes [M, D * bits / 8]; plane j of a row is bits [j*bits, ...)."""
    planes = codes.chunk(8 // bits, dim=1)
    packed = planes[0].clone()
    for j, plane in enumerate(planes[1:], 1):
        packed |= plane << (j * bits)
    return packed


def unpack_planes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 bytes [M, D * bits / 8] -> codes [M, D]; inverse of `pack_planes`."""
    mask = 2**bits - 1
    return torch.cat([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=1)
