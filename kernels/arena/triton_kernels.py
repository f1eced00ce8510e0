# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `arena.triton`.

``n_free`` is changed by the second launch while blocks of it still ask for its old value, which the
first launch therefore puts in front of the sums of blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["entries"])
def count_kernel(x, n_free, sums, entries, IDS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (blocks,): sums[0] is n_free, sums[1 + i] what block i of x takes or gives back.

    Args:
        x: counts of frames, or where IDS frame ids, of which those >= 0 count 1.
    """
    block = tl.program_id(0)
    index = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(x + index, mask=index < entries, other=-1 if IDS else 0)
    if IDS:
        count = count >= 0
    tl.store(sums + 1 + block, tl.sum(count.to(tl.int32)))
    if block == 0:
        tl.store(sums, tl.load(n_free))


@triton.jit(do_not_specialize=["owners"])
def take_kernel(
    stack,
    n_free,
    counts,
    before,
    frames,
    owners,
    max_frames,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Grid (blocks,): a row of frames for each owner, from the top of the stack downwards.

    Args:
        before: sums of `count_kernel`. frames: int32 [owners, max_frames].
        COLUMNS: max_frames, padded to a power of two.
    """
    block = tl.program_id(0)
    owner = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(counts + owner, mask=owner < owners, other=0).to(tl.int32)
    top = tl.load(before) - _sum(before + 1, block, SUMS)
    first = top - 1 - (tl.cumsum(count) - count)
    column = tl.arange(0, COLUMNS)[None, :]
    wanted = column < count[:, None]
    place = first[:, None] - column
    taken = tl.where(wanted, tl.load(stack + place, mask=wanted, other=0) + place, -1)
    inside = (owner < owners)[:, None] & (column < max_frames)
    tl.store(frames + owner[:, None] * max_frames + column, taken, mask=inside)
    if block == tl.num_programs(0) - 1:
        tl.store(n_free, top - tl.sum(count))


@triton.jit(do_not_specialize=["entries"])
def return_kernel(stack, n_free, ids, before, entries, BLOCK: tl.constexpr, SUMS: tl.constexpr):
    """Grid (blocks,): the ids >= 0 go on top of the stack, in their order."""
    block = tl.program_id(0)
    index = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    frame = tl.load(ids + index, mask=index < entries, other=-1)
    valid = (frame >= 0).to(tl.int32)
    base = _sum(before, block + 1, SUMS)
    place = base + tl.cumsum(valid) - 1
    tl.store(stack + place, frame - place, mask=frame >= 0)
    if block == tl.num_programs(0) - 1:
        tl.store(n_free, base + tl.sum(valid))


@triton.jit
def _sum(x, n, SUMS: tl.constexpr):
    """Sum of the first n numbers, int32, of which SUMS are read at a time."""
    total = tl.zeros([SUMS], tl.int32)
    for start in range(0, n, SUMS):
        index = start + tl.arange(0, SUMS)
        total += tl.load(x + index, mask=index < n, other=0)
    return tl.sum(total)
