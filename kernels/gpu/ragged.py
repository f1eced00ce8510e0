# SPDX-License-Identifier: Apache-2.0
"""Ragged batches in Triton: which sequence an entry or a block of rows belongs to."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_at_most(values, low, high, x):
    """How far from ``low`` on values[low:high], which ascend, are at most ``x``: an end index."""
    end, limit = low, high  # arguments may be constants, which loops cannot change
    while end < limit:
        middle = (end + limit) // 2
        if tl.load(values + middle) <= x:
            end = middle + 1
        else:
            limit = middle
    return end


@triton.jit
def sequence_of_entry(indptr, sequences, entry):
    """The sequence b with indptr[b] <= entry < indptr[b + 1]."""
    return count_at_most(indptr, 0, sequences + 1, entry) - 1


@triton.jit
def first_block(indptr, b, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """First of the blocks reserved for sequence ``b``, whose rows number GROUP per entry.

    Blocks are reserved without knowing the lengths: sequence b starts at block
    ``rows before it // BLOCK + b``, which leaves at least ``ceil(its rows / BLOCK)`` until the
    next. All in all there are ``rows // BLOCK + sequences``.
    """
    return tl.load(indptr + b) * GROUP // BLOCK + b


@triton.jit
def sequence_of_block(indptr, sequences, block, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The sequence that ``block`` is reserved for (see `first_block`)."""
    low, high = 0, sequences
    while low < high:
        middle = (low + high) // 2
        if first_block(indptr, middle, GROUP, BLOCK) <= block:
            low = middle + 1
        else:
            high = middle
    return low - 1
