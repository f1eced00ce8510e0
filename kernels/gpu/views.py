# SPDX-License-Identifier: Apache-2.0
"""What Triton kernels take whole, instead of many arguments.

Tensors and numbers come in NamedTuples, whose fields kernels read by name; a field that is None is
a constant, which kernels tell by ``is None``. `kernels.merge.AttentionState` and others that hold
nothing but tensors are passed as they are. No field may be named ``values`` or ``type``, which are
Triton's own tuples' attributes.

Constants come in frozen dataclasses, as arguments that are declared `tl.constexpr`: a `PageLayout`
is one. In Triton 3.6 NamedTuples inside constants lose the names of their fields, and constants
that make up a shape, or are text for another function, are to be given names of their own first.

Triton specialises each field as if it were an argument of its own, for numbers and addresses that
16 divides, and for 1. It cannot be told not to: ``do_not_specialize`` is about arguments, not about
their fields. So numbers that vary with the batch stay arguments. Its hooks (``knobs.runtime``)
cannot serialise such constants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sglang_diffxkv.kernels.pages import SealedTables
from sglang_diffxkv.kernels.softmax import Softmax

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

BYTE_MASK = 0x00FF00FF
"""Of two codes in a word: an argument, as the compiler would undo what it is for if it knew it."""


@dataclass(frozen=True)
class HeadShape:
    """Attention heads of one rank: a constant of kernels.

    Attributes:
        group: query heads of a KV head.
        queries: new tokens of each sequence, where that is a constant.
    """

    kv_heads: int
    group: int
    dim: int
    queries: int = 1

    @property
    def q_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def dim_block(self) -> int:
        """The power of two that D is padded to."""
        return triton.next_power_of_2(self.dim)


class SealedView(NamedTuple):
    """`SealedTables` for a kernel that has their layout as a constant.

    Attributes:
        arena: uint8.
        frames, heads: int32. Layers start at multiples of 16 bytes (`pool.directory`), or kernels
            would be compiled for other addresses, too.
        frames_stride, heads_stride: elements from one page's to the next one's.
        byte_mask: `BYTE_MASK`.
    """

    arena: torch.Tensor
    frames: torch.Tensor
    heads: torch.Tensor
    frames_stride: int
    heads_stride: int
    byte_mask: int

    @staticmethod
    def of(tables: SealedTables) -> SealedView:
        arena, frames, heads, _ = tables
        return SealedView(arena, frames, heads, frames.stride(0), heads.stride(0), BYTE_MASK)


class RawView(NamedTuple):
    """Raw pages [R, 64, H, D]: ``page_stride`` elements from one to the next, of both."""

    k: torch.Tensor
    v: torch.Tensor
    page_stride: int

    @staticmethod
    def of(keys: torch.Tensor, values: torch.Tensor) -> RawView:
        return RawView(keys, values, keys.stride(0))


class QueryView(NamedTuple):
    """Queries [T, Hq, D] of a layer: ``stride`` elements from one token's to the next one's.

    Attributes:
        score_scale: factor of base-2 scores.
        indptr: int32 [B + 1], queries of each sequence; None: one each.
        position: int32 [B], of each sequence's first query; None where all tokens come before.
        cap: of base-2 scores, for `gpu.scores.capped`; None: there is none.
        window_left: as in `Softmax`; None: all tokens before a query are seen.
    """

    data: torch.Tensor
    stride: int
    score_scale: float
    indptr: torch.Tensor | None = None
    position: torch.Tensor | None = None
    cap: float | None = None
    window_left: int | None = None

    @staticmethod
    def of(
        q: torch.Tensor,
        softmax: Softmax,
        indptr: torch.Tensor | None = None,
        position: torch.Tensor | None = None,
    ) -> QueryView:
        """Without the sinks."""
        cap = softmax.log2_cap if softmax.cap else None
        window = softmax.window_left if softmax.window_left >= 0 else None
        return QueryView(q, q.stride(0), softmax.log2_scale, indptr, position, cap, window)
