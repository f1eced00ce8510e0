# SPDX-License-Identifier: Apache-2.0
"""Launch constants of the decode kernel, which are chosen from its compiled code.

One warp to a program needs no barriers, and no warp of it waits for another; twelve programs of 168
registers fit on a multiprocessor. Of five stages two are for the frame table, two for the payload,
so that the next tile's is under way while one is attended to. What a program accumulates, rows
times head_dim, decides how many registers and tokens are left. None of these spills on sm_80, 89,
90 or 100, under Triton 3.6.0 or 3.8.0 (`bench/results/kernels_compiled.md`), and both prefetch with
them: no compiler needs constants of its own. Which are the fastest is for
`bench/gpu/timing/sweep.py` to tell.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import triton

from sglang_diffxkv.kernels.layout import PageLayout


@dataclass(frozen=True)
class Constants:
    """How the kernel is compiled and launched.

    Attributes:
        tokens: of a tile of codes; tiles of raw rows have half as many, but at least 16.
        num_warps: of a program.
        num_stages: of the loops over codes.
        registers: most of them per thread.
    """

    tokens: int
    num_warps: int
    num_stages: int
    registers: int


_BY_SIZE = (
    (512, Constants(64, 1, 5, 168)),
    (1024, Constants(32, 1, 5, 168)),
    (2048, Constants(32, 1, 5, 255)),
)
MOST_ACCUMULATED = _BY_SIZE[-1][0]
"""Elements of a program. Two warps that share 32 rows of 128 have 1.6 times as many instructions in
the compiled code as two programs with 16 rows each, which read a tile twice, but once from L2."""


def block_of_rows(rows: int, dim_block: int) -> int:
    """How many of a KV head's rows a program attends with, padded to a power of two: at least 8,
    as products want them."""
    return max(8, min(triton.next_power_of_2(rows), MOST_ACCUMULATED // dim_block))


def attend_constants(rows_block: int, dim_block: int, *, plain: bool = True) -> Constants:
    """Constants for a block of rows and head_dim, each as padded to a power of two.

    Args:
        plain: every row sees all tokens, and scores have no cap: both take registers.

    Raises:
        ValueError: they are more than one program accumulates.
    """
    size = rows_block * dim_block
    if size > MOST_ACCUMULATED:
        raise ValueError(f"{rows_block} rows of {dim_block} are more than {MOST_ACCUMULATED}")
    constants = next(constants for most, constants in _BY_SIZE if size <= most)
    if rows_block > 16 or (dim_block > 128 and not plain):
        constants = replace(constants, tokens=16)
    return constants if plain else replace(constants, registers=255)


@dataclass(frozen=True)
class DecodeTraits:
    """What the decode kernel is compiled for.

    Attributes:
        layout: of sealed pages.
        group: query heads of a KV head.
        queries: new tokens of each sequence.
        raw: Triton's dtype of raw elements, in open pages and in raw tiers.
        in_fp32: whether these are multiplied in fp32, not in their own 16 bits.
        constants: of the launch.
        pages: that are addressed at a time.
    """

    layout: PageLayout
    group: int
    queries: int
    raw: Any
    in_fp32: bool
    constants: Constants
    pages: int = 32

    @property
    def kv_heads(self) -> int:
        return self.layout.num_kv_heads

    @property
    def dim(self) -> int:
        return self.layout.head_dim

    @property
    def dim_block(self) -> int:
        """The power of two that D is padded to."""
        return triton.next_power_of_2(self.dim)

    @property
    def rows(self) -> int:
        """Of a KV head: its group's queries of one new token, then of the next one."""
        return self.group * self.queries

    @property
    def rows_block(self) -> int:
        """That a program attends with."""
        return block_of_rows(self.rows, self.dim_block)

    @property
    def blocks(self) -> int:
        """Programs of a work tile, each with other rows."""
        return triton.cdiv(self.rows, self.rows_block)

    @property
    def tokens(self) -> int:
        """Of a tile of codes."""
        return self.constants.tokens

    @property
    def raw_tokens(self) -> int:
        """Of a tile of raw rows: rows in 16 bits take twice the registers."""
        return max(16, self.tokens // 2)
