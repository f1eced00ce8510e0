# SPDX-License-Identifier: Apache-2.0
"""What the kernels of extend are compiled for: tiles, and the dtypes of products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sglang_diffxkv.kernels.gpu.device import compute_capability
from sglang_diffxkv.kernels.gpu.views import HeadShape
from sglang_diffxkv.kernels.layout import PageLayout

OLDER_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
"""Its code for sm_90 needs more registers."""

MAX_REGISTERS = 255
"""All that there are: unasked, the assembler may rather spill, for a third block."""


@dataclass(frozen=True)
class Tile:
    """Query rows and tokens of a product, warps that share it, and how tiles follow one another.

    Attributes:
        num_stages: tiles under way.
        peel: whether the last tile, alone, is masked: it saves instructions for registers.
    """

    rows: int
    tokens: int
    num_warps: int
    num_stages: int = 1
    peel: bool = False


# The largest tiles whose compiled code keeps everything in registers, and fits into shared memory.

FP32_TILE = Tile(16, 32, 4)
"""There to be correct."""


@dataclass(frozen=True)
class Traits:
    """Heads, the tile, dtype of the products (Triton's), and input precision if that is fp32."""

    shape: HeadShape
    tile: Tile
    compute: Any
    precision: str


@dataclass(frozen=True)
class SealedTraits(Traits):
    """Of sealed pages of this layout.

    Attributes:
        raw: Triton's dtype of raw elements; products with them are in ``compute``.
        pages: that are addressed at a time.
    """

    layout: PageLayout
    raw: Any
    pages: int = 32


@dataclass(frozen=True)
class UnpackedTraits(Traits):
    """Of unpacked rows; with ``split`` several programs share a sequence's."""

    split: bool


def precision(dtype: torch.dtype) -> str:
    """Input precision of fp32 products: TF32 holds 16-bit models' elements exactly."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def compute_dtype(dtype: torch.dtype) -> Any:
    """Of products with raw elements of this dtype: fp32 for bf16, too."""
    return tl.float16 if dtype == torch.float16 else tl.float32


def sealed_tile(layout: PageLayout, dtype: torch.dtype, device: torch.device) -> Tile:
    """For the codes themselves."""
    dim, tiers = layout.head_dim, (layout.high, layout.low)
    has_raw = any(tier.is_raw for tier in tiers)
    if has_raw and dtype == torch.float32:
        return FP32_TILE
    capability = compute_capability(device)
    if capability >= 90:
        crowded = capability < 100 and OLDER_TRITON
        if crowded and dim > 128 and not has_raw:
            return Tile(16, 64, 4)
        if dim > 128:
            return Tile(64, 32 if has_raw else 64, 8)
        wide = has_raw or crowded or any(tier.value_bits == 8 for tier in tiers)
        return Tile(64, 64 if wide else 128, 4)
    # Products take both operands from registers; raw ones are fp32 there.
    if dim > 128:
        return Tile(16, 32, 4)
    if dim <= 64 and not has_raw:
        return Tile(64, 64, 4)
    return Tile(32, 32 if has_raw else 64, 4)


def open_tile(dim: int, dtype: torch.dtype) -> Tile:
    """For raw pages."""
    if dtype == torch.float32:
        return FP32_TILE
    if dim <= 64:
        return Tile(64, 64, 4)
    return Tile(64, 64, 8) if dim <= 128 else Tile(64, 16, 8)


def unpacked_tile(dim: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """For unpacked rows."""
    if dtype == torch.float32:
        return FP32_TILE
    capability = compute_capability(device)
    if 90 <= capability < 120:
        if dim <= 64:
            return Tile(128, 128, 8, 3, peel=True)
        if dim <= 128:
            return Tile(128, 64, 8, 3, peel=True)
        return Tile(64, 64, 8, 2)
    if dim <= 64:
        return Tile(128, 64, 8, 3, peel=True)
    return Tile(128, 64, 8, 2) if dim <= 128 else Tile(64, 32, 8, 2)
