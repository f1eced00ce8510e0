# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `arena.triton`.

``n_free`` is changed by the second launch while blocks of it still ask for its old value, which the
first launch therefore puts in front of the sums of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl


class FreeStack(NamedTuple):
    """int32 [F] and int32 [1], as `kernels.arena` describes them."""

    ids: torch.Tensor
    n_free: torch.Tensor


class FrameTable(NamedTuple):
    """int32 [owners, width], frames of each owner."""

    ids: torch.Tensor
    width: int


class Listed(NamedTuple):
    """int32 [F, words], an arena, and int32 [entries], frames of it, negative for none."""

    arena: torch.Tensor
    ids: torch.Tensor


@dataclass(frozen=True)
class Blocks:
    """How much a program looks at.

    Attributes:
        size: owners or ids. sums: of earlier blocks, at a time.
    """

    size: int
    sums: int


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
    stack: FreeStack,
    counts,
    before,
    frames: FrameTable,
    owners,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Grid (blocks,): a row of frames for each owner, from the top of the stack downwards.

    Args:
        before: sums of `count_kernel`.
        COLUMNS: the table's width, padded to a power of two.
    """
    block = tl.program_id(0)
    owner = block.to(tl.int64) * BLOCKS.size + tl.arange(0, BLOCKS.size)
    count = tl.load(counts + owner, mask=owner < owners, other=0).to(tl.int32)
    top = tl.load(before) - _sum(before + 1, block, BLOCKS.sums)
    first = top - 1 - (tl.cumsum(count) - count)
    column = tl.arange(0, COLUMNS)[None, :]
    wanted = column < count[:, None]
    place = first[:, None] - column
    taken = tl.where(wanted, tl.load(stack.ids + place, mask=wanted, other=0) + place, -1)
    inside = (owner < owners)[:, None] & (column < frames.width)
    tl.store(frames.ids + owner[:, None] * frames.width + column, taken, mask=inside)
    if block == tl.num_programs(0) - 1:
        tl.store(stack.n_free, top - tl.sum(count))


@triton.jit(do_not_specialize=["entries"])
def return_kernel(stack: FreeStack, ids, before, entries, BLOCKS: tl.constexpr):
    """Grid (blocks,): the ids >= 0 go on top of the stack, in their order."""
    block = tl.program_id(0)
    index = block.to(tl.int64) * BLOCKS.size + tl.arange(0, BLOCKS.size)
    frame = tl.load(ids + index, mask=index < entries, other=-1)
    valid = (frame >= 0).to(tl.int32)
    base = _sum(before, block + 1, BLOCKS.sums)
    place = base + tl.cumsum(valid) - 1
    tl.store(stack.ids + place, frame - place, mask=frame >= 0)
    if block == tl.num_programs(0) - 1:
        tl.store(stack.n_free, base + tl.sum(valid))


@triton.jit(do_not_specialize=["entries"])
def copy_kernel(
    source: Listed,
    target: Listed,
    entries,
    WORDS: tl.constexpr,
    IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (programs,): they copy the frames of IDS entries at a time, in turn.

    Args:
        WORDS: of a frame. BLOCK: of them, of each of the frames at a time.
    """
    step = tl.num_programs(0) * IDS
    for first in range(tl.program_id(0) * IDS, entries, step):
        entry = first + tl.arange(0, IDS)
        old = tl.load(source.ids + entry, mask=entry < entries, other=-1)
        new = tl.load(target.ids + entry, mask=entry < entries, other=-1)
        there = (old >= 0)[:, None]
        source_row = source.arena + old.to(tl.int64)[:, None] * WORDS
        target_row = target.arena + new.to(tl.int64)[:, None] * WORDS
        for start in range(0, WORDS, BLOCK):
            word = start + tl.arange(0, BLOCK)[None, :]
            mask = there & (word < WORDS)
            # Nobody reads the source again; who loads pages back reads the target next.
            copied = tl.load(source_row + word, mask=mask, eviction_policy="evict_first")
            tl.store(target_row + word, copied, mask=mask)


@triton.jit
def _sum(x, n, SUMS: tl.constexpr):
    """Sum of the first n numbers, int32, of which SUMS are read at a time."""
    total = tl.zeros([SUMS], tl.int32)
    for start in range(0, n, SUMS):
        index = start + tl.arange(0, SUMS)
        total += tl.load(x + index, mask=index < n, other=0)
    return tl.sum(total)
