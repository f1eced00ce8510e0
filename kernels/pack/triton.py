# SPDX-License-Identifier: Apache-2.0
"""Packing, unpacking and copying rows in Triton: one launch each, no wait for the device.

Codes, scales and zeros are bit for bit those of `torch_ops` on a CPU: divisions are rounded as IEEE
754 asks, and all products that are added to something are exact.
"""

from __future__ import annotations

import torch
import triton

from sglang_diffxkv.kernels.gpu.launch import launch
from sglang_diffxkv.kernels.layout import META_BYTES, PAGE_TOKENS, PageLayout
from sglang_diffxkv.kernels.layout.payload import Payload
from sglang_diffxkv.kernels.pack.triton_kernels import copy_kernel, pack_kernel, unpack_kernel

TILE = 4096
"""Elements of keys, then of values, that a program holds: 32 registers of each thread."""
COPIED_TOKENS = 16
"""Tokens of a program that copies: addresses on both sides take many registers each."""
NUM_WARPS = 4
UNPACK_REGISTERS = 96
"""Unasked, the assembler may rather spill, for yet more blocks."""


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
    assert k_raw.stride(3) == v_raw.stride(3) == 1
    constants = _constants(layout)
    launch(
        pack_kernel,
        _grid(len(slots), constants, layout),
        k_raw=k_raw,
        v_raw=v_raw,
        slots=slots.contiguous(),
        tiers=tiers.contiguous(),
        importance=importance.contiguous(),
        frames=frames.contiguous(),
        heads=heads.contiguous(),
        arena=arena,
        k_page=k_raw.stride(0),
        k_token=k_raw.stride(1),
        k_head=k_raw.stride(2),
        v_page=v_raw.stride(0),
        v_token=v_raw.stride(1),
        v_head=v_raw.stride(2),
        max_frames=frames.shape[1],
        num_warps=NUM_WARPS,
        **constants,
    )


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
    assert frames.stride(1) == heads.stride(2) == 1 and heads.stride(1) == 2
    constants = _constants(layout)
    launch(
        unpack_kernel,
        _grid(len(pages), constants, layout),
        arena=arena,
        raw_arena=arena.view(raw_dtype),
        frames=frames,
        heads=heads,
        pages=pages.contiguous(),
        first=first.contiguous(),
        k=k,
        v=v,
        notes=notes,
        frames_stride=frames.stride(0),
        heads_stride=heads.stride(0),
        num_warps=NUM_WARPS,
        maxnreg=UNPACK_REGISTERS,
        **constants,
    )


def copy_rows(old: Payload, new: Payload, layout: PageLayout) -> None:
    """Give tokens of the same tier in both payloads their old bytes; see `pack.copy_rows`."""
    constants = _constants(layout) | {"TOKENS": COPIED_TOKENS}
    launch(
        copy_kernel,
        _grid(len(old.tiers), constants, layout),
        old_arena=old.arena,
        old_frames=old.frames.contiguous(),
        old_heads=old.heads.contiguous(),
        old_tiers=old.tiers.contiguous(),
        new_arena=new.arena,
        new_frames=new.frames.contiguous(),
        new_heads=new.heads.contiguous(),
        new_tiers=new.tiers.contiguous(),
        old_max_frames=old.frames.shape[1],
        new_max_frames=new.frames.shape[1],
        num_warps=NUM_WARPS,
        maxnreg=255,  # Triton 3.6.0's assembler would rather spill than use more than 40
        **constants,
    )


def _constants(layout: PageLayout) -> dict[str, int]:
    """What all three kernels are compiled for."""
    high, low = layout.high, layout.low
    block = triton.next_power_of_2(layout.head_dim // 4)
    return {
        "DIM": layout.head_dim,
        "KEY_HIGH": layout.row_bytes(high.key_bits),
        "VALUE_HIGH": layout.row_bytes(high.value_bits),
        "KEY_LOW": layout.row_bytes(low.key_bits),
        "VALUE_LOW": layout.row_bytes(low.value_bits),
        "META_HIGH": 0 if high.is_raw else META_BYTES,
        "META_LOW": 0 if low.is_raw else META_BYTES,
        "FRAME_BYTES": layout.frame_bytes,
        "TOKENS": min(PAGE_TOKENS, TILE // (4 * block)),
        "BLOCK": block,
    }


def _grid(pages: int, constants: dict[str, int], layout: PageLayout) -> tuple[int, int, int]:
    return pages, layout.num_kv_heads, PAGE_TOKENS // constants["TOKENS"]
