# SPDX-License-Identifier: Apache-2.0
"""Many queries over sealed pages on a GPU: unpack them once, then dense attention over their rows.

Heads keep different numbers of tokens. Their rows are unpacked side by side, so pruned tokens cost
nothing, and where a sequence's rows begin and end is counted on the device: nothing here waits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from sglang_diffxkv.kernels.extend.dense import LOG2_E
from sglang_diffxkv.kernels.extend.scratch import PrefixScratch
from sglang_diffxkv.kernels.extend.triton import (
    DTYPES,
    MAX_REGISTERS,
    count_blocks,
    count_splits,
    launch_merge,
    precision,
    unwritten_part,
)
from sglang_diffxkv.kernels.extend.unpacked_kernels import starts_kernel, unpacked_kernel
from sglang_diffxkv.kernels.gpu.device import compute_capability, multiprocessors
from sglang_diffxkv.kernels.gpu.launch import is_interpreted, launch
from sglang_diffxkv.kernels.layout import PAGE_TOKENS, PageLayout
from sglang_diffxkv.kernels.merge import AttentionState
from sglang_diffxkv.kernels.pack import TokenRows
from sglang_diffxkv.kernels.pack.triton import unpack_into
from sglang_diffxkv.kernels.pages import SealedTables

START_PAGES = 512
"""Pages whose rows are counted at a time: most prefixes in one go."""


class Tile(NamedTuple):
    """Rows and tokens of a product, warps that share it, tiles under way, and whether to peel."""

    rows: int
    tokens: int
    num_warps: int
    num_stages: int
    peel: bool


FP32_TILE = Tile(16, 32, 4, 1, peel=False)
"""There to be correct."""


def unpacked_tile(dim: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """The largest tile whose code spills no registers and fits into shared memory."""
    if dtype == torch.float32:
        return FP32_TILE
    capability = compute_capability(device)
    if 90 <= capability < 120:
        if dim <= 64:
            return Tile(128, 128, 8, 3, peel=True)
        if dim <= 128:
            return Tile(128, 64, 8, 3, peel=True)
        return Tile(64, 64, 8, 2, peel=False)
    if dim <= 64:
        return Tile(128, 64, 8, 3, peel=True)
    return Tile(128, 64, 8, 2, peel=False) if dim <= 128 else Tile(64, 32, 8, 2, peel=False)


def extend_unpacked(
    part: AttentionState,
    q: torch.Tensor,
    q_indptr: torch.Tensor,
    arena: torch.Tensor,
    frames: torch.Tensor,
    heads: torch.Tensor,
    indptr: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    sm_scale: float,
    scratch: PrefixScratch,
) -> None:
    """Add to ``part`` what `extend_sealed` computes; queries are rounded to the scratch's dtype.

    Args:
        part: contiguous, attention of the same queries over other tokens; written.
        q, q_indptr, arena, frames, heads, indptr, layout, sm_scale: as in `extend_sealed`.
        pages: int32 [N], as there; those after ``indptr[-1]`` are unpacked, but nobody's, and must
            be of no more tokens than a page has.
        scratch: of the same layout.
    """
    slices = -(-len(pages) // scratch.pages)
    for first in range(0, len(pages), scratch.pages):
        mine = pages[first : first + scratch.pages]
        starts = scratch.starts[: len(mine) + 1]
        count_rows(heads, mine, starts, scratch.pages * PAGE_TOKENS)
        tables, rows = SealedTables(arena, frames, heads, layout), TokenRows(scratch.k, scratch.v)
        unpack_into(tables, mine, starts[:-1], rows, scratch.k.dtype)
        _attend(part, q, q_indptr, indptr, first, len(mine), slices, layout, sm_scale, scratch)


def count_rows(
    heads: torch.Tensor, pages: torch.Tensor, starts: torch.Tensor, capacity: int
) -> None:
    """`naive.row_starts`, into ``starts``."""
    h = heads.shape[1]
    launch(
        starts_kernel,
        (h,),
        heads=heads,
        heads_stride=heads.stride(0),
        pages=pages,
        count=len(pages),
        starts=starts,
        capacity=capacity,
        HEADS=h,
        PAGES=START_PAGES,
        num_warps=4,
    )


def _attend(
    part: AttentionState,
    q: torch.Tensor,
    q_indptr: torch.Tensor,
    indptr: torch.Tensor,
    first_page: int,
    pages: int,
    slices: int,
    layout: PageLayout,
    sm_scale: float,
    scratch: PrefixScratch,
) -> None:
    """Add what ``pages`` unpacked pages, of one of so many slices, give."""
    assert part.out.is_contiguous() and part.lse.is_contiguous()
    kv_heads, dim = layout.num_kv_heads, layout.head_dim
    group = q.shape[1] // kv_heads
    dtype = scratch.k.dtype
    emulated = dtype == torch.bfloat16 and is_interpreted()  # which multiplies no bf16
    tile = unpacked_tile(dim, dtype, q.device)
    blocks = count_blocks(q, q_indptr, group, tile.rows)
    # A slice has tokens of some of the sequences only.
    busy = -(-blocks * kv_heads // slices)
    splits = count_splits(busy, multiprocessors(q.device), pages)
    into = part if splits == 1 else unwritten_part(q.expand(splits, *q.shape))
    launch(
        unpacked_kernel,
        (blocks, kv_heads, splits),
        q=q,
        q_stride=q.stride(0),
        q_indptr=q_indptr,
        sequences=len(q_indptr) - 1,
        part_rows=part.lse.numel(),
        k=scratch.k,
        v=scratch.v,
        starts=scratch.starts,
        indptr=indptr,
        first_page=first_page,
        end_page=first_page + pages,
        out=into.out,
        lse=into.lse,
        score_scale=sm_scale * LOG2_E,
        HEADS=kv_heads,
        GROUP=group,
        DIM=dim,
        DIM_BLOCK=triton.next_power_of_2(dim),
        SPLIT=splits > 1,
        COMPUTE=DTYPES[torch.float32 if emulated else dtype],
        PRECISION=precision(dtype),
        PEEL=tile.peel,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.tokens,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=MAX_REGISTERS,
    )
    if splits > 1:
        launch_merge(into, part, onto=True)
