# SPDX-License-Identifier: Apache-2.0
"""Pages that go to host memory and come back, in any order: bit for bit, and all counted."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.metrics import pool_stats
from sglang_diffxkv.pool.clock import ClockHand
from sglang_diffxkv.pool.demotion import demote_cold
from sglang_diffxkv.pool.integrity import check_integrity
from sglang_diffxkv.pool.offload import load_back, offload, offload_cold, on_host
from sglang_diffxkv.pool.payload import PagePayload, adopt, read_payload
from sglang_diffxkv.pool.sealing import seal
from sglang_diffxkv.pool.store import PageStateError, PageStore
from tests.support.machines import walks
from tests.support.pages import write
from tests.support.stores import STORE, make_store

LAYERS, HEADS, DIM, _ = STORE
BUDGET, HOST_BYTES = 4 << 20, 400_000
"""For some tens of pages, and some ten: either gets full."""


def ids(pages: Iterable[int]) -> torch.Tensor:
    return torch.tensor(list(pages), dtype=torch.int64)


def fill(store: PageStore, pages: torch.Tensor) -> None:
    """Open free ``pages``, write random tokens, and seal them."""
    store.open(pages)
    for slot in store.directory.raw_slot[pages].tolist():
        for layer in range(LAYERS):
            store.raw.keys[layer][slot] = torch.randn(PAGE_TOKENS, HEADS, DIM)
            store.raw.values[layer][slot] = torch.randn(PAGE_TOKENS, HEADS, DIM)
        store.raw.scores[:, slot] = 4 * torch.rand(LAYERS, HEADS, PAGE_TOKENS)
        store.raw.counts[slot] = 8
    position = torch.arange(len(pages))
    write(store, pages, position, (position + 1) * PAGE_TOKENS + 70)
    seal(store, pages)


def assert_same(was: PagePayload, now: PagePayload) -> None:
    """Bit for bit."""
    for name, before, after in zip(was._fields, was, now, strict=True):
        assert torch.equal(before, after), name


class HostMachine(RuleBasedStateMachine):
    """Every step leaves the store consistent; what moves is afterwards what it was."""

    policy = "diffkv"

    def __init__(self) -> None:
        super().__init__()
        self.store = make_store(self.policy, BUDGET, raw_share=0.5, host_bytes=HOST_BYTES)
        self.free = set(range(1, self.store.sizes.virtual_pages + 1))
        self.sealed: dict[int, PagePayload] = {}
        self.on_host: dict[int, PagePayload] = {}
        self.kept: list[PagePayload] = []
        """What was read of pages, some of which are gone."""

    def _choose(self, data: st.DataObject, pages: Iterable[int], most: int = 8) -> list[int]:
        """Some of them, in any order."""
        among = sorted(pages)
        chosen = data.draw(st.lists(st.sampled_from(among), min_size=1, max_size=most, unique=True))
        # Hypothesis draws short lists; a run of neighbours makes them longer.
        first = among.index(chosen[0])
        return list(dict.fromkeys([*chosen, *among[first : first + data.draw(st.integers(0, 8))]]))

    @initialize(pages=st.integers(4, 12))
    def begin(self, pages: int) -> None:
        self._fill(sorted(self.free)[: min(pages, self.store.ledger.headroom)])

    @rule(data=st.data())
    def fill_pages(self, data: st.DataObject) -> None:
        self._fill(self._choose(data, self.free)[: self.store.ledger.headroom])

    def _fill(self, pages: list[int]) -> None:
        if pages:
            self.store.recency.step += 1
            fill(self.store, ids(pages))
            self.free -= set(pages)
            self._note(self.sealed, pages)

    def _note(self, where: dict[int, PagePayload], pages: Iterable[int]) -> None:
        chosen = list(pages)
        where.update(zip(chosen, read_payload(self.store, ids(chosen)), strict=True))

    @precondition(lambda self: self.sealed)
    @rule(data=st.data())
    def offload_some(self, data: st.DataObject) -> None:
        pages = self._choose(data, self.sealed)
        if self.store.share(ids(pages)).frames > self.store.ledger.host_free:
            with pytest.raises(RuntimeError, match="to offload"):
                offload(self.store, ids(pages))
        else:
            offload(self.store, ids(pages))
            self._moved(pages)

    def _moved(self, pages: Iterable[int]) -> None:
        for page in pages:
            self.on_host[page] = self.sealed.pop(page)

    @precondition(lambda self: self.sealed)
    @rule(data=st.data(), more=st.integers(1, 30))
    def offload_cold_ones(self, data: st.DataObject, more: int) -> None:
        store, held = self.store, self._choose(data, self.sealed)
        store.recency.step += 1
        store.recency.read(ids(held))
        headroom = store.ledger.frame_headroom + more
        moved = offload_cold(store, store.recency.step, headroom)
        gone = set(on_host(store, ids(self.sealed)).tolist())
        assert moved == len(gone) and not gone & set(held)
        self._moved(gone)
        if store.ledger.frame_headroom < headroom and set(self.sealed) - set(held):
            frames = store.directory.num_frames[ids(set(self.sealed) - set(held))]
            least = max(int(frames.min()), store.ledger.worst_frames)
            assert least > store.ledger.host_free, "one more could have gone"
        elif moved:
            last = store.directory.num_frames[ids(gone)].max()
            before = store.ledger.frames_free - int(last)
            assert before // store.ledger.worst_frames < headroom, "more went than had to"

    @precondition(lambda self: self.on_host)
    @rule(data=st.data())
    def load_some_back(self, data: st.DataObject) -> None:
        pages = self._choose(data, self.on_host)
        if self.store.share(ids(pages)).frames > self.store.ledger.frames_free:
            with pytest.raises(RuntimeError, match="to load back"):
                load_back(self.store, ids(pages))
            return
        load_back(self.store, ids(pages))
        for page in pages:
            self.sealed[page] = self.on_host.pop(page)

    @precondition(lambda self: self.sealed and self.store.policy.can_demote)
    @rule(more=st.integers(1, 30))
    def demote(self, more: int) -> None:
        self.store.recency.step += 1
        goal = self.store.ledger.frame_headroom + more
        demote_cold(self.store, self.store.recency.step, goal)
        self._note(self.sealed, self.sealed)

    @precondition(lambda self: self.sealed or self.on_host)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        pages = self._choose(data, {**self.sealed, **self.on_host})
        self.kept += read_payload(self.store, ids(pages))

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def adopt_kept(self, data: st.DataObject) -> None:
        payload = data.draw(st.lists(st.sampled_from(self.kept), min_size=1, max_size=8))
        pages = sorted(self.free)[: len(payload)]
        assume(len(pages) == len(payload))
        if sum(int(page.counts.sum()) for page in payload) > self.store.ledger.host_free:
            with pytest.raises(RuntimeError, match="to adopt"):
                adopt(self.store, ids(pages), payload)
        else:
            adopt(self.store, ids(pages), payload)
            self.on_host.update(zip(pages, payload, strict=True))
            self.free -= set(pages)

    @precondition(lambda self: self.sealed or self.on_host)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        pages = self._choose(data, {**self.sealed, **self.on_host})
        self.store.release(ids(pages))
        for page in pages:
            self.sealed.pop(page, None)
            self.on_host.pop(page, None)
        self.free |= set(pages)

    @precondition(lambda self: self.on_host)
    @rule(data=st.data())
    def misuse(self, data: st.DataObject) -> None:
        away = ids([data.draw(st.sampled_from(sorted(self.on_host)))])
        store = self.store
        with pytest.raises(PageStateError):
            store.write_rows(away * PAGE_TOKENS)
        for change in (store.open, lambda x: seal(store, x), lambda x: offload(store, x)):
            with pytest.raises(PageStateError):
                change(away)
        if self.sealed:
            with pytest.raises(PageStateError):
                load_back(store, ids([data.draw(st.sampled_from(sorted(self.sealed)))]))

    @rule()
    def flush(self) -> None:
        self.store.clear()
        self.free |= {*self.sealed, *self.on_host}
        self.sealed.clear()
        self.on_host.clear()
        assert self.store.ledger.host_used == 0

    @invariant()
    def consistent(self) -> None:
        store, ledger = self.store, self.store.ledger
        assert check_integrity(store) == []
        assert (ledger.sealed_pages, ledger.host_pages) == (len(self.sealed), len(self.on_host))
        expected = {**self.sealed, **self.on_host}
        for was, now in zip(expected.values(), read_payload(store, ids(expected)), strict=True):
            assert_same(was, now)

    @invariant()
    def counted(self) -> None:
        stats = pool_stats(self.store)
        frame_bytes = self.store.layout.frame_bytes
        used = sum(int(page.counts.sum()) for page in self.on_host.values()) * frame_bytes
        assert stats["host"]["bytes_in_use"] == used <= stats["host"]["bytes_total"] <= HOST_BYTES
        assert stats["host"]["evicted"] >= 0


TestDiffXKVHost = walks(HostMachine, "diffxkv", examples=75, steps=25)
TestXKVHost = walks(HostMachine, "xkv", examples=75, steps=25)
TestDiffKVHost = walks(HostMachine, "diffkv", examples=75, steps=25)
TestLosslessHost = walks(HostMachine, "lossless", examples=75, steps=25)
TestStreamingHost = walks(HostMachine, "streaming", examples=75, steps=25)


def test_the_coldest_go_first() -> None:
    store = make_store("diffkv", host_bytes=HOST_BYTES)
    pages = torch.arange(1, 7)
    fill(store, pages)
    for page in (3, 1, 5):
        store.recency.step += 1
        store.recency.read(ids([page]))
    # Never read since: the last of a sequence before the first.
    coldest, calls = [6, 4, 2, 3, 1, 5], 0
    while store.ledger.sealed_pages:
        store.recency.step += 1
        calls += offload_cold(store, store.recency.step, store.ledger.frame_headroom + 1) > 0
        gone = on_host(store, pages)
        assert set(gone.tolist()) == set(coldest[: len(gone)])
    assert calls > 1


def test_what_the_host_costs_on_the_device_is_in_the_budget() -> None:
    for host_bytes in (1 << 20, 16 << 20, 64 << 20):
        store = make_store("diffxkv", 8 << 20, host_bytes=host_bytes)
        assert store.nbytes + 8 * store.sizes.virtual_pages <= 8 << 20
        assert store.nbytes > 0.85 * (8 << 20)
        assert store.sizes.host_frames == host_bytes // store.layout.frame_bytes
        alone = make_store("diffxkv", 8 << 20)
        assert store.sizes.expected_tokens <= alone.sizes.expected_tokens
        full = store.sizes.host_frames / store.sizes.expected_frames
        assert store.sizes.host_pages >= full, "page ids would run out first"


def test_pages_are_found_wherever_they_are() -> None:
    """Where a window has none, the next ones are searched, and the search goes on from there."""
    store = make_store("diffkv", host_bytes=HOST_BYTES)
    store.recency.sealed_hand = ClockHand(store.directory.num_pages, 2)
    pages = torch.tensor([50, 3, 60])
    fill(store, pages)
    store.recency.step += 1
    gone = []
    for _ in pages:
        offload_cold(store, store.recency.step, store.ledger.frame_headroom + 1)
        gone += [page for page in on_host(store, pages).tolist() if page not in gone]
    assert gone == [3, 50, 60]
    assert offload_cold(store, store.recency.step, store.ledger.frame_headroom + 1) == 0
