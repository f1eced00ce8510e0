# SPDX-License-Identifier: Apache-2.0
"""Packing, unpacking and copying rows in Triton: one launch each, no wait for the device.

Codes, scales and zeros are bit for bit those of `naive`: divisions are rounded as IEEE
754 asks, and all products that are added to something are exact.
"""

from __future__ import annotations

import torch
import triton

from sglang_diffxkv.kernels import pack as ops
from sglang_diffxkv.kernels.gpu.launch import launch
from sglang_diffxkv.kernels.layout import META_BYTES, PAGE_TOKENS, PageLayout
from sglang_diffxkv.kernels.pack import Grades, RawTokens, TokenRows
from sglang_diffxkv.kernels.pack.triton_kernels import copy_kernel, pack_kernel, unpack_kernel
from sglang_diffxkv.kernels.pages import SealedTables

TILE = 4096
"""Elements of keys, then of values, that a program holds: 32 registers of each thread."""
COPIED_TOKENS = 16
"""Tokens of a program that copies: addresses on both sides take many registers each."""
NUM_WARPS = 4
UNPACK_REGISTERS = 96
"""Unasked, the assembler may rather spill, for yet more blocks."""


@ops.pack.register("gpu")
def pack(raw: RawTokens, grades: Grades, tables: SealedTables) -> None:
    k_raw, v_raw, slots = raw
    constants = _constants(tables.layout)
    launch(
        pack_kernel,
        _grid(len(slots), constants, tables.layout),
        k_raw=k_raw,
        v_raw=v_raw,
        slots=slots.contiguous(),
        tiers=grades.tiers.contiguous(),
        importance=grades.importance.contiguous(),
        frames=tables.frames.contiguous(),
        heads=tables.heads.contiguous(),
        arena=tables.arena,
        k_page=k_raw.stride(0),
        k_token=k_raw.stride(1),
        k_head=k_raw.stride(2),
        v_page=v_raw.stride(0),
        v_token=v_raw.stride(1),
        v_head=v_raw.stride(2),
        max_frames=tables.frames.shape[1],
        num_warps=NUM_WARPS,
        **constants,
    )


@ops.unpack_into.register("gpu")
def unpack_into(
    tables: SealedTables,
    pages: torch.Tensor,
    first: torch.Tensor,
    rows: TokenRows,
    raw_dtype: torch.dtype,
) -> None:
    arena, frames, heads, layout = tables
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
        k=rows.keys,
        v=rows.values,
        notes=rows.token_metadata,
        frames_stride=frames.stride(0),
        heads_stride=heads.stride(0),
        num_warps=NUM_WARPS,
        maxnreg=UNPACK_REGISTERS,
        **constants,
    )


@ops.copy_rows.register("gpu")
def copy_rows(
    old: SealedTables, old_tiers: torch.Tensor, new: SealedTables, new_tiers: torch.Tensor
) -> None:
    constants = _constants(new.layout) | {"TOKENS": COPIED_TOKENS}
    launch(
        copy_kernel,
        _grid(len(old_tiers), constants, new.layout),
        old_arena=old.arena,
        old_frames=old.frames.contiguous(),
        old_heads=old.heads.contiguous(),
        old_tiers=old_tiers.contiguous(),
        new_arena=new.arena,
        new_frames=new.frames.contiguous(),
        new_heads=new.heads.contiguous(),
        new_tiers=new_tiers.contiguous(),
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
