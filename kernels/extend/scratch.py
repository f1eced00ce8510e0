# SPDX-License-Identifier: Apache-2.0
"""Where sealed prefixes are unpacked to, for dense attention."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS, PageLayout
from sglang_diffxkv.kernels.pages import SealedLists

MOST_TOKENS = 32768
"""Longer prefixes go through it in slices: each costs three launches and reads the output again."""
MOST_BYTES = 128 << 20
"""32,768 tokens of 8 KV heads of 128."""


class UnpackedPages(NamedTuple):
    """Pages that are unpacked at a time: one of several slices of a list.

    Attributes:
        pages: int32 [N]. indptr: int32 [B + 1], those of each sequence among them.
        slices: how many there are.
    """

    pages: torch.Tensor
    indptr: torch.Tensor
    slices: int


class PrefixScratch(NamedTuple):
    """Rows of the sealed pages that are unpacked at a time; contents mean nothing in between.

    Attributes:
        k, v: [H * pages * 64, D]; a KV head's rows lie together, a sequence's within them.
        starts: int64 [pages + 1, H], first row of each unpacked (page, head), and their end.
    """

    k: torch.Tensor
    v: torch.Tensor
    starts: torch.Tensor

    @property
    def pages(self) -> int:
        """How many pages fit, were all of their tokens kept."""
        return len(self.starts) - 1

    def slices(self, lists: SealedLists) -> list[UnpackedPages]:
        """Parts of a list that fit, one after the other."""
        pages, indptr = lists.pages, lists.indptr
        count = -(-len(pages) // self.pages)
        if count == 1:
            return [UnpackedPages(pages, indptr, 1)]
        found = []
        for first in range(0, len(pages), self.pages):
            part = pages[first : first + self.pages]
            found.append(UnpackedPages(part, (indptr - first).clamp_(0, len(part)), count))
        return found

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes + self.starts.nbytes


def make_scratch(
    layout: PageLayout, model_dtype: torch.dtype, device: torch.device | str
) -> PrefixScratch:
    """Allocate as much as `MOST_TOKENS` and `MOST_BYTES` allow, at least a page.

    Codes become fp16, which holds 11 bits of them. Raw tiers keep the model's dtype, whose range
    fp16 may lack; codes of the other tier are then rounded to it.
    """
    h, d = layout.num_kv_heads, layout.head_dim
    pages = _pages(layout)
    dtype = torch.float16 if layout.rotates else model_dtype
    k, v = (torch.empty(h * pages * PAGE_TOKENS, d, dtype=dtype, device=device) for _ in range(2))
    return PrefixScratch(k, v, torch.empty(pages + 1, h, dtype=torch.int64, device=device))


def scratch_bytes(layout: PageLayout) -> int:
    """Of `make_scratch`."""
    pages = _pages(layout)
    return pages * _page_bytes(layout) + 8 * (pages + 1) * layout.num_kv_heads


def _page_bytes(layout: PageLayout) -> int:
    itemsize = 2 if layout.rotates else layout.raw_itemsize
    return 2 * PAGE_TOKENS * layout.num_kv_heads * layout.head_dim * itemsize


def _pages(layout: PageLayout) -> int:
    return max(1, min(MOST_TOKENS // PAGE_TOKENS, MOST_BYTES // _page_bytes(layout)))
