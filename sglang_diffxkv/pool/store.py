# SPDX-License-Identifier: Apache-2.0
"""The page store: life of a virtual page from open to sealed to free. Knows nothing of SGLang."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from sglang_diffxkv.kernels.gpu.transfer import Readback, upload
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.pages import LayerPages, SealedTables
from sglang_diffxkv.policy.base import TierPolicy
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.policy.retention import RetentionMeter
from sglang_diffxkv.pool.arena import FrameArena
from sglang_diffxkv.pool.counters import Counters
from sglang_diffxkv.pool.directory import PageDirectory
from sglang_diffxkv.pool.host_level import HostLevel
from sglang_diffxkv.pool.key_means import KeyMeans
from sglang_diffxkv.pool.ledger import Ledger, Share
from sglang_diffxkv.pool.page_states import PageStates, read_states
from sglang_diffxkv.pool.ranks import Agree, alone
from sglang_diffxkv.pool.raw_pages import RawPages
from sglang_diffxkv.pool.recency import Recency
from sglang_diffxkv.pool.sizing import PoolSizes
from sglang_diffxkv.pool.totals import Totals
from sglang_diffxkv.pool.unsettled import PageStateError, Released, Unsettled

RELEASED_AT_ONCE = 256
"""Pages whose frames are looked up at a time: a few MiB."""
STEPS_TO_ARRIVE = 2
"""Steps after which the host knows what was freed or sealed: whoever begins that one has seen the
results of the step that ran then."""


class PageStore:
    """Directory, raw pages, arena and ledger, kept consistent.

    Pages are opened and freed here; `pool.sealing` and `pool.demotion` give them other payloads,
    `pool.offload` moves these to the host and back.
    """

    def __init__(
        self,
        sizes: PoolSizes,
        policy: TierPolicy,
        dtype: torch.dtype,
        device: str = "cpu",
        agree: Agree = alone,
    ) -> None:
        """``agree``: with the other ranks' stores, which hold the same pages of other KV heads."""
        self.sizes, self.policy, self.agree = sizes, policy, agree
        self.layout = layout = policy.layout
        self.num_layers = sizes.num_layers
        shape = sizes.num_layers, layout.num_kv_heads, layout.head_dim
        self.directory = PageDirectory(sizes.virtual_pages, sizes.num_layers, layout, device)
        self.arena = FrameArena(sizes.frames, layout.frame_bytes, device)
        self.raw = RawPages(sizes.raw_pages + 1, *shape, dtype, device)
        self.host: HostLevel | None = None
        if sizes.host_frames:
            self.host = HostLevel(sizes.host_frames, self.directory, layout)
        self.key_means = KeyMeans(*shape, device)
        if layout.rotates:
            if policy.key_means is not None:
                self.key_means.set(policy.key_means)
            policy.key_means = self.key_means.by_layer
        if policy.importance is not None:
            policy.importance = policy.importance.to(self.key_means.by_layer.device)
        self.ledger = Ledger(
            sizes.raw_pages, sizes.frames, sizes.worst_frames, host_total=sizes.host_frames
        )
        self.totals = Totals(sizes.num_layers, device)
        self.retention: RetentionMeter | None = None
        if policy.needs_scores:
            self.retention = RetentionMeter(policy, sizes.num_layers, device)
        self.counters = Counters()
        self.unsettled = Unsettled(self.ledger, self.totals)
        self.recency = Recency(self.directory, self.raw)
        self.unread = torch.zeros(1, dtype=torch.int32, device=device)
        """How often a decode step had a page that is neither open nor sealed (`kernels.step`)."""
        self._unread_lately = Readback(self.unread)
        self.checks_use = torch.device(device).type == "cpu"
        """Whether misuse of pages raises: not on a GPU, where asking is to wait for it."""

    def sealed_tables(self, layer: int) -> SealedTables:
        """Where the sealed pages of one layer lie, once those that are loading are there."""
        d = self.directory
        if self.host is not None:
            self.host.loading.wait(layer)
        return SealedTables(self.arena.buffer, d.frames[layer], d.heads[layer], self.layout)

    def layer_pages(self, layer: int) -> LayerPages:
        """All pages of one layer, as kernels take them."""
        raw, tables = self.raw, self.sealed_tables(layer)
        mean = self.key_means.by_layer[layer] if self.layout.rotates else None
        return LayerPages(tables, raw.keys[layer], raw.values[layer], mean)

    def clear(self) -> None:
        """Free every page (SGLang's ``/flush_cache``)."""
        self.settle()
        if not self.pages_held:
            return
        d = self.directory
        pages = torch.nonzero(d.in_use[1:]).flatten() + 1
        for part in pages.split(RELEASED_AT_ONCE):
            self.release(part)
            self.settle()

    def open(self, pages: torch.Tensor) -> None:
        """Open free ``pages`` (int64 [N], distinct).

        Raises:
            PageStateError: a page is unknown or not free (`checks_use`).
            RuntimeError: the ledger cannot reserve frames for that many.
        """
        self.check_ids(pages)
        d = self.directory
        in_use = d.sealed[pages] | d.on_host[pages] | (d.raw_slot[pages] >= 0)
        if self.checks_use and bool(in_use.any()):
            raise PageStateError("open: page is in use")
        self.ledger.open(pages.numel())
        d.open(pages, self.raw.take(pages))
        self.totals.by_quality[Quality.BALANCED] += pages.numel()
        self.counters.opened += pages.numel()

    def release(self, pages: torch.Tensor) -> None:
        """Free ``pages`` that are in use (int64 [N], distinct), without waiting for the device.

        What they held is the ledger's to give out again after `settle`: at once on a CPU.

        Raises:
            PageStateError: a page is unknown or already free; on a GPU from `settle`.
        """
        self.check_ids(pages)
        for part in pages.split(RELEASED_AT_ONCE):
            self._release(part)
        if self.checks_use:
            self.settle()

    def _release(self, pages: torch.Tensor) -> None:
        d = self.directory
        self.wait_for_host()  # nobody gets frames that are still being loaded into
        states = read_states(d, pages)
        if not self.checks_use or PageStates(states).sealed.any():
            frames = d.frames[:, pages].masked_fill(~d.sealed[pages][:, None], -1)
            self.totals.add_payload(d.heads[:, pages], (frames >= 0).sum(2), sign=-1)
            self.arena.give_back(frames)
        if self.host is not None and self.ledger.host_pages:
            frames = d.frames[:, pages].masked_fill(~d.on_host[pages][:, None], -1)
            self.host.arena.give_back(frames)
        self.raw.give_back(d.raw_slot[pages])
        d.release(pages)
        self.unsettled.add(Released(self.recency.forward_passes, pages.numel(), states))
        self.counters.released += pages.numel()

    @property
    def pages_held(self) -> int:
        """Open and sealed pages, and those on the host."""
        return self._pages_counted - self.unsettled.released_pages

    @property
    def _pages_counted(self) -> int:
        ledger = self.ledger
        return ledger.open_pages + ledger.sealed_pages + ledger.host_pages

    def wait_for_host(self) -> None:
        """Have the current stream wait for all that comes back from the host."""
        if self.host is not None:
            self.host.loading.wait_all()

    def settle(self, before: int | None = None) -> None:
        """Have the ledger know what was freed and sealed, waiting for the device where it must.

        All ranks have to know the same when they decide what fits: so this goes by steps, and not
        by what has arrived.

        Args:
            before: only in steps before that one; None: in all.

        Raises:
            PageStateError: a page was freed that was free.
        """
        self.counters.sealed += self.unsettled.settle(before)

    def share(self, pages: torch.Tensor) -> Share:
        """Sealed ``pages`` (int64 [N]), and the frames allocated to them."""
        return Share(pages.numel(), int(self.directory.num_frames[pages].sum()))

    def begin_step(self, decodes: bool) -> None:
        """A forward pass begins; ``decodes``: with the next token of every running request."""
        self.recency.begin(decodes)
        self.settle(before=self.recency.forward_passes + 1 - STEPS_TO_ARRIVE)

    def note_quality(
        self, pages: torch.Tensor, asked: Sequence[Quality], lossless_full: int
    ) -> None:
        """Note what their requests asked for, of open pages whose first token is committed.

        Lossless pages are never compressed, so the frames reserved for them are released.

        Args:
            pages: int64 [N], distinct. asked: of each. lossless_full: pages of lossless requests
                that the ledger has counted as full since the last time.
        """
        if asked:  # most decode steps open no page for them
            quality = torch.tensor(asked, dtype=torch.uint8)
            self.directory.quality[pages] = upload(quality, pages.device)
        opened, by_quality = Counter(asked), self.totals.by_quality
        by_quality.update(opened)
        by_quality[Quality.BALANCED] -= opened.total()
        self.ledger.never_compress(opened[Quality.LOSSLESS], lossless_full)

    def problems(self) -> list[str]:
        """What cannot be, by counters alone: in O(1), without waiting for the device, which may
        tell of its part the second time only."""
        ledger, totals = self.ledger, self.totals
        sealed = ledger.sealed_pages + ledger.host_pages
        sums = {
            "pages by quality": (totals.by_quality.total(), self._pages_counted),
            "sealed pages by plan": (totals.by_plan.total(), sealed),
        }
        found = [
            f"{name}: {counted}, by the ledger {expected}"
            for name, (counted, expected) in sums.items()
            if counted != expected
        ]
        if unread := int(self._unread_lately.latest()):
            found.append(f"pages: {unread} read by decode steps were neither open nor sealed")
        return [*ledger.problems(), *found]

    def check_ids(self, pages: torch.Tensor) -> None:
        """
        Raises:
            PageStateError: one of ``pages`` is unknown or listed twice (`checks_use`).
        """
        if pages.numel() == 0 or not self.checks_use:
            return
        ids = pages.numpy()
        if ids.min() < 1 or ids.max() > self.directory.num_pages:
            raise PageStateError("unknown page id")
        if len(ids) > 1 and len(np.unique(ids)) != len(ids):
            raise PageStateError("page listed twice")

    def write_rows(self, loc: torch.Tensor) -> torch.Tensor:
        """Rows of the flattened raw pages for token slots ``loc`` (int64 [T]); int64 [T].

        Raises:
            PageStateError: a slot's page is free or sealed.
        """
        slots = self.directory.raw_slot[loc // PAGE_TOKENS].long()
        if self.checks_use and bool((slots < 0).any()):
            raise PageStateError("write into a page that is not open")
        return slots * PAGE_TOKENS + loc % PAGE_TOKENS

    @property
    def nbytes(self) -> int:
        """Every byte that the store has allocated on its device, or will take when it works."""
        tables = self.directory.nbytes + self.arena.nbytes + self.raw.nbytes + self.totals.nbytes
        tables += self.key_means.nbytes + self.unread.nbytes
        tables += 0 if self.host is None else self.host.table_bytes
        meter = 0 if self.retention is None else self.retention.nbytes
        beside = self.sizes.workspace.nbytes + self.sizes.attention_bytes
        return tables + meter + self.policy.nbytes + beside

    def page_bytes(self, frames: int, raw_pages: int) -> int:
        """Bytes of so many frames and raw pages, with the latter's scores."""
        return frames * self.layout.frame_bytes + raw_pages * self.raw.page_bytes

    @property
    def bytes_in_use(self) -> int:
        """Of all bytes allocated, those that serve what is held.

        Frames and raw pages in use, and of everything else (directory, free lists, workspace, what
        policies keep) the same share as of all frames and raw pages: so nothing that is allocated
        goes uncounted, and a pool that is larger than its content says the same of it.
        """
        ledger, sizes = self.ledger, self.sizes
        used = self.page_bytes(ledger.frames_used, ledger.open_pages)
        return round(used * self.nbytes / self.page_bytes(sizes.frames, sizes.raw_pages))

    def physical_compression(self, beside: int = 0) -> float:
        """What SGLang's own pool takes for the tokens held, over the bytes in use for them here.

        Args:
            beside: bytes that other layers' K/V takes here as there.
        """
        dense = self.ledger.tokens_held * (self.sizes.dense_page_bytes // PAGE_TOKENS)
        return (dense + beside) / max(1, self.bytes_in_use + beside)
