# SPDX-License-Identifier: Apache-2.0
"""A random walk of requests whose drafts are verified: accepted, rejected and written again."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.pool.committed import count
from sglang_diffxkv.pool.sealing import seal
from tests.support.machines import AllocatorMachine, Request, lens

MOST = 16
"""Drafts of a verification, the first one included."""
RESERVE = 2 * MOST
"""Slots behind what the scheduler knows to be committed, as `eagle_prepare_for_decode` has them."""


def ceil_page(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS) * PAGE_TOKENS


class DraftingMachine(AllocatorMachine):
    """Instead of decode steps there are verifications, with and without overlap."""

    drafts = RESERVE
    decode = None  # type: ignore[assignment]

    @precondition(lambda self: self.running)
    @rule(data=st.data(), drafts=st.integers(1, MOST), steps=st.integers(1, 6))
    def verify(self, data: st.DataObject, drafts: int, steps: int) -> None:
        """Drafts for everyone, one each in a mixed batch."""
        for _ in range(steps):
            if self._begin(drafts):
                self._accept(data, drafts)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), drafts=st.integers(1, MOST), cached=st.booleans())
    def finish_in_flight(self, data: st.DataObject, drafts: int, cached: bool) -> None:
        """With overlap somebody turns out to have finished while his next drafts are verified."""
        if self._begin(drafts):
            self._end(data.draw(st.sampled_from(self.running)), cached)
            self._accept(data, drafts)

    def _begin(self, drafts: int) -> bool:
        """Run a verification; whoever does not fit is retracted. Whether anybody is left."""
        for request in [r for r in self.running if r.committed >= r.longest]:
            self._end(request, cached=True)
        self._make_room()
        if self.running:
            self._allocate()
            self._write(drafts)
        return bool(self.running)

    def _accept(self, data: st.DataObject, drafts: int) -> None:
        count = len(self.running)
        accepted = data.draw(st.lists(st.integers(1, drafts), min_size=count, max_size=count))
        self.running = [
            r._replace(committed=r.committed + n)
            for r, n in zip(self.running, accepted, strict=True)
        ]

    def _allocated(self, request: Request) -> int:
        return max(len(request.slots), ceil_page(request.committed + RESERVE))

    def _make_room(self) -> None:
        while self.running:
            new = sum(ceil_page(self._allocated(r)) - ceil_page(len(r.slots)) for r in self.running)
            if self.allocator.check_decode_capacity(num_tokens=new, tree_cache=self.cache):
                break
            assert new, "nothing is needed, yet refused"
            last = self.running.pop()
            assert self.running or not last.raw_pages, "a lossless request fits alone"
            self.allocator.free_segment(last.slots, start_pos=0)
            self._leave(last)

    def _allocate(self) -> None:
        before = lens(*(len(r.slots) for r in self.running))
        after = lens(*(self._allocated(r) for r in self.running))
        last = torch.stack([r.slots[-1] for r in self.running])
        new = int((after - before).sum())
        out = self.allocator.alloc_extend(before, before, after, after, last, new)
        assert out is not None
        parts = out.split((after - before).tolist())
        self.running = [
            r._replace(slots=torch.cat([r.slots, part]))
            for r, part in zip(self.running, parts, strict=True)
        ]

    def _write(self, drafts: int) -> None:
        """What a forward pass notes, writes and seals."""
        store, recency = self.allocator.store, self.allocator.store.recency
        store.begin_step(decodes=True)
        for request in self.running:
            first, index = request.committed, request.index
            self.table[index, : len(request.slots)] = request.slots
            committed = self.allocator.running.commit(
                [index], torch.tensor([first]), torch.tensor([first + 1])
            )
            count(store, committed, self.table)
            store.write_rows(request.slots[first : first + drafts])  # raises where one is sealed
            pages = request.slots[: first + drafts : PAGE_TOKENS] // PAGE_TOKENS
            position = torch.arange(len(pages))
            is_open = store.directory.raw_slot[pages] >= 0
            context = torch.full((int(is_open.sum()),), first + 1)
            recency.touch(pages[is_open], position[is_open], context, window=64)
            recency.read(pages[~is_open])
        mine = (
            torch.cat([r.slots[: r.committed : PAGE_TOKENS] for r in self.running]) // PAGE_TOKENS
        )
        full = store.directory.filled[mine] == PAGE_TOKENS
        is_open = store.directory.raw_slot[mine] >= 0
        lossless = store.directory.never_compressed(mine)
        seal(store, mine[is_open & full & ~lossless & ~recency.in_window(mine)])

    def _end(self, request: Request, cached: bool) -> None:
        """The full committed pages go to the cache; the tail, and what was drafted, is freed."""
        self.running = [other for other in self.running if other is not request]
        full = request.committed // PAGE_TOKENS * PAGE_TOKENS if cached else 0
        if cached:
            self.allocator.commit(request.index, request.committed, self.table)
        if full:
            self.cache.sequences.append(request.slots[:full])
        self.allocator.free_segment(request.slots[full:], start_pos=full)
        self._leave(request)

    @invariant()
    def only_committed_tokens_are_kept(self) -> None:
        d = self.allocator.store.directory
        for request in self.running:
            drafted = request.slots[request.committed :] // PAGE_TOKENS
            assert not bool(d.sealed[drafted].any())
        for slots in self.cache.sequences:
            pages = slots[::PAGE_TOKENS] // PAGE_TOKENS
            assert bool((d.sealed[pages] | (d.filled[pages] == PAGE_TOKENS)).all())
