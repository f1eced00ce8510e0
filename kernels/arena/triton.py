# SPDX-License-Identifier: Apache-2.0
"""The free stack in Triton: two launches each, whatever the number of owners or ids.

The first launch counts, block by block, what is to be popped or pushed. In the second every block
adds up the counts of those before it (a few thousand at most) and moves its own frames.

Copies are one launch, which reads or writes the host's memory itself where it is pinned.
"""

from __future__ import annotations

import torch
import triton

from sglang_diffxkv.kernels import arena
from sglang_diffxkv.kernels.arena.triton_kernels import (
    Blocks,
    FrameTable,
    FreeStack,
    Listed,
    copy_kernel,
    count_kernel,
    return_kernel,
    take_kernel,
)
from sglang_diffxkv.kernels.gpu.launch import launch

OWNERS = 128
"""Owners of a block that takes frames."""
IDS = 4096
"""Table entries of a block that returns frames."""
SUMS = 1024
"""Counts of earlier blocks that a block reads at a time."""
NUM_WARPS = 8
COPY_PROGRAMS = 16
"""Programs of a copy, at most: few, so that kernels beside it find the other multiprocessors free.
One that takes all registers of a multiprocessor does not start on one where a program copies."""
COPY_TILE = 8192
"""Words of 32 bits that a program asks for before it waits, half of them on the way where half of
the entries have a frame. All programs together then have 256 KiB on the way: PCIe 5.0 wants some
100 KiB (64 GB/s for 1.5 us)."""
COPY_WORDS = 256
"""Of these, at most so many of one frame: warps read 512 bytes in a row."""
COPY_WARPS = 16


@arena.take_frames.register("gpu")
def take_frames(
    stack: torch.Tensor, n_free: torch.Tensor, counts: torch.Tensor, max_frames: int
) -> torch.Tensor:
    counts = counts.contiguous()
    frames = stack.new_empty(len(counts), max_frames)
    blocks = triton.cdiv(len(counts), OWNERS)
    launch(
        take_kernel,
        (blocks,),
        stack=FreeStack(stack, n_free),
        counts=counts,
        before=_counted(counts, n_free, blocks, OWNERS, ids=False),
        frames=FrameTable(frames, max_frames),
        owners=len(counts),
        COLUMNS=triton.next_power_of_2(max_frames),
        BLOCKS=Blocks(OWNERS, SUMS),
        num_warps=NUM_WARPS,
    )
    return frames


@arena.return_frames.register("gpu")
def return_frames(stack: torch.Tensor, n_free: torch.Tensor, frames: torch.Tensor) -> None:
    ids = frames.reshape(-1)
    blocks = triton.cdiv(len(ids), IDS)
    launch(
        return_kernel,
        (blocks,),
        stack=FreeStack(stack, n_free),
        ids=ids,
        before=_counted(ids, n_free, blocks, IDS, ids=True),
        entries=len(ids),
        BLOCKS=Blocks(IDS, SUMS),
        num_warps=NUM_WARPS,
    )


@arena.copy_frames.register("gpu")
def copy_frames(
    source: torch.Tensor,
    source_ids: torch.Tensor,
    target: torch.Tensor,
    target_ids: torch.Tensor,
) -> None:
    old, new = (x.contiguous().view(-1) for x in (source_ids, target_ids))
    words = source.shape[1] // 4
    block = min(COPY_WORDS, triton.next_power_of_2(words))
    ids = COPY_TILE // block
    launch(
        copy_kernel,
        (min(COPY_PROGRAMS, triton.cdiv(len(old), ids)),),
        source=Listed(source.view(torch.int32), old),
        target=Listed(target.view(torch.int32), new),
        entries=len(old),
        WORDS=words,
        IDS=ids,
        BLOCK=block,
        num_warps=COPY_WARPS,
    )


def _counted(
    x: torch.Tensor, n_free: torch.Tensor, blocks: int, block: int, *, ids: bool
) -> torch.Tensor:
    """int32 [1 + blocks]: ``n_free``, then the sums of counts, or numbers of ids, of each block."""
    sums = n_free.new_empty(1 + blocks)
    launch(
        count_kernel,
        (blocks,),
        x=x,
        n_free=n_free,
        sums=sums,
        entries=len(x),
        IDS=ids,
        BLOCK=block,
        num_warps=NUM_WARPS,
    )
    return sums
