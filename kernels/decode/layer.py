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


class SealedLayers(NamedTuple):
    """Where the sealed pages of all L layers lie; contiguous tables.

    Attributes:
        arena: uint8 [F, frame_bytes].
        frames: int32 [L, V, max_frames]. heads: int32 [L, V, H, 2].
        key_means: fp32 [L, H, D], which sealed keys lack where they rotate (`sealed_basis`). Zero
            where scores are capped: a cap is not linear.
        layout: that the pages were packed with.
    """

    arena: torch.Tensor
    frames: torch.Tensor
    heads: torch.Tensor
    key_means: torch.Tensor
    layout: PageLayout


class LayerTables(NamedTuple):
    """The tables of all L layers, contiguous each.

    Attributes:
        raw_slot: int32 [V], raw page of each open page, negative for all others.
        keys, values: per layer [R, 64, H, D], fp32, bf16 or fp16.
        scores: fp32 [L, R, H, 64], added to; None: nothing is scored, as in layers with a window.
        sealed: None: pages that are not open have no tokens.
    """

    raw_slot: torch.Tensor
    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    scores: torch.Tensor | None
    sealed: SealedLayers | None


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
        self._layout = _layout_words(tables)
        self._words = int64_words(
            ctypes.addressof(self._layout),
            DTYPE_CODES[self.dtype],
            *_sealed_words(tables.sealed),
            tables.raw_slot.data_ptr(),
            *(ctypes.addressof(pointers) for pointers in self._pointers),
            0 if scores is None else scores.data_ptr(),
            0 if scores is None else scores.stride(0),
        )
        self._batch = int64_words(*7 * [0])
        self._pages: StepPages | None = None

    def begin(self, pages: StepPages) -> None:
        """A step of these sequences, with N new tokens each, whose pages are open."""
        batch, width = pages.table.shape
        self._pages = pages
        self._batch = int64_words(
            batch,
            width,
            pages.table.data_ptr(),
            pages.lengths.data_ptr(),
            pages.rows.data_ptr(),
            len(pages.rows) // max(batch, 1),
            torch.get_num_threads(),
        )

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax: Softmax
    ) -> AttentionState:
        """Attention of the new tokens over all that is kept of one layer, themselves included.

        Keys and values are written to raw pages first; tokens of open pages that come before a
        sequence's first query are scored afterwards (`kernels.score.score_decode`).

        Args:
            q: [B * N, Hq, D]. k, v: [B * N, H, D]. Sequence by sequence, by position; of the pool's
                dtype; tokens may be strided, what belongs to one is contiguous.
            softmax: of the layer, sinks included. With a window, pages that lie before those of all
                queries are not looked at.

        Returns:
            Its output is of the pool's dtype.
        """
        tokens, heads = q.shape[:2]
        sinks = softmax.sinks
        out = torch.empty(q.shape, dtype=self.dtype)
        lse = torch.empty(tokens, heads)
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
            softmax.log2_cap,
            softmax.window_left,
            None if sinks is None else sinks.data_ptr(),
            out.data_ptr(),
            lse.data_ptr(),
        )
        return AttentionState(out, lse)


def _layout_words(tables: LayerTables) -> ctypes.Array[ctypes.c_int64]:
    if tables.sealed is not None:
        return layout_words(tables.sealed.layout)
    _, _, kv_heads, dim = tables.keys[0].shape
    return int64_words(dim, kv_heads, tables.keys[0].itemsize, *7 * [0])


def _sealed_words(sealed: SealedLayers | None) -> tuple[int, ...]:
    if sealed is None:
        return 8 * (0,)
    return (
        sealed.key_means.data_ptr() if sealed.layout.rotates else 0,
        sealed.arena.data_ptr(),
        sealed.frames.data_ptr(),
        sealed.heads.data_ptr(),
        *sealed.frames.stride()[:2],
        *sealed.heads.stride()[:2],
    )


def _check(tables: LayerTables) -> None:
    raw = [*tables.keys, *tables.values]
    rest = [tables.raw_slot, *([] if tables.scores is None else [tables.scores])]
    page, dtype = raw[0].shape[1:], raw[0].dtype
    if tables.sealed is not None:
        layout, means = tables.sealed.layout, tables.sealed.key_means
        kv_heads, dim = layout.num_kv_heads, layout.head_dim
        if page != (PAGE_TOKENS, kv_heads, dim) or dtype.itemsize != layout.raw_itemsize:
            raise ValueError(f"raw pages {tuple(raw[0].shape)} of {dtype} against {layout}")
        if means.shape != (len(tables.keys), kv_heads, dim):
            raise ValueError(f"key means {tuple(means.shape)} against {layout}")
        rest += tables.sealed[:4]
    alike = all(t.shape[1:] == page and t.dtype == dtype for t in raw)
    if not alike or page[0] != PAGE_TOKENS or dtype not in DTYPE_CODES:
        raise ValueError(f"raw pages of {[(tuple(t.shape), t.dtype) for t in raw]}")
    if not all(t.is_contiguous() for t in (*raw, *rest)):
        raise ValueError("a table is not contiguous")


def _pointers(tensors: Sequence[torch.Tensor]) -> ctypes.Array[ctypes.c_int64]:
    return int64_words(*(t.data_ptr() for t in tensors))
