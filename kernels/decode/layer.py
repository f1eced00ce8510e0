# SPDX-License-Identifier: Apache-2.0
"""One layer of a decode step on a CPU in one call: write, attend, score (layer.cpp).

As many small operations they cost more than what they compute: some ten of torch's and three of
ours, each with arguments to be converted.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.cpu.abi import DTYPE_CODES, int64_words, layout_words
from sglang_diffxkv.kernels.cpu.function import CFunction
from sglang_diffxkv.kernels.layout import PAGE_TOKENS, PageLayout
from sglang_diffxkv.kernels.merge import AttentionState
from sglang_diffxkv.kernels.softmax import Softmax
from sglang_diffxkv.kernels.step import StepPages

_layer_function = CFunction("decode", "diffxkv_decode_layer")


class LayerTables(NamedTuple):
    """The tables of all L layers, contiguous each.

    Attributes:
        arena: uint8 [F, frame_bytes].
        frames: int32 [L, V, max_frames]. heads: int32 [L, V, H, 2].
        raw_slot: int32 [V], raw page of each open page, negative for all others.
        keys, values: per layer [R, 64, H, D], fp32, bf16 or fp16.
        scores: fp32 [L, R, H, 64], added to; None: nothing is scored.
        key_means: fp32 [L, H, D], which sealed keys lack where they rotate (`sealed_basis`).
        layout: of sealed pages.
    """

    arena: torch.Tensor
    frames: torch.Tensor
    heads: torch.Tensor
    raw_slot: torch.Tensor
    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    scores: torch.Tensor | None
    key_means: torch.Tensor
    layout: PageLayout


class DecodeLayers:
    """Attention of decode steps over the pages of one pool.

    Raises:
        ValueError: a table is not contiguous, or does not fit the layout.
    """

    def __init__(self, tables: LayerTables) -> None:
        _check(tables)
        self._tables = tables  # kept alive: the kernel has their addresses
        self.dtype = tables.keys[0].dtype
        self._pointers = [_pointers(tables.keys), _pointers(tables.values)]
        scores = tables.scores
        self._words = int64_words(
            ctypes.addressof(layout_words(tables.layout)),
            DTYPE_CODES[self.dtype],
            tables.key_means.data_ptr() if tables.layout.rotates else 0,
            tables.arena.data_ptr(),
            tables.frames.data_ptr(),
            tables.heads.data_ptr(),
            tables.raw_slot.data_ptr(),
            *tables.frames.stride()[:2],
            *tables.heads.stride()[:2],
            *(ctypes.addressof(pointers) for pointers in self._pointers),
            0 if scores is None else scores.data_ptr(),
            0 if scores is None else scores.stride(0),
        )
        self._batch = int64_words(0, 0, 0, 0, 0, 0)
        self._pages: StepPages | None = None

    def begin(self, pages: StepPages) -> None:
        """A step of these sequences; every one has a token, and the last one's page is open."""
        self._pages = pages
        self._batch = int64_words(
            *pages.table.shape,
            pages.table.data_ptr(),
            pages.lengths.data_ptr(),
            pages.rows.data_ptr(),
            torch.get_num_threads(),
        )

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax: Softmax
    ) -> AttentionState:
        """Attention of the new tokens over all that is kept of one layer, themselves included.

        Keys and values are written to raw pages first; tokens of open pages that come before a
        sequence's query are scored afterwards (`kernels.score.score_decode`).

        Args:
            q: [B, Hq, D]. k, v: [B, H, D]. Of the pool's dtype; tokens may be strided, what belongs
                to one is contiguous.

        Returns:
            Its output is of the pool's dtype.
        """
        batch, heads = q.shape[:2]
        out = torch.empty(q.shape, dtype=self.dtype)
        lse = torch.empty(batch, heads)
        _layer_function(
            self._words,
            self._batch,
            layer,
            heads // k.shape[1],
            q.data_ptr(),
            q.stride(0),
            k.data_ptr(),
            k.stride(0),
            v.data_ptr(),
            v.stride(0),
            softmax.log2_scale,
            out.data_ptr(),
            lse.data_ptr(),
        )
        return AttentionState(out, lse)


def _check(tables: LayerTables) -> None:
    layout = tables.layout
    page = (PAGE_TOKENS, layout.num_kv_heads, layout.head_dim)
    raw = [*tables.keys, *tables.values]
    rest = [tables.arena, tables.frames, tables.heads, tables.raw_slot, tables.key_means]
    rest += [] if tables.scores is None else [tables.scores]
    fits = all(t.shape[1:] == page and t.dtype == raw[0].dtype for t in raw)
    if not fits or raw[0].itemsize != layout.raw_itemsize or raw[0].dtype not in DTYPE_CODES:
        raise ValueError(f"raw pages {tuple(raw[0].shape)} of {raw[0].dtype} against {layout}")
    if tables.key_means.shape != (len(tables.keys), layout.num_kv_heads, layout.head_dim):
        raise ValueError(f"key means {tuple(tables.key_means.shape)} against {layout}")
    if not all(t.is_contiguous() for t in (*raw, *rest)):
        raise ValueError("a table is not contiguous")


def _pointers(tensors: Sequence[torch.Tensor]) -> ctypes.Array[ctypes.c_int64]:
    return int64_words(*(t.data_ptr() for t in tensors))
