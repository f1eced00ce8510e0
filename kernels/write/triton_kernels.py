# SPDX-License-Identifier: Apache-2.0
"""Triton: the keys, values and queries of one new token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sglang_diffxkv.kernels.gpu.hadamard import hadamard_rows


class TokenView(NamedTuple):
    """Queries, keys and values, and how many elements apart a token's are from the next one's."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_stride: int
    k_stride: int
    v_stride: int


@dataclass(frozen=True)
class Token:
    """What belongs to one token.

    Attributes:
        keys: elements of its keys; of its values, too.
        blocks, size: blocks of its queries that are rotated each on its own, and elements of one, a
            power of two.
        at_once: elements that a program copies or turns at a time, a power of two.
    """

    keys: int
    blocks: int
    size: int
    at_once: int


@triton.jit
def write_kernel(tokens: TokenView, rows, k_raw, v_raw, rotated, TOKEN: tl.constexpr):
    """Program (token, some of its queries' blocks); the first of a token writes K and V, too."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if part == 0:
        COLUMNS: tl.constexpr = min(TOKEN.at_once, triton.next_power_of_2(TOKEN.keys))
        row = tl.load(rows + token) * TOKEN.keys
        for at in range(0, TOKEN.keys, COLUMNS):
            column = at + tl.arange(0, COLUMNS)
            inside = column < TOKEN.keys
            key = tl.load(tokens.k + token * tokens.k_stride + column, mask=inside)
            value = tl.load(tokens.v + token * tokens.v_stride + column, mask=inside)
            tl.store(k_raw + row + column, key.to(k_raw.dtype.element_ty), mask=inside)
            tl.store(v_raw + row + column, value.to(v_raw.dtype.element_ty), mask=inside)
    SIZE: tl.constexpr = TOKEN.size
    BLOCKS: tl.constexpr = TOKEN.at_once // SIZE
    block = part * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside = (block < TOKEN.blocks)[:, None]
    x = tl.load(tokens.q + token * tokens.q_stride + at, mask=inside, other=0).to(tl.float32)
    turned = hadamard_rows(x) * (SIZE**-0.5)
    tl.store(rotated + token * (TOKEN.blocks * SIZE) + at, turned, mask=inside)
