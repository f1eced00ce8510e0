# SPDX-License-Identifier: Apache-2.0
"""Launches of the Triton kernels of extend. Nothing here waits for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sglang_diffxkv.kernels.extend.dense import LOG2_E
from sglang_diffxkv.kernels.extend.open_kernel import open_kernel
from sglang_diffxkv.kernels.extend.sealed_kernel import sealed_kernel
from sglang_diffxkv.kernels.gpu.device import compute_capability, multiprocessors
from sglang_diffxkv.kernels.gpu.launch import launch
from sglang_diffxkv.kernels.layout import PAGE_TOKENS, PageLayout
from sglang_diffxkv.kernels.merge import AttentionState
from sglang_diffxkv.kernels.merge.split_kernels import merge_splits

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
BYTE_MASK = 0x00FF00FF
GROUP_PAGES = 32
SPLIT_PAGES = 16
"""Fewest pages, on average, that are worth a program of their own."""
WARPS_PER_MULTIPROCESSOR = 8
"""What fits with `MAX_REGISTERS`."""
MERGE_ROWS = 16
MAX_REGISTERS = 255
"""All that there are: unasked, the assembler may rather spill, for a third block."""


OLDER_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
"""Its code for sm_90 needs more registers."""


class Tile(NamedTuple):
    """Query rows and tokens of a product, and the warps that share it."""

    rows: int
    tokens: int
    num_warps: int


# The largest tiles whose compiled code keeps everything in registers. fp32 is there to be correct.
FP32_TILE = Tile(16, 32, 4)


def sealed_tile(layout: PageLayout, dtype: torch.dtype, device: torch.device) -> Tile:
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
    if dtype == torch.float32:
        return FP32_TILE
    if dim <= 64:
        return Tile(64, 64, 4)
    return Tile(64, 64, 8) if dim <= 128 else Tile(64, 16, 8)


def precision(dtype: torch.dtype) -> str:
    """Input precision of fp32 products: TF32 holds 16-bit models' elements exactly."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def extend_sealed(
    q: torch.Tensor,
    q_indptr: torch.Tensor,
    arena: torch.Tensor,
    frames: torch.Tensor,
    heads: torch.Tensor,
    indptr: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    sm_scale: float,
) -> AttentionState:
    """See `sealed.extend_sealed`; heads is contiguous, and so are the rows of frames."""
    kv_heads, dim = layout.num_kv_heads, layout.head_dim
    group = q.shape[1] // kv_heads
    part = unwritten_part(q)
    tile = sealed_tile(layout, q.dtype, q.device)
    blocks = count_blocks(q, q_indptr, group, tile.rows)
    room = WARPS_PER_MULTIPROCESSOR // tile.num_warps * multiprocessors(q.device)
    splits = count_splits(blocks * kv_heads, room, len(pages))
    split = part if splits == 1 else unwritten_part(q.expand(splits, *q.shape))
    rows = part.lse.numel()
    launch(
        sealed_kernel,
        (blocks, kv_heads, splits),
        q=q,
        q_stride=q.stride(0),
        q_indptr=q_indptr,
        sequences=len(q_indptr) - 1,
        part_rows=rows,
        arena=arena,
        frames=frames,
        frames_stride=frames.stride(0),
        heads=heads,
        indptr=indptr,
        pages=pages,
        out=split.out,
        lse=split.lse,
        score_scale=sm_scale * LOG2_E,
        byte_mask=BYTE_MASK,
        HEADS=kv_heads,
        GROUP=group,
        DIM=dim,
        DIM_BLOCK=triton.next_power_of_2(dim),
        HIGH_KEY_BITS=layout.high.key_bits,
        HIGH_VALUE_BITS=layout.high.value_bits,
        LOW_KEY_BITS=layout.low.key_bits,
        LOW_VALUE_BITS=layout.low.value_bits,
        RAW=DTYPES[q.dtype],
        COMPUTE=tl.float16 if q.dtype == torch.float16 else tl.float32,
        PRECISION=precision(q.dtype),
        FRAME_BYTES=layout.frame_bytes,
        PAGES=GROUP_PAGES,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.tokens,
        num_warps=tile.num_warps,
        maxnreg=MAX_REGISTERS,
    )
    if splits > 1:
        launch_merge(split, part, onto=False)
    return part


def launch_merge(splits: AttentionState, part: AttentionState, *, onto: bool) -> None:
    """Merge parts of the same queries into one.

    Args:
        splits: [splits, T, Hq, D] and [splits, T, Hq]. part: [T, Hq, D] and [T, Hq], written.
        onto: whether ``part`` holds attention over further tokens.
    """
    rows, dim = part.lse.numel(), part.out.shape[2]
    launch(
        merge_splits,
        (triton.cdiv(rows, MERGE_ROWS),),
        parts=splits.out,
        part_lse=splits.lse,
        splits=len(splits.lse),
        rows=rows,
        out=part.out,
        lse=part.lse,
        ONTO=onto,
        DIM=dim,
        DIM_BLOCK=triton.next_power_of_2(dim),
        ROWS=MERGE_ROWS,
        num_warps=4,
    )


def count_splits(programs: int, room: int, pages: int) -> int:
    """How many programs share a sequence's pages, so that few queries, too, fill the GPU.

    Told by shapes alone: the pages of all sequences together stand for those of the longest.

    Args:
        programs: that there are without splits. room: programs that run at a time.
    """
    return max(1, min(room // max(programs, 1), pages // SPLIT_PAGES))


def extend_open(
    q: torch.Tensor,
    q_indptr: torch.Tensor,
    q_position: torch.Tensor,
    k_raw: torch.Tensor,
    v_raw: torch.Tensor,
    indptr: torch.Tensor,
    slots: torch.Tensor,
    page_position: torch.Tensor,
    sm_scale: float,
) -> AttentionState:
    """See `open.extend_open`; pages of new tokens that are not listed are not noticed."""
    kv_heads, dim = k_raw.shape[2:]
    group = q.shape[1] // kv_heads
    part = unwritten_part(q)
    tile = open_tile(dim, q.dtype)
    launch(
        open_kernel,
        (count_blocks(q, q_indptr, group, tile.rows), kv_heads),
        q=q,
        q_stride=q.stride(0),
        q_indptr=q_indptr,
        q_position=q_position,
        sequences=len(q_indptr) - 1,
        k_raw=k_raw,
        v_raw=v_raw,
        page_stride=k_raw.stride(0),
        indptr=indptr,
        slots=slots,
        page_position=page_position,
        out=part.out,
        lse=part.lse,
        score_scale=sm_scale * LOG2_E,
        HEADS=kv_heads,
        GROUP=group,
        DIM=dim,
        BLOCK=triton.next_power_of_2(dim),
        COMPUTE=tl.float16 if q.dtype == torch.float16 else tl.float32,
        PRECISION=precision(q.dtype),
        PAGE_TOKENS=PAGE_TOKENS,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.tokens,
        num_warps=tile.num_warps,
        maxnreg=MAX_REGISTERS if dim <= 128 else None,
    )
    return part


def unwritten_part(q: torch.Tensor) -> AttentionState:
    return AttentionState(
        torch.empty(q.shape, dtype=torch.float32, device=q.device),
        torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device),
    )


def count_blocks(q: torch.Tensor, q_indptr: torch.Tensor, group: int, block_m: int) -> int:
    """Blocks of rows, at least as many as all sequences need (`gpu.ragged.first_block`)."""
    return len(q) * group // block_m + len(q_indptr) - 1
