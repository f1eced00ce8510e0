# SPDX-License-Identifier: Apache-2.0
"""Views of one layer's pages, which kernels take whole.

Lists are ragged: those of sequence b are the entries ``[indptr[b], indptr[b + 1])``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.layout import FORMATS, PageLayout, make_layout


class SealedLists(NamedTuple):
    """Which sealed pages each of B sequences has, in any layer.

    Attributes:
        indptr: int32 [B + 1], into ``pages``.
        pages: int32 [N], page ids, in any order.
    """

    indptr: torch.Tensor
    pages: torch.Tensor


class SealedTables(NamedTuple):
    """Where the sealed pages of one layer lie.

    Attributes:
        arena: uint8 [F, frame_bytes], contiguous.
        frames: int32 [V, max_frames], the layer's frame table; rows contiguous.
        heads: int32 [V, H, 2], the layer's records (payload offset, n_high | n_low << 8); pages
            contiguous.
        layout: that the pages were packed with.
    """

    arena: torch.Tensor
    frames: torch.Tensor
    heads: torch.Tensor
    layout: PageLayout

    def listed(self, indptr: torch.Tensor, pages: torch.Tensor) -> SealedPages:
        return SealedPages(*self, indptr, pages)

    @staticmethod
    def none(keys: torch.Tensor) -> SealedTables:
        """Of a layer all of whose pages are open, in raw pages [R, 64, H, D] like ``keys``."""
        raw = FORMATS["raw"]
        layout = make_layout(
            head_dim=keys.shape[3],
            num_kv_heads=keys.shape[2],
            raw_itemsize=keys.itemsize,
            high=raw,
            low=raw,
        )
        arena = keys.new_empty(0, layout.frame_bytes, dtype=torch.uint8)
        records = keys.new_empty(0, layout.num_kv_heads, 2, dtype=torch.int32)
        return SealedTables(arena, records[:, 0], records, layout)


class SealedPages(NamedTuple):
    """`SealedTables`, and `SealedLists` of them."""

    arena: torch.Tensor
    frames: torch.Tensor
    heads: torch.Tensor
    layout: PageLayout
    indptr: torch.Tensor
    pages: torch.Tensor

    @property
    def tables(self) -> SealedTables:
        return SealedTables(*self[:4])

    @property
    def lists(self) -> SealedLists:
        return SealedLists(self.indptr, self.pages)


class OpenLists(NamedTuple):
    """Which raw pages each of B sequences has, in any layer.

    Attributes:
        indptr: int32 [B + 1], into ``slots``; may be empty ranges.
        slots: int32 [N], raw page of each open page, by increasing position in its sequence.
        position: int32 [N], index of each page in its sequence: token j of it is token
            ``64 * position + j``.
    """

    indptr: torch.Tensor
    slots: torch.Tensor
    position: torch.Tensor

    def of(self, keys: torch.Tensor, values: torch.Tensor) -> OpenPages:
        """Those of one layer, given its raw pages."""
        return OpenPages(keys, values, *self)


class OpenPages(NamedTuple):
    """Raw pages of one layer, and `OpenLists` of them.

    Attributes:
        keys, values: [R, 64, H, D], fp32, bf16 or fp16; slots may be strided, the rest is
            contiguous.
    """

    keys: torch.Tensor
    values: torch.Tensor
    indptr: torch.Tensor
    slots: torch.Tensor
    position: torch.Tensor

    @property
    def lists(self) -> OpenLists:
        return OpenLists(*self[2:])


class LayerPages(NamedTuple):
    """All pages of one layer of a pool.

    Attributes:
        tables: of the sealed ones.
        keys, values: [R, 64, H, D] raw pages, as `OpenPages` has them.
        key_mean: fp32 [H, D], contiguous, which sealed keys lack; None where they are not rotated
            (`PageLayout.rotates`).
    """

    tables: SealedTables
    keys: torch.Tensor
    values: torch.Tensor
    key_mean: torch.Tensor | None

    @staticmethod
    def of_open(keys: torch.Tensor, values: torch.Tensor) -> LayerPages:
        """Of a layer none of whose pages is ever sealed."""
        return LayerPages(SealedTables.none(keys), keys, values, None)


class Queries(NamedTuple):
    """New tokens' queries of B sequences, ragged.

    Attributes:
        q: [T, Hq, D], fp32, bf16 or fp16; tokens may be strided, what belongs to one is
            contiguous.
        indptr: int32 [B + 1], into ``q``; those of a sequence have consecutive positions.
        position: int32 [B], of each sequence's first query.
    """

    q: torch.Tensor
    indptr: torch.Tensor
    position: torch.Tensor
