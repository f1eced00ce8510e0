# SPDX-License-Identifier: Apache-2.0
"""The page store: life of a virtual page from open to sealed to free. Knows nothing of SGLang."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from sglang_diffxkv.kernels.gpu.transfer import Download
from sglang_diffxkv.kernels.layout import PAGE_TOKENS, PageLayout
from sglang_diffxkv.policy.base import TierPolicy
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.policy.retention import RetentionMeter
from sglang_diffxkv.pool.arena import FrameArena
from sglang_diffxkv.pool.clock import ClockHand
from sglang_diffxkv.pool.directory import PageDirectory
from sglang_diffxkv.pool.key_means import KeyMeans
from sglang_diffxkv.pool.ledger import Ledger, Share
from sglang_diffxkv.pool.page_states import PageStates, read_states
from sglang_diffxkv.pool.ranks import Agree, alone
from sglang_diffxkv.pool.raw_pages import RawPages
from sglang_diffxkv.pool.sealing import write_sealed
from sglang_diffxkv.pool.sizing import PoolPlan
from sglang_diffxkv.pool.totals import Totals
from sglang_diffxkv.pool.unsettled import PageStateError, Released, Sealed, Unsettled

RAW_WINDOW = 4096
"""Raw pages that are searched at once for the coldest."""
RAW_WINDOWS = 4
"""How many times, before recent windows of running requests are sealed, too."""
SPARE_SHARE = 1 / 64
"""Of the raw pages, sealed beyond what is asked for, so that it is not asked for each page."""
DEMOTION_WINDOW = 4096
"""Virtual pages that are searched at once for the coldest."""
RELEASED_AT_ONCE = 256
"""Pages whose frames are looked up at a time: a few MiB."""
STEPS_TO_ARRIVE = 2
"""Steps after which the host knows what was freed or sealed: whoever begins that one has seen the
results of the step that ran then."""


class NotedQuality(NamedTuple):
    """Pages by what their requests asked for, as far as it is not the server's own quality.

    Attributes:
        opened: pages opened for this step. lossless_full: pages of lossless requests that its
            tokens fill.
    """

    opened: dict[Quality, int]
    lossless_full: int


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
        shape = plan.num_layers, layout.num_kv_heads, layout.head_dim
        self.key_means = KeyMeans(*shape, device)
        if layout.rotates:
            if policy.key_means is not None:
                self.key_means.set(policy.key_means)
            policy.key_means = self.key_means.by_layer
        self.ledger = Ledger(plan.raw_pages, plan.frames, plan.worst_frames)
        self.totals = Totals(plan.num_layers, device)
        self.retention: RetentionMeter | None = None
        if policy.needs_scores:
            self.retention = RetentionMeter(policy, plan.num_layers, device)
        self.counters = Counters()
        self.unsettled = Unsettled(self.ledger, self.totals)
        self.raw_hand = ClockHand(plan.raw_pages, RAW_WINDOW)
        self.demotion_hand = ClockHand(plan.virtual_pages, DEMOTION_WINDOW)
        self.checks_use = torch.device(device).type == "cpu"
        """Whether misuse of pages raises: not on a GPU, where asking is to wait for it."""
        self.step = 0
        self.decode_step = 1  # 0 stands for never
        self.decoded_at = 0
        """The latest step that had the next token of every running request."""

    def clear(self) -> None:
        """Free every page (SGLang's ``/flush_cache``)."""
        self.settle()
        if not self.pages_held:
            return
        d = self.directory
        pages = torch.nonzero((d.raw_slot[1:] >= 0) | d.sealed[1:]).flatten() + 1
        for part in pages.split(RELEASED_AT_ONCE):
            self.release(part)
            self.settle()

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
        self.totals.by_quality[Quality.BALANCED] += pages.numel()
        self.counters.opened += pages.numel()

    def release(self, pages: torch.Tensor) -> None:
        """Free open or sealed ``pages`` (int64 [N], distinct), without waiting for the device.

        What they held is the ledger's to promise again after `settle`: at once on a CPU.

        Raises:
            PageStateError: a page is unknown or already free; on a GPU from `settle`.
        """
        self._check_ids(pages)
        for part in pages.split(RELEASED_AT_ONCE):
            self._release(part)
        if self.checks_use:
            self.settle()

    def _release(self, pages: torch.Tensor) -> None:
        d = self.directory
        states = read_states(d, pages)
        if not self.checks_use or PageStates(states).sealed.any():
            frames = d.frames[:, pages].masked_fill(~d.sealed[pages][:, None], -1)
            self.totals.add_payload(d.heads[:, pages], (frames >= 0).sum(2), sign=-1)
            self.arena.give_back(frames)
        self.raw.give_back(d.raw_slot[pages])
        d.release(pages)
        self.unsettled.add(Released(self.step, pages.numel(), states))
        self.counters.released += pages.numel()

    @property
    def pages_held(self) -> int:
        """Open and sealed pages."""
        counted = self.ledger.open_pages + self.ledger.sealed_pages
        return counted - self.unsettled.released_pages

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
        """What sealed ``pages`` (int64 [N]) are charged for."""
        return Share(pages.numel(), int(self.directory.num_frames[pages].sum()))

    def begin_step(self, decodes: bool) -> None:
        """A forward pass begins; ``decodes``: with the next token of every running request."""
        self.step += 1
        self.settle(before=self.step - STEPS_TO_ARRIVE + 1)
        if decodes:
            self.decode_step += 1
            self.decoded_at = self.step

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
        recent = pages[end > context - window]
        d.window_step.index_fill_(0, recent, self.decode_step)
        d.last_used.index_fill_(0, pages, self.step)

    def set_quality(self, pages: torch.Tensor, quality: torch.Tensor, noted: NotedQuality) -> None:
        """Note what their requests asked for, of pages that were opened for this step.

        Args:
            pages: int64 [N], distinct. quality: uint8 [N], `Quality` of each. Lossless pages are
                never sealed, so the frames promised to them are free.
            noted: the same in numbers, with what has become of such pages since.
        """
        self.directory.quality[pages] = quality
        by_quality = self.totals.by_quality
        by_quality.update(noted.opened)
        by_quality[Quality.BALANCED] -= sum(noted.opened.values())
        self.ledger.keep_raw(noted.opened.get(Quality.LOSSLESS, 0), noted.lossless_full)

    def read(self, pages: torch.Tensor) -> None:
        """Note that sealed ``pages`` (int [N], may repeat) are about to be attended to."""
        self.directory.last_used.index_fill_(0, pages.long(), self.step)

    @property
    def next_step(self) -> int:
        return self.step + 1

    def expect(self, pages: torch.Tensor) -> None:
        """Note that ``pages`` (int64 [N]) will be attended to in the next step."""
        self.directory.last_used.index_fill_(0, pages, self.next_step)

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
            order = torch.arange(pages.numel(), device=pages.device)
        else:  # its pages stay together, as far as there is room to grade them together
            order = sequence.argsort(stable=True)
        for part in self._batches(order):
            charged = write_sealed(
                self, pages[part], slots[part], None if sequence is None else sequence[part]
            )
            number = self.policy.plan_number
            self.totals.by_plan[number] += len(part)
            self.raw.give_back(slots[part])
            self.ledger.seal(len(part), int(charged.sum()))
            self.counters.sealed += len(part)

    def seal_ready(self, pages: torch.Tensor, ready: torch.Tensor) -> None:
        """`seal` where ``ready``, each page by itself, without waiting for the device.

        Args:
            pages: int64 [N]; those that are ready are open, full, distinct and no lossless ones.
            ready: bool [N].
        """
        pages = torch.where(ready, pages, self.directory.nowhere)
        slots = self.directory.raw_slot[pages].long().clamp(min=0)
        for part in self._batches(torch.arange(pages.numel(), device=pages.device)):
            charged = write_sealed(self, pages[part], slots[part], None, ready[part])
            self.raw.give_back(slots[part])
            sums = Download(torch.stack([ready[part].sum(), charged.sum()]))
            self.unsettled.add(Sealed(self.step, self.policy.plan_number, sums))
        if self.checks_use:
            self.settle()

    def _batches(self, order: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Parts of ``order`` (int64 [N]) that there is room to grade at a time."""
        return order.tensor_split(max(1, -(-len(order) // self.plan.workspace.graded_pages)))

    def in_window(self, pages: torch.Tensor) -> torch.Tensor:
        """Which ``pages`` (int64 [N]) lie in the recent window of a sequence that may still run.

        A running request decodes in every decode step, so a page that was not in a window at the
        latest one is in none. Requests that finished since then are not told apart.
        """
        return self.directory.window_step[pages] == self.decode_step

    def may_seal(self, pages: torch.Tensor) -> torch.Tensor:
        """Which ``pages`` (int64 [N]) are of requests that put up with it: bool [N]."""
        return self.directory.quality[pages] != Quality.LOSSLESS

    def seal_cold(self, headroom: int, include_window: bool) -> None:
        """Seal the coldest full open pages until ``headroom`` pages may be opened, if that helps.

        With ``include_window`` recent windows of running requests go too: it costs them accuracy,
        so everything else is tried before, and no more of them is sealed than is needed.
        """
        ledger = self.ledger
        if ledger.headroom >= headroom:
            return
        spare = 0 if include_window else int(self.plan.raw_pages * SPARE_SHARE)
        # The last resort goes on until it has found them: each that there is makes room.
        for slots in self.raw_hand.windows(None if include_window else RAW_WINDOWS):
            if not ledger.full_pages or ledger.headroom >= headroom:
                return
            cold = self.sealable(slots, include_window)
            while ledger.headroom < headroom and cold.numel():
                frames_free, batch = ledger.frames_free, headroom - ledger.headroom + spare
                self.seal(cold[:batch])
                self.counters.sealed_under_pressure += len(cold[:batch])
                cold = cold[batch:]
                if ledger.raw_free >= headroom and ledger.frames_free == frames_free:
                    return  # only frames lack, and these pages take all that they were promised

    def sealable(self, slots: slice, include_window: bool) -> torch.Tensor:
        """Full pages of some raw slots that may be sealed, coldest first; int64 [N]."""
        d = self.directory
        pages = self.raw.page[1:][slots].long()  # slots, which all ranks give out alike
        mask = (pages > 0) & (d.filled[pages] == PAGE_TOKENS) & self.may_seal(pages)
        if not include_window:
            mask &= ~self.in_window(pages)
        pages = pages[mask]
        return pages[torch.argsort(d.last_used[pages], stable=True)]

    def num_raw_only_unused(self, since: int) -> int:
        """Lossless pages that no step since that one has used; looks at the raw pages, not more."""
        d = self.directory
        pages = self.raw.page[1:].long().clamp(min=0)
        return int(((pages > 0) & ~self.may_seal(pages) & (d.last_used[pages] < since)).sum())

    def problems(self) -> list[str]:
        """What cannot be, by the counters alone: in O(1), without waiting for the device."""
        ledger, totals = self.ledger, self.totals
        held = ledger.open_pages + ledger.sealed_pages
        sums = {
            "pages by quality": (totals.by_quality.total(), held),
            "sealed pages by plan": (totals.by_plan.total(), ledger.sealed_pages),
        }
        found = [
            f"{name}: {counted}, by the ledger {expected}"
            for name, (counted, expected) in sums.items()
            if counted != expected
        ]
        return [*ledger.problems(), *found]

    def _check_ids(self, pages: torch.Tensor) -> None:
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
        """Every byte that the store has allocated, or will take when it works."""
        tables = self.directory.nbytes + self.arena.nbytes + self.raw.nbytes + self.totals.nbytes
        tables += self.key_means.nbytes
        meter = 0 if self.retention is None else self.retention.nbytes
        beside = self.plan.workspace.nbytes + self.plan.attention_bytes
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
        ledger, plan = self.ledger, self.plan
        used = self.page_bytes(ledger.frames_used, ledger.open_pages)
        return round(used * self.nbytes / self.page_bytes(plan.frames, plan.raw_pages))

    @property
    def physical_compression(self) -> float:
        """What SGLang's own pool takes for the tokens held, over the bytes in use for them here."""
        dense = self.ledger.tokens_held * (self.plan.dense_page_bytes // PAGE_TOKENS)
        return dense / max(1, self.bytes_in_use)
