# SPDX-License-Identifier: Apache-2.0
"""The page directory: what stands behind each virtual page, as device tensors."""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels.layout import PageLayout
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.lazy_zeros import lazy_zeros

NO_SLOT = -1
ALIGNED_PAGES = 4
"""Entries of so many pages end at a multiple of 16 bytes in any table: each layer's start at one
then, and kernels are not compiled for other addresses (`kernels.gpu.views.SealedView`)."""


class PageDirectory:
    """Tables indexed by virtual page id; page 0 is SGLang's page for padded tokens, the last one,
    ``nowhere``, stands for pages that are not there, and takes what is written of them.

    A page is *free*, *open* (``raw_slot >= 0``), *sealed*, or *on the host*: sealed, with its
    payload in host memory (`pool.host`). Tables are reserved, not filled: what a page's state gives
    no meaning to is undefined.

    Scalars are written by `index_fill_`: assigned to an index, a number is copied to the device
    first, which waits for it.

    Attributes:
        raw_slot: int32 [V], raw page of an open page, else -1.
        sealed, on_host: bool [V].
        frames: int32 [L, V, max_frames], frame ids of a sealed (page, layer), -1 where unused: in
            the arena, or in the host's; undefined for other pages.
        heads: int32 [L, V, H, 2], byte offset and ``n_high | n_low << 8`` of each head's payload; 0
            for pages that are not sealed.
        num_frames: int32 [V], frames allocated to a sealed page over all layers, here or on the
            host: as many as it has, or on the rank where it has most (`pool.ranks`).
        position: int32 [V], index of the page in its sequence.
        context: int32 [V], committed tokens of the sequence when the page was last attended to.
        plan: int32 [V], number of the plan that a sealed page was graded under, 0 for none.
        filled: int32 [V], committed tokens of an open page (`pool.committed`).
        last_used: int64 [V], step in which the page was last attended to.
        key: int64 [V, 2], what its content is known by (`offload.keys`), 0 where that is not known.
        quality: uint8 [V], `policy.quality.Quality` of the request that opened the page.
        demotions: uint8 [V], how often a sealed page has been demoted.
        window_step: int64 [V], last decode step at which it lay in a sequence's recent window.
    """

    def __init__(self, num_pages: int, num_layers: int, layout: PageLayout, device: str) -> None:
        v, heads = -(-(num_pages + 2) // ALIGNED_PAGES) * ALIGNED_PAGES, layout.num_kv_heads
        self.num_pages, self.nowhere = num_pages, num_pages + 1

        def table(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return lazy_zeros(*shape, dtype=dtype, device=device)

        self.raw_slot = table(v).fill_(NO_SLOT)
        self.raw_slot[:1].fill_(0)  # padded tokens are written to raw page 0
        self.sealed = table(v, dtype=torch.bool)
        self.on_host = table(v, dtype=torch.bool)
        self.frames = table(num_layers, v, layout.max_frames)
        self.heads = table(num_layers, v, heads, 2)
        self.num_frames = table(v)
        self.position = table(v)
        self.context = table(v)
        self.plan = table(v)
        self.filled = table(v)
        self.key = table(v, 2, dtype=torch.int64)
        self.quality = table(v, dtype=torch.uint8)
        self.demotions = table(v, dtype=torch.uint8)
        self.last_used = table(v, dtype=torch.int64)
        self.window_step = table(v, dtype=torch.int64)

    def tensors(self) -> list[torch.Tensor]:
        return [t for t in vars(self).values() if isinstance(t, torch.Tensor)]

    @property
    def in_use(self) -> torch.Tensor:
        """Which entries are of pages that are open, sealed or on the host: bool [V]."""
        return (self.raw_slot >= 0) | self.sealed | self.on_host

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors())

    @staticmethod
    def bytes_per_page(num_layers: int, layout: PageLayout) -> int:
        """Bytes that one more virtual page costs, for sizing."""
        one = PageDirectory(ALIGNED_PAGES - 2, num_layers, layout, "meta")
        return one.nbytes // ALIGNED_PAGES

    def open(self, pages: torch.Tensor, slots: torch.Tensor) -> None:
        """Give free ``pages`` (int64 [N]) the raw ``slots`` (int32 [N])."""
        self.raw_slot[pages] = slots
        d = self
        for t in (d.position, d.context, d.filled, d.quality, d.last_used, d.window_step):
            t.index_fill_(0, pages, 0)

    def seal(
        self,
        pages: torch.Tensor,
        frames: torch.Tensor,
        heads: torch.Tensor,
        allocated: torch.Tensor,
    ) -> None:
        """Point open ``pages`` [N] at their payload.

        Args:
            frames: int32 [L, N, max_frames]. heads: int32 [L, N, H, 2].
            allocated: int32 [N], their ``num_frames``.
        """
        self.frames[:, pages] = frames
        self.heads[:, pages] = heads
        self.num_frames[pages] = allocated
        self.raw_slot.index_fill_(0, pages, NO_SLOT)
        self.sealed.index_fill_(0, pages, True)
        self.sealed[self.nowhere :].fill_(False)
        self.demotions.index_fill_(0, pages, 0)

    def replace(
        self, layer: int, pages: torch.Tensor, frames: torch.Tensor, heads: torch.Tensor
    ) -> None:
        """Point sealed ``pages`` [N] at another payload of one layer; ``num_frames`` stays.

        Args:
            frames: int32 [N, max_frames]. heads: int32 [N, H, 2].
        """
        self.frames[layer, pages] = frames
        self.heads[layer, pages] = heads

    def offload(self, pages: torch.Tensor, frames: torch.Tensor) -> None:
        """Sealed ``pages`` [N] are on the host, in ``frames`` (int32 [L, N, max_frames]) there."""
        self.frames[:, pages] = frames
        self.heads.index_fill_(1, pages, 0)
        self.sealed.index_fill_(0, pages, False)
        self.on_host.index_fill_(0, pages, True)

    def load_back(self, pages: torch.Tensor, frames: torch.Tensor, heads: torch.Tensor) -> None:
        """``pages`` [N] that were on the host are sealed again.

        Args:
            frames: int32 [L, N, max_frames]. heads: int32 [L, N, H, 2].
        """
        self.frames[:, pages] = frames
        self.heads[:, pages] = heads
        self.sealed.index_fill_(0, pages, True)
        self.on_host.index_fill_(0, pages, False)

    def exchange(self, pages: torch.Tensor, others: torch.Tensor) -> None:
        """``pages`` and ``others`` (int64 [N], all distinct) of the same tokens trade what stands
        behind them."""
        to, of = torch.cat([pages, others]), torch.cat([others, pages])
        for name, table in vars(self).items():
            if name in ("frames", "heads"):
                table[:, to] = table[:, of]
            elif isinstance(table, torch.Tensor) and name != "key":
                table[to] = table[of]

    def frame_counts(self, pages: torch.Tensor) -> torch.Tensor:
        """Frames that ``pages`` (int64 [N]), sealed or on the host, have in each layer on this
        rank: int32 [L, N]."""
        return (self.frames[:, pages] >= 0).sum(dim=2, dtype=torch.int32)

    def never_compressed(self, pages: torch.Tensor) -> torch.Tensor:
        """Which ``pages`` (int64 [N]) are of lossless requests, and so never sealed: bool [N]."""
        return self.quality[pages] == Quality.LOSSLESS

    def owned(self, pages: torch.Tensor) -> torch.Tensor:
        """Frames that sealed ``pages`` (int64 [N]) have on this rank: int32 [N]."""
        return (self.frames[:, pages] >= 0).sum(dim=(0, 2), dtype=torch.int32)

    def release(self, pages: torch.Tensor) -> None:
        """Forget ``pages`` (int64 [N])."""
        self.heads.index_fill_(1, pages, 0)
        self.raw_slot.index_fill_(0, pages, NO_SLOT)
        for t in (
            self.sealed,
            self.on_host,
            self.num_frames,
            self.plan,
            self.demotions,
            self.key,
        ):
            t.index_fill_(0, pages, 0)
