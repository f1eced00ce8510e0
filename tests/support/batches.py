# SPDX-License-Identifier: Apache-2.0
"""A batch of sequences over a page store."""

from __future__ import annotations

import torch

from sglang_diffxkv.attention.batch_pages import BatchPages, gather_pages, note_use, page_table
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.pool.sealing import seal
from sglang_diffxkv.pool.store import PageStore
from tests.support.pages import count
from tests.support.stores import make_store

WINDOW = 64


class Batch:
    """Sequences with given numbers of tokens; the first `shared` pages are the same for all."""

    def __init__(self, lens: list[int], sealed: list[int], shared: int = 0) -> None:
        """`sealed`: how many of each sequence's first pages are sealed already."""
        self.store: PageStore = make_store("diffkv", 24 << 20)
        self.lens = torch.tensor(lens)
        self.req_to_token = torch.zeros(len(lens) + 3, 4096, dtype=torch.int32)
        self.rows = torch.arange(len(lens)) + 2
        self.pages: list[list[int]] = []
        next_page = 5
        for row, length in zip(self.rows.tolist(), lens, strict=True):
            count = -(-length // PAGE_TOKENS)
            own = list(range(next_page, next_page + count))
            if self.pages:
                own[:shared] = self.pages[0][:shared]
            next_page += count
            self.pages.append(own)
            slots = torch.tensor(own)[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)
            self.req_to_token[row, :length] = slots.flatten()[:length].int()
        everything = sorted({page for own in self.pages for page in own})
        self.store.open(torch.tensor(everything))
        first = sorted({p for own, n in zip(self.pages, sealed, strict=True) for p in own[:n]})
        self._count()
        ids = torch.tensor(first, dtype=torch.int64)
        self.store.directory.filled[ids] = PAGE_TOKENS
        seal(self.store, ids)

    def _count(self) -> None:
        filled = {}
        for own, length in zip(self.pages, self.lens.tolist(), strict=True):
            filled |= {p: min(PAGE_TOKENS, length - i * PAGE_TOKENS) for i, p in enumerate(own)}
        count(self.store, torch.tensor(list(filled)), torch.tensor(list(filled.values())))

    @property
    def table(self) -> torch.Tensor:
        return page_table(self.req_to_token, self.rows, int(self.lens.max()))

    def gather(self) -> BatchPages:
        return gather_pages(self.store, self.table, self.lens)

    def touch(self, decodes: bool) -> None:
        self.store.begin_step(decodes)
        note_use(self.store, self.gather(), self.lens, WINDOW)
