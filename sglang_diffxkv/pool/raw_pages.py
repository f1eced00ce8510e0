# SPDX-License-Identifier: Apache-2.0
"""Raw pages: uncompressed K/V of open pages in SGLang's own MHA layout, with their scores."""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels.arena import return_frames, stack_ids, take_frames
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.pool.lazy_zeros import lazy_zeros


class RawPages:
    """Slots for open pages; slot 0 takes the writes of SGLang's padded tokens.

    Attributes:
        keys, values: per layer [R, 64, H, D] in the model's dtype.
        scores: float32 [L, R, H, 64], sum over sampled queries of the attention that each token
            received, in units of uniform attention (1 / tokens that the query sees).
        counts: float32 [R, 64], how many sampled queries could have attended to each token.
        page: int32 [R], the virtual page that owns a slot, -1 if free.
        stack, num_free: free slots, as `kernels.arena` keeps frames: int32 [R - 1] and [1]. Slot s
            has id ``R - 1 - s`` there, so that slots of an empty pool are given out in order.
    """

    def __init__(
        self,
        num_slots: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        shape = (num_slots, PAGE_TOKENS, num_kv_heads, head_dim)
        self.keys = [lazy_zeros(*shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [lazy_zeros(*shape, dtype=dtype, device=device) for _ in range(num_layers)]
        by_token = (num_slots, num_kv_heads, PAGE_TOKENS)
        self.scores = lazy_zeros(num_layers, *by_token, dtype=torch.float32, device=device)
        self.counts = lazy_zeros(num_slots, PAGE_TOKENS, dtype=torch.float32, device=device)
        self.page = torch.full((num_slots,), -1, dtype=torch.int32, device=device)
        self.page[:1].fill_(0)
        self.stack = lazy_zeros(num_slots - 1, dtype=torch.int32, device=device)
        self.num_free = torch.full((1,), num_slots - 1, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        tables = [self.scores, self.counts, self.page, self.stack, self.num_free]
        return sum(t.nbytes for t in [*self.keys, *self.values, *tables])

    @property
    def page_bytes(self) -> int:
        """Bytes of one raw page, with all that belongs to it."""
        return self.nbytes // self.page.numel()

    @staticmethod
    def bytes_per_slot(num_layers: int, num_kv_heads: int, head_dim: int, itemsize: int) -> int:
        """Bytes of one raw page, its scores and its bookkeeping, for sizing."""
        per_head = PAGE_TOKENS * (2 * head_dim * itemsize + 4)
        return num_layers * num_kv_heads * per_head + PAGE_TOKENS * 4 + 8

    def free_slots(self) -> torch.Tensor:
        """Int64; waits for the device."""
        return self.page.numel() - 1 - stack_ids(self.stack, int(self.num_free))

    def take(self, pages: torch.Tensor) -> torch.Tensor:
        """Give each of ``pages`` (int64 [N]) a slot with clean scores; int32 [N].

        That there are as many is the ledger's business, here as in `FrameArena.take`.
        """
        one_each = torch.ones_like(pages, dtype=torch.int32)
        ids = take_frames(self.stack, self.num_free, one_each, 1).flatten()
        taken = self.page.numel() - 1 - ids
        slots = taken.long()
        self.page[slots] = pages.to(torch.int32)
        self.scores.index_fill_(1, slots, 0)
        self.counts.index_fill_(0, slots, 0)
        return taken

    def move(self, slots: torch.Tensor, pages: torch.Tensor) -> None:
        """``slots`` (int [N], distinct where above 0; those below 1 stand for none) are ``pages``'
        now."""
        self.page[slots.long().clamp(min=0)] = pages.to(torch.int32)
        self.page[:1].fill_(0)

    def write(self, layer: int, rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write K/V [T, H, D] of one layer to ``rows`` (int64 [T], `PageStore.write_rows`)."""
        for pages, new in ((self.keys[layer], k), (self.values[layer], v)):
            pages.flatten(0, 1)[rows] = new.to(pages.dtype)

    def give_back(self, slots: torch.Tensor) -> None:
        """Free ``slots`` (int [N]); those below 1 stand for none."""
        slots = slots.flip(0).long()  # to be taken in this order again
        self.page.index_fill_(0, slots.clamp(min=0), -1)
        self.page[:1].fill_(0)
        ids = torch.where(slots > 0, self.page.numel() - 1 - slots, -1)
        return_frames(self.stack, self.num_free, ids.to(torch.int32))
