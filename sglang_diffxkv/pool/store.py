# SPDX-License-Identifier: Apache-2.0
"""The page store: life of a virtual page from open to sealed to free. Knows nothing of SGLang."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS, PageLayout
from sglang_diffxkv.policy.base import TierPolicy
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.policy.retention import RetentionMeter
from sglang_diffxkv.pool.arena import FrameArena
from sglang_diffxkv.pool.directory import PageDirectory
from sglang_diffxkv.pool.ledger import Ledger, Share
from sglang_diffxkv.pool.ranks import Agree, alone
from sglang_diffxkv.pool.raw_pages import RawPages
from sglang_diffxkv.pool.sealing import write_sealed
from sglang_diffxkv.pool.sizing import PoolPlan


class PageStateError(RuntimeError):
    """A page was used in a way its state does not allow (double free, write when sealed ...)."""


@dataclass
class Counters:
    """Events since the start."""

    opened: int = 0
    sealed: int = 0
    sealed_under_pressure: int = 0
    released: int = 0
    reclaims: int = 0
    evicted: int = 0
    demoted: int = 0
    """Pages, each time one is."""
    frames_demoted: int = 0
    """Frames that demotion has freed."""


class PageStore:
    """Directory, raw pages, arena and ledger, kept consistent.

    Pages are sealed in batches: the policy assigns a tier to every (layer, head, token), payloads
    are packed into frames, and the raw pages are returned (``architecture.md``, sealed pages).
    """

    def __init__(
        self,
        plan: PoolPlan,
        layout: PageLayout,
        policy: TierPolicy,
        dtype: torch.dtype,
        device: str = "cpu",
        agree: Agree = alone,
    ) -> None:
        """``agree``: with the other ranks' stores, which hold the same pages of other KV heads."""
        self.plan, self.layout, self.policy, self.agree = plan, layout, policy, agree
        self.num_layers = plan.num_layers
        self.directory = PageDirectory(plan.virtual_pages, plan.num_layers, layout, device)
        self.arena = FrameArena(plan.frames, layout.frame_bytes, device)
        self.raw = RawPages(
            plan.raw_pages + 1,
            plan.num_layers,
            layout.num_kv_heads,
            layout.head_dim,
            dtype,
            device,
        )
        self.ledger = Ledger(plan.raw_pages, plan.frames, plan.worst_frames)
        self.retention: RetentionMeter | None = None
        if policy.needs_scores:
            self.retention = RetentionMeter(policy, plan.num_layers, device)
        self.counters = Counters()
        self._sealable: dict[bool, torch.Tensor] = {}
        """What `sealable` found since pages were last used, sealed or freed."""
        self.checks_use = torch.device(device).type == "cpu"
        """Whether misuse of pages raises: not on a GPU, where asking is to wait for it."""
        self.step = 0
        self.decode_step = 1  # 0 stands for never

    def clear(self) -> None:
        """Forget every page (SGLang's ``/flush_cache``)."""
        self.directory.clear()
        self.arena.clear()
        self.raw.clear()
        self.ledger = Ledger(self.plan.raw_pages, self.plan.frames, self.plan.worst_frames)
        self._sealable.clear()

    def open(self, pages: torch.Tensor) -> None:
        """Open free ``pages`` (int64 [N], distinct).

        Raises:
            PageStateError: a page is unknown or not free (`checks_use`).
            RuntimeError: the ledger cannot promise that many.
        """
        self._check_ids(pages)
        d = self.directory
        if self.checks_use and bool((d.sealed[pages] | (d.raw_slot[pages] >= 0)).any()):
            raise PageStateError("open: page is in use")
        self.ledger.open(pages.numel())
        d.open(pages, self.raw.take(pages))
        self.counters.opened += pages.numel()

    def release(self, pages: torch.Tensor) -> None:
        """Free open or sealed ``pages`` (int64 [N], distinct).

        Raises:
            PageStateError: a page is unknown or already free.
        """
        self._check_ids(pages)
        d = self.directory
        slots, frames, demoted = d.raw_slot[pages], d.num_frames[pages], d.demotions[pages] > 0
        is_open, is_fresh = slots >= 0, d.sealed[pages] & ~demoted
        counted = [is_open, is_open & ~self.may_seal(pages), is_fresh, demoted]
        counted += [frames * is_fresh, frames * demoted]
        # Asked for in one: each answer is a wait for the device.
        num_open, raw_only, *shares = torch.stack([x.sum() for x in counted]).tolist()
        fresh, gone = Share(shares[0], shares[2]), Share(shares[1], shares[3])
        if num_open + fresh.pages + gone.pages != pages.numel():
            raise PageStateError("release: page is already free")
        self.ledger.raw_only -= raw_only
        open_first = is_open.int().argsort(descending=True, stable=True)
        self.raw.give_back(slots[open_first[:num_open]].long())
        self.arena.give_back(d.frames[:, pages])
        d.release(pages)
        self.ledger.release(num_open, fresh, gone)
        self.counters.released += pages.numel()
        self._sealable.clear()

    def share(self, pages: torch.Tensor) -> Share:
        """What sealed ``pages`` (int64 [N]) are charged for."""
        return Share(pages.numel(), int(self.directory.num_frames[pages].sum()))

    def begin_step(self, decodes: bool) -> None:
        """A forward pass begins; ``decodes``: with the next token of every running request."""
        self._sealable.clear()
        self.step += 1
        self.decode_step += decodes

    def touch(
        self,
        pages: torch.Tensor,
        position: torch.Tensor,
        context: torch.Tensor,
        window: int,
    ) -> None:
        """Note that open ``pages`` are about to be written or attended to in this step.

        Args:
            pages: int64 [N] open pages, all that a sequence of the batch has; may repeat.
            position: int64 [N], their index in the sequence.
            context: int64 [N], length of the sequence including this step's tokens.
            window: recent tokens that a running sequence wants to keep raw.
        """
        d = self.directory
        end = (position + 1) * PAGE_TOKENS
        d.position[pages] = position.to(torch.int32)
        d.context[pages] = context.to(torch.int32)
        d.filled[pages] = (context - position * PAGE_TOKENS).clamp(max=PAGE_TOKENS).to(torch.int32)
        d.window_step[pages[end > context - window]] = self.decode_step
        d.last_used[pages] = self.step
        self._sealable.clear()

    def set_quality(self, pages: torch.Tensor, quality: torch.Tensor) -> None:
        """Note what the requests of open ``pages`` asked for, after `touch`.

        Args:
            pages: int64 [N] open pages; may repeat, then with equal qualities.
            quality: uint8 [N], `Quality`. Lossless pages are never sealed, so the frames promised
                to them are free; there may be no going back, and a lossless page stays one.
        """
        before = self._num_raw_only(pages)
        lossless = torch.full_like(quality, Quality.LOSSLESS)
        self.directory.quality[pages] = torch.where(self.may_seal(pages), quality, lossless)
        self.ledger.raw_only += self._num_raw_only(pages) - before
        self._sealable.clear()

    def _num_raw_only(self, pages: torch.Tensor) -> int:
        return torch.unique(pages[~self.may_seal(pages)]).numel()

    def read(self, pages: torch.Tensor) -> None:
        """Note that sealed ``pages`` (int [N], may repeat) are about to be attended to."""
        self.directory.last_used[pages] = self.step

    def seal(self, pages: torch.Tensor, sequence: torch.Tensor | None = None) -> None:
        """Seal full open ``pages`` (int64 [N], distinct).

        Args:
            sequence: int64 [N], equal for pages of one sequence, which the policy may judge
                together; None: nothing is known, every page is judged by itself.

        Raises:
            PageStateError: a page is not open, not full or a lossless request's.
        """
        if pages.numel() == 0:
            return
        self._check_ids(pages)
        d = self.directory
        slots = d.raw_slot[pages].long()
        if not bool(((slots >= 0) & (d.filled[pages] == PAGE_TOKENS)).all()):
            raise PageStateError("seal: page is not open and full")
        if not bool(self.may_seal(pages).all()):
            raise PageStateError("seal: page is of a lossless request")
        if sequence is None:
            sequence = torch.arange(pages.numel(), device=pages.device)
        charged = write_sealed(self, pages, slots, sequence)
        d.plan[pages] = self.policy.plan_number
        self.raw.give_back(slots)
        self.ledger.seal(pages.numel(), int(charged.sum()))
        self.counters.sealed += pages.numel()
        self._sealable.clear()

    def in_window(self, pages: torch.Tensor) -> torch.Tensor:
        """Which ``pages`` (int64 [N]) lie in the recent window of a sequence that may still run.

        A running request decodes in every decode step, so a page that was not in a window at the
        latest one is in none. Requests that finished since then are not told apart.
        """
        return self.directory.window_step[pages] == self.decode_step

    def may_seal(self, pages: torch.Tensor) -> torch.Tensor:
        """Which ``pages`` (int64 [N]) are of requests that put up with it: bool [N]."""
        return self.directory.quality[pages] != Quality.LOSSLESS

    def sealable(self, include_window: bool) -> torch.Tensor:
        """Full open pages that may be sealed, coldest first; int64 [N]."""
        found = self._sealable.get(include_window)
        if found is None:  # admission asks many times between two steps
            found = self._sealable[include_window] = self._find_sealable(include_window)
        return found

    def _find_sealable(self, include_window: bool) -> torch.Tensor:
        d = self.directory
        pages = self.raw.page[1:].long()  # in the order of slots, which all ranks give out alike
        pages = pages[pages > 0]
        mask = (d.filled[pages] == PAGE_TOKENS) & self.may_seal(pages)
        if not include_window:
            mask &= ~self.in_window(pages)
        pages = pages[mask]
        return pages[torch.argsort(d.last_used[pages], stable=True)]

    def seal_cold(self, headroom: int, include_window: bool) -> None:
        """Seal the coldest full open pages until ``headroom`` pages may be opened, if that helps.

        With ``include_window`` recent windows of running requests go too: it costs them accuracy,
        so everything else is tried before.
        """
        ledger = self.ledger
        short = headroom - ledger.headroom
        if short <= 0:
            return
        cold = self.sealable(include_window)
        while short > 0 and cold.numel():
            frames_free = ledger.frames_free
            batch, cold = cold[:short], cold[short:]
            self.seal(batch)
            self.counters.sealed_under_pressure += batch.numel()
            short = headroom - ledger.headroom
            if ledger.raw_free >= headroom and ledger.frames_free == frames_free:
                return  # only frames lack, and these pages take all that they were promised

    def _check_ids(self, pages: torch.Tensor) -> None:
        if pages.numel() == 0 or not self.checks_use:
            return
        if int(pages.min()) < 1 or int(pages.max()) > self.directory.num_pages:
            raise PageStateError("unknown page id")
        if torch.unique(pages).numel() != pages.numel():
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
        """Every byte that the store has allocated."""
        tables = self.directory.nbytes + self.arena.nbytes + self.raw.nbytes
        meter = 0 if self.retention is None else self.retention.nbytes
        return tables + meter + self.policy.nbytes
