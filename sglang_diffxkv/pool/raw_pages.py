# SPDX-License-Identifier: Apache-2.0
"""Raw pages: uncompressed K/V of open pages in SGLang's own MHA layout, with their scores."""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.pool.reserve import reserve


class RawPages:
    """Slots for open pages; slot 0 takes the writes of SGLang's padded tokens.

    Attributes:
        keys, values: per layer [R, 64, H, D] in the model's dtype.
        scores: float32 [L, R, H, 64], sum over sampled queries of the attention that each token
            received, in units of uniform attention (1 / tokens that the query sees).
        counts: float32 [R, 64], how many sampled queries could have attended to each token.
        page: int32 [R], the virtual page that owns a slot, -1 if free.
        stack: int64 [R], free slots in ``[0, num_free)``.
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
        self.keys = [reserve(*shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [reserve(*shape, dtype=dtype, device=device) for _ in range(num_layers)]
        by_token = (num_slots, num_kv_heads, PAGE_TOKENS)
        self.scores = reserve(num_layers, *by_token, dtype=torch.float32, device=device)
        self.counts = reserve(num_slots, PAGE_TOKENS, dtype=torch.float32, device=device)
        self.page = torch.empty(num_slots, dtype=torch.int32, device=device)
        self.stack = torch.empty(num_slots, dtype=torch.int64, device=device)
        self.page.fill_(-1)
        self.page[0] = 0
        self.num_free = num_slots - 1
        self.stack[: self.num_free] = torch.arange(self.num_free, 0, -1, device=device)

    @property
    def nbytes(self) -> int:
        tensors = [*self.keys, *self.values, self.scores, self.counts, self.page, self.stack]
        return sum(t.nbytes for t in tensors)

    @property
    def page_bytes(self) -> int:
        """Bytes of one raw page, with all that belongs to it."""
        return self.nbytes // self.page.numel()

    @staticmethod
    def bytes_per_slot(num_layers: int, num_kv_heads: int, head_dim: int, itemsize: int) -> int:
        """Bytes of one raw page, its scores and its bookkeeping, for sizing."""
        per_head = PAGE_TOKENS * (2 * head_dim * itemsize + 4)
        return num_layers * num_kv_heads * per_head + PAGE_TOKENS * 4 + 12

    def take(self, pages: torch.Tensor) -> torch.Tensor:
        """Give each of ``pages`` (int64 [N]) a slot with clean scores; int32 [N]."""
        n = pages.numel()
        self.num_free -= n
        slots = self.stack[self.num_free : self.num_free + n]
        self.page[slots] = pages.to(torch.int32)
        self.scores[:, slots] = 0
        self.counts[slots] = 0
        return slots.to(torch.int32)

    def give_back(self, slots: torch.Tensor) -> None:
        """Free ``slots`` (int64 [N])."""
        n = slots.numel()
        self.page[slots] = -1
        self.stack[self.num_free : self.num_free + n] = slots
        self.num_free += n
