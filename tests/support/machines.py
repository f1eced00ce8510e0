# SPDX-License-Identifier: Apache-2.0
"""Random walks: how many, and requests that come and go over SGLang's allocator."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.committed import count
from tests.support.pages import running
from tests.support.stores import PrefixCache, make_allocator

SHARE = 3
"""A run takes one in so many walks; hypothesis's profile "long" takes all."""
ROWS, LONGEST = 8192, 1024
"""Of SGLang's table: requests that a walk may have, and tokens of each."""


def walks(
    machine: type[RuleBasedStateMachine], policy: str, examples: int, steps: int
) -> type[Any]:
    """The test of a machine with a policy, as a class that pytest collects.

    ``examples`` are the walks of hypothesis's profile "long".
    """
    if settings.get_current_profile_name() != "long":
        examples //= SHARE
    case = type(f"{machine.__name__}_{policy}", (machine,), {"policy": policy}).TestCase
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    return case


def lens(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


class Request(NamedTuple):
    """A running request.

    Attributes:
        slots: of its tokens, and those allocated for drafts behind them.
        quality: that it asked for. longest: tokens that it may get. index: ``req_pool_index``.
        committed: tokens that it has for good, where it drafts.
        drafts: slots that it may have behind its longest.
    """

    slots: torch.Tensor
    quality: Quality
    longest: int
    index: int
    committed: int = 0
    drafts: int = 0

    @property
    def raw_pages(self) -> int:
        """What it may hold for long: as `patches.quality` reckons it."""
        most = self.longest + self.drafts
        return -(-most // PAGE_TOKENS) if self.quality is Quality.LOSSLESS else 0


class AllocatorMachine(RuleBasedStateMachine):
    """Requests prefill, decode, finish into the cache or abort, as the scheduler has it."""

    policy = "diffkv"
    drafts = 0
    host_bytes = 300_000

    def __init__(self) -> None:
        super().__init__()
        self.allocator = make_allocator(self.policy, host_bytes=self.host_bytes)
        self.table = torch.zeros(ROWS, LONGEST, dtype=torch.int32)
        self.cache = PrefixCache(self.allocator, self.table)
        self.free_indices = list(range(ROWS))
        self.running: list[Request] = []
        self.demotions = torch.zeros_like(self.allocator.store.directory.demotions)
        """Of pages, before they came to be held."""

    def _touch(self, decodes: bool, start: int = 0) -> None:
        """What a forward pass notes: over all running requests, or over the newest one, which has
        ``start`` tokens of others."""
        store = self.allocator.store
        store.begin_step(decodes)
        for slots, _, _, index, *_ in self.running if decodes else self.running[-1:]:
            start, end = len(slots) - 1 if decodes else start, len(slots)
            self.table[index, :end] = slots
            committed = self.allocator.running.commit(
                [index], torch.tensor([start]), torch.tensor([end])
            )
            count(store, committed, self.table)
            pages = slots[::PAGE_TOKENS] // PAGE_TOKENS
            position = torch.arange(len(pages))
            is_open = store.directory.raw_slot[pages] >= 0
            context = torch.full((int(is_open.sum()),), len(slots))
            store.recency.touch(pages[is_open], position[is_open], context, window=64)
            store.recency.read(pages[~is_open])

    @rule(
        tokens=st.integers(1, 700),
        answer=st.integers(1, 300),
        quality=st.sampled_from([Quality.BALANCED, Quality.LOSSLESS]),
    )
    def prefill(self, tokens: int, answer: int, quality: Quality) -> None:
        index = self.free_indices[-1]
        request = Request(lens(), quality, tokens + answer, index, drafts=self.drafts)
        held = sum(other.raw_pages for other in self.running)
        if request.raw_pages and held + request.raw_pages > self.allocator.capacity.lossless_pages:
            return
        self._admit(request, tokens)

    @precondition(lambda self: self.cache.sequences)
    @rule(data=st.data(), tokens=st.integers(1, 200))
    def prefill_behind_a_prefix(self, data: st.DataObject, tokens: int) -> None:
        """As far back as a sequence that is in the cache, some of it on the host perhaps."""
        cached = data.draw(st.sampled_from(range(len(self.cache.sequences))))
        prefix = self.cache.sequences[cached]
        longest = min(LONGEST, self.allocator.capacity.longest_prompt)
        directory, pages = self.allocator.store.directory, prefix[::PAGE_TOKENS] // PAGE_TOKENS
        if len(prefix) + tokens > longest or bool(directory.never_compressed(pages).any()):
            return  # requests of other qualities have pages of their own
        del self.cache.sequences[cached]  # nobody may evict it
        request = Request(prefix, Quality.BALANCED, longest, self.free_indices[-1])
        if not self._admit(request._replace(drafts=self.drafts), tokens):
            self.cache.sequences.append(prefix)

    def _admit(self, request: Request, tokens: int) -> bool:
        """Whether ``tokens`` behind what it has are admitted; if so, some of them are prefilled."""
        store, prefix = self.allocator.store, request.slots
        budget = self.allocator.create_prefill_budget(self.cache)
        pages = prefix[::PAGE_TOKENS] // PAGE_TOKENS
        store.recency.expect(pages)
        budget.expect_prefix(pages)
        fits, limit = budget.check_prefill(
            extend_input_len=tokens,
            total_tokens=tokens + 64,
            max_new_tokens=0,
            input_tokens=tokens,
            swa_host_hit_length=0,
            chunk_limit=512,
        )
        if not fits or not limit:
            assert self.running, "an idle pool must admit what it can hold"
            return False
        # what is admitted must be allocated: to fail here would end SGLang's scheduler
        tokens = min(tokens, limit)
        self.allocator.evict_to_free_tokens(self.cache, tokens)
        start, end = lens(len(prefix)), lens(len(prefix) + tokens)
        last = prefix[-1:] if len(prefix) else lens(-1)
        out = self.allocator.alloc_extend(start, start, end, end, last, tokens)
        assert out is not None and len(torch.unique(out)) == tokens
        slots = torch.cat([prefix, out])
        self.running.append(request._replace(slots=slots, committed=len(slots)))
        self.demotions[slots // PAGE_TOKENS] = store.directory.demotions[slots // PAGE_TOKENS]
        entry = running(request.quality, store.recency.next_step)
        self.allocator.running.enter([self.free_indices.pop()], [entry])
        self._touch(decodes=False, start=len(prefix))
        return True

    @precondition(lambda self: self.running)
    @rule()
    def decode(self) -> None:
        """One token for everyone; whoever does not fit is retracted, the last one first."""
        for request in [r for r in self.running if len(r.slots) >= r.longest]:
            self._end(request, cached=True)
        while self.running:
            new_pages = sum(len(r.slots) % PAGE_TOKENS == 0 for r in self.running)
            if self.allocator.check_decode_capacity(
                num_tokens=new_pages * PAGE_TOKENS, tree_cache=self.cache
            ):
                break
            assert len(self.running) > 1 or new_pages, "nothing is needed, yet refused"
            last = self.running.pop()
            assert self.running or not last.raw_pages, "a lossless request fits alone"
            self.allocator.free_segment(last.slots, start_pos=0)
            self._leave(last)
        if not self.running:
            return
        self.allocator.evict_to_free_tokens(self.cache, len(self.running) * PAGE_TOKENS)
        seq_lens = lens(*(len(r.slots) + 1 for r in self.running))
        last_slots = torch.stack([r.slots[-1] for r in self.running])
        out = self.allocator.alloc_decode(seq_lens, seq_lens, last_slots)
        assert out is not None
        self.demotions[out[out % PAGE_TOKENS == 0] // PAGE_TOKENS] = 0
        self.running = [
            r._replace(slots=torch.cat([r.slots, slot[None]]))
            for r, slot in zip(self.running, out, strict=True)
        ]
        self._touch(decodes=True)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), cached=st.booleans())
    def finish(self, data: st.DataObject, cached: bool) -> None:
        self._end(self.running[data.draw(st.integers(0, len(self.running) - 1))], cached)

    def _end(self, request: Request, cached: bool) -> None:
        """The full pages of a finished request go to the cache, its tail is freed."""
        self.running = [other for other in self.running if other is not request]
        slots = request.slots
        full = len(slots) // PAGE_TOKENS * PAGE_TOKENS if cached else 0
        if full:
            self.cache.sequences.append(slots[:full])
        self.allocator.free_segment(slots[full:], start_pos=full)
        self._leave(request)

    def _leave(self, request: Request) -> None:
        self.allocator.running.leave([request.index])
        self.free_indices.append(request.index)

    @rule()
    def flush(self) -> None:
        self.allocator.clear()
        for request in self.running:
            self._leave(request)
        self.running.clear()
        self.demotions.zero_()
        self.cache.sequences.clear()

    @invariant()
    def consistent(self) -> None:
        assert self.allocator.check() == []
        running = [r.slots for r in self.running]
        held = sum(-(-len(s) // PAGE_TOKENS) for s in [*running, *self.cache.sequences])
        free = self.allocator.available_size() // PAGE_TOKENS
        assert held + free == self.allocator.num_pages
        pages = torch.unique(torch.cat([lens(), *running]) // PAGE_TOKENS)
        directory = self.allocator.store.directory
        assert not bool(directory.on_host[pages].any()), "somebody reads it"
        assert torch.equal(directory.demotions[pages], self.demotions[pages]), "somebody holds it"
        self._check_usage(pages)

    def _check_usage(self, pages: torch.Tensor) -> None:
        """Against what the pages of those who run take: raw pages exactly, frames about.

        Cached lossless pages count as some that can be evicted, though they have no frames.
        """
        store = self.allocator.store
        directory, ledger = store.directory, store.ledger
        is_open, is_full = directory.raw_slot[pages] >= 0, directory.filled[pages] == PAGE_TOKENS
        lossless = directory.quality[pages] == Quality.LOSSLESS
        raw = int((is_open & (lossless | ~is_full)).sum()) / ledger.raw_total
        growing, full = is_open & ~lossless & ~is_full, is_open & ~lossless & is_full
        frames = int(directory.num_frames[pages].sum()) + int(growing.sum()) * ledger.worst_frames
        frames += int(full.sum()) * ledger.fresh_mean
        expected = max(raw, frames / ledger.frames_total)
        usage = self.allocator.capacity.usage(self.cache)
        assert raw - 1e-6 <= usage <= expected + 0.02
        if ledger.never_compressed == int((is_open & lossless).sum()):
            assert usage == pytest.approx(expected, abs=0.02)
