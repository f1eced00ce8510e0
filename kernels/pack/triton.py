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
from sglang_diffxkv.kernels.gpu.views import SealedView
from sglang_diffxkv.kernels.layout import PAGE_TOKENS, PageLayout
from sglang_diffxkv.kernels.pack import Grades, RawTokens, TokenRows
from sglang_diffxkv.kernels.pack.triton_kernels import (
    RawPages,
    Rows,
    copy_kernel,
    pack_kernel,
    unpack_kernel,
)
from sglang_diffxkv.kernels.pages import SealedTables

TILE = 4096
"""Elements of keys, then of values, that a program holds: 32 registers of each thread."""
COPIED_TOKENS = 16
"""Tokens of a program that copies: addresses on both sides take many registers each."""
NUM_WARPS = 4
PACK_REGISTERS, UNPACK_REGISTERS = 160, 96
"""Unasked, the assembler may rather spill, for yet more blocks."""


@ops.pack.register("gpu")
def pack(raw: RawTokens, grades: Grades, tables: SealedTables) -> None:
    keys, values, slots = raw
    _, frames, heads, _ = _contiguous(tables)
    layout, tokens = tables.layout, _tokens(tables.layout)
    launch(
        pack_kernel,
        (len(slots), layout.num_kv_heads, PAGE_TOKENS // tokens),
        raw=RawPages(keys, values, slots.contiguous(), keys.stride(0), values.stride(0)),
        grades=Grades(*(x.contiguous() for x in grades)),
        arena=tables.arena,
        frames=frames,
        heads=heads,
        LAYOUT=layout,
        TOKENS=tokens,
        num_warps=NUM_WARPS,
        maxnreg=PACK_REGISTERS,
    )


@ops.unpack_into.register("gpu")
def unpack_into(
    tables: SealedTables, pages: torch.Tensor, rows: TokenRows, raw_dtype: torch.dtype
) -> None:
    layout, tokens = tables.layout, _tokens(tables.layout)
    launch(
        unpack_kernel,
        (len(pages), layout.num_kv_heads, PAGE_TOKENS // tokens),
        tables=SealedView.of(tables),
        raw_arena=tables.arena.view(raw_dtype),
        pages=pages.contiguous(),
        rows=Rows(rows.keys, rows.values, rows.token_metadata, rows.first.contiguous()),
        LAYOUT=layout,
        TOKENS=tokens,
        num_warps=NUM_WARPS,
        maxnreg=UNPACK_REGISTERS,
    )


@ops.copy_rows.register("gpu")
def copy_rows(
    old: SealedTables, old_tiers: torch.Tensor, new: SealedTables, new_tiers: torch.Tensor
) -> None:
    launch(
        copy_kernel,
        (len(old_tiers), new.layout.num_kv_heads, PAGE_TOKENS // COPIED_TOKENS),
        old=SealedView.of(_contiguous(old)),
        old_tiers=old_tiers.contiguous(),
        new=SealedView.of(_contiguous(new)),
        new_tiers=new_tiers.contiguous(),
        LAYOUT=new.layout,
        TOKENS=COPIED_TOKENS,
        num_warps=NUM_WARPS,
        maxnreg=255,  # Triton 3.6.0's assembler would rather spill than use more than 40
    )


def _contiguous(tables: SealedTables) -> SealedTables:
    """Tables of just the pages that a kernel runs over, whose rows it finds by itself."""
    assert tables.frames.shape[1] == tables.layout.max_frames
    frames, heads = tables.frames.contiguous(), tables.heads.contiguous()
    return tables._replace(frames=frames, heads=heads)


def _tokens(layout: PageLayout) -> int:
    """Tokens of a program that packs or unpacks."""
    return min(PAGE_TOKENS, TILE // (4 * triton.next_power_of_2(layout.head_dim // 4)))
