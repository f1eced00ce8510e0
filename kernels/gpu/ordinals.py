# SPDX-License-Identifier: Apache-2.0
"""Kept tokens of several pages as one dense range of ordinals, so that tiles of tokens are full.

A head keeps a few tokens of each page, and a tile per page would be mostly empty. Tiles are made of
consecutive *ordinals* instead: token number r of a group of pages, counted in page order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def page_of_ordinal(ends, ordinal, PAGES: tl.constexpr):
    """Which page of a group the tokens of these ordinals are in, by binary search in registers.

    Args:
        ends: int32 [PAGES], inclusive prefix sums of the pages' token counts; PAGES is a power of
            two, at most 32, so that a warp holds it and lookups are shuffles. Or [R, PAGES], the
            same in each row.
        ordinal: int32 [N], or [R, N].

    Returns:
        int32 of ordinal's shape, in [0, PAGES); anything for ordinals of ``ends[-1]`` and above.
    """
    page = tl.zeros_like(ordinal)
    for step in tl.static_range(5):
        if PAGES >> (step + 1):
            last = tl.gather(ends, page + ((PAGES >> (step + 1)) - 1), len(ordinal.shape) - 1)
            page = tl.where(last <= ordinal, page + (PAGES >> (step + 1)), page)
    return page


@triton.jit
def per_row(x, ROWS: tl.constexpr):
    """x [PAGES], once for each row of a tile's ordinals: int32 [ROWS, PAGES].

    A tile's ordinals in rows of 32, one to a warp, find their pages by shuffles; in one long row
    they would have to go through shared memory, with two barriers for each look-up.
    """
    return tl.broadcast_to(x[None, :], [ROWS, x.shape[0]])
