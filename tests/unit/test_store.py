# SPDX-License-Identifier: Apache-2.0
"""State-machine test of directory + arena + raw pages + ledger, with a plain-Python model."""

from itertools import product

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sglang_diffxkv.kernels.basis.rotation import rotate
from sglang_diffxkv.kernels.basis.sealed import to_sealed_keys
from sglang_diffxkv.kernels.layout import PAGE_TOKENS, head_counts
from sglang_diffxkv.kernels.pack import unpack
from sglang_diffxkv.kernels.pages import SealedTables
from sglang_diffxkv.metrics import pool_stats
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.policy.registry import POLICIES
from sglang_diffxkv.pool.demotion import demote_cold
from sglang_diffxkv.pool.integrity import check_integrity
from sglang_diffxkv.pool.reclaim import seal_cold
from sglang_diffxkv.pool.sealing import seal, seal_ready
from sglang_diffxkv.pool.sizing import DEMOTION_SLACK, VIRTUAL_SLACK
from sglang_diffxkv.pool.store import PageStateError, PageStore
from tests.support.builders import error_bound
from tests.support.machines import walks
from tests.support.pages import EVERY_SLOT, ask, write
from tests.support.stores import STORE, make_store

LAYERS, HEADS, DIM, _ = STORE
FP16_ERROR = 4e-4
"""Of scales and zeros, in shares of a row's range: a tenth of the finest step."""


def ids(pages: list[int]) -> torch.Tensor:
    return torch.tensor(sorted(pages), dtype=torch.int64)


class StoreMachine(RuleBasedStateMachine):
    """Opens, fills, seals, releases in any order; every step must leave the store consistent."""

    policy = "diffkv"

    def __init__(self) -> None:
        super().__init__()
        self.store = make_store(self.policy)
        self.free = set(range(1, self.store.sizes.virtual_pages + 1))
        self.open: set[int] = set()
        self.full: set[int] = set()
        """Those that may be sealed: of no lossless request."""
        self.lossless: set[int] = set()
        self.asked: set[int] = set()
        self.sealed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.contents: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.generator = torch.Generator().manual_seed(0)

    def _pick(self, data: st.DataObject, pages: set[int], most: int = 6) -> list[int]:
        return data.draw(st.lists(st.sampled_from(sorted(pages)), max_size=most, unique=True))

    @rule(data=st.data())
    def open_pages(self, data: st.DataObject) -> None:
        pages = self._pick(data, self.free)[: self.store.ledger.headroom]
        self.store.open(ids(pages))
        self.free -= set(pages)
        self.open |= set(pages)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), position=st.integers(0, 3))
    def fill_pages(self, data: st.DataObject, position: int) -> None:
        pages = self._pick(data, self.open)
        self.store.recency.step += 1
        for page in pages:
            slot = int(self.store.directory.raw_slot[page])
            written = torch.randn(2, LAYERS, PAGE_TOKENS, HEADS, DIM, generator=self.generator)
            for layer in range(LAYERS):
                self.store.raw.keys[layer][slot] = written[0, layer]
                self.store.raw.values[layer][slot] = written[1, layer]
            self.store.raw.scores[:, slot] = 4 * torch.rand(
                LAYERS, HEADS, PAGE_TOKENS, generator=self.generator
            )
            self.store.raw.counts[slot] = 8
            self.contents[page] = (written[0], written[1])
        where = torch.full((len(pages),), position)
        context = torch.full((len(pages),), (position + 1) * PAGE_TOKENS + 70)
        write(self.store, ids(pages), where, context)
        self.full |= set(pages) - self.lossless

    @precondition(lambda self: self.open - self.asked)
    @rule(data=st.data())
    def ask_for_quality(self, data: st.DataObject) -> None:
        pages = self._pick(data, self.open - self.asked)
        levels = [data.draw(st.sampled_from(Quality)) for _ in pages]
        self.lossless |= {
            page for page, level in zip(pages, levels, strict=True) if level is Quality.LOSSLESS
        }
        self.asked |= set(pages)
        self.full -= self.lossless
        ask(self.store, torch.tensor(pages, dtype=torch.int64), levels)

    @precondition(lambda self: self.full)
    @rule(data=st.data())
    def seal_pages(self, data: st.DataObject) -> None:
        pages = self._pick(data, self.full)
        numbers = st.lists(st.integers(0, 2), min_size=len(pages), max_size=len(pages))
        sequence = data.draw(st.none() | numbers.map(torch.LongTensor))
        seal(self.store, ids(pages), sequence)
        self._sealed(set(pages))

    @precondition(lambda self: self.full)
    @rule(data=st.data())
    def seal_ready_pages(self, data: st.DataObject) -> None:
        """Whatever stands where no page is ready is left as it is."""
        everything = set(range(self.store.sizes.virtual_pages + 1))
        others = [*self._pick(data, everything), 0, 0]
        pages = self._pick(data, self.full)
        ready = torch.tensor([True] * len(pages) + [False] * len(others))
        order = torch.tensor(data.draw(st.permutations(range(len(ready)))))
        seal_ready(self.store, torch.tensor(pages + others)[order], ready[order])
        self._sealed(set(pages))

    @rule(headroom=st.integers(1, 8), include_window=st.booleans())
    def seal_cold(self, headroom: int, include_window: bool) -> None:
        seal_cold(self.store, headroom, include_window)
        self._sealed({p for p in self.full if bool(self.store.directory.sealed[p])})
        if include_window and self.store.ledger.headroom < headroom:
            assert not self.full, "a full page could have been sealed"

    def _sealed(self, pages: set[int]) -> None:
        self.open -= pages
        self.full -= pages
        self.sealed.update({p: self.contents[p] for p in pages})

    @precondition(lambda self: self.sealed and self.store.policy.can_demote)
    @rule(data=st.data(), headroom=st.integers(1, 200))
    def demote_pages(self, data: st.DataObject, headroom: int) -> None:
        directory = self.store.directory
        held = self._pick(data, set(self.sealed), most=30)
        self.store.recency.step += 1
        self.store.recency.read(ids(held))
        demotions, frames = directory.demotions.clone(), directory.num_frames.clone()
        demote_cold(self.store, self.store.recency.step, headroom)
        changed = set(torch.nonzero(directory.demotions != demotions).flatten().tolist())
        unheld = set(self.sealed) - set(held)
        assert len(changed) <= len(unheld) // 2 and changed <= unheld
        assert bool((directory.num_frames <= frames).all())

    @precondition(lambda self: self.open or self.sealed)
    @rule(data=st.data())
    def release_pages(self, data: st.DataObject) -> None:
        pages = self._pick(data, self.open | set(self.sealed))
        self.store.release(ids(pages))
        for page in pages:
            self.open.discard(page)
            self.full.discard(page)
            self.lossless.discard(page)
            self.asked.discard(page)
            self.sealed.pop(page, None)
            self.free.add(page)

    @rule(data=st.data())
    def misuse(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.free)))
        with pytest.raises(PageStateError):
            self.store.release(ids([page]))
        with pytest.raises(PageStateError):
            seal(self.store, ids([page]))
        with pytest.raises(PageStateError):
            self.store.write_rows(torch.tensor([page * PAGE_TOKENS + 3]))
        for unknown in (0, self.store.sizes.virtual_pages + 1):
            with pytest.raises(PageStateError):
                self.store.open(ids([unknown]))
        if self.lossless:
            lossless = data.draw(st.sampled_from(sorted(self.lossless)))
            with pytest.raises(PageStateError):
                seal(self.store, ids([lossless]))
        if self.sealed:
            sealed = data.draw(st.sampled_from(sorted(self.sealed)))
            with pytest.raises(PageStateError):
                self.store.write_rows(torch.tensor([sealed * PAGE_TOKENS]))
            with pytest.raises(PageStateError):
                self.store.open(ids([sealed]))
            with pytest.raises(PageStateError):
                self.store.release(ids([sealed, sealed]))

    @rule()
    def flush(self) -> None:
        self.store.clear()
        self.free |= self.open | set(self.sealed)
        self.open.clear()
        self.full.clear()
        self.lossless.clear()
        self.asked.clear()
        self.sealed.clear()

    @invariant()
    def sealable_pages_are_counted(self) -> None:
        found = self.store.recency.sealable(EVERY_SLOT, include_window=True).tolist()
        assert set(found) == self.full and self.store.ledger.full_pages == len(self.full)

    @invariant()
    def consistent(self) -> None:
        assert check_integrity(self.store) == []
        ledger = self.store.ledger
        assert (ledger.open_pages, ledger.sealed_pages) == (len(self.open), len(self.sealed))
        assert ledger.never_compressed == len(self.lossless)
        assert self.lossless <= self.open, "a lossless page was sealed"

    def teardown(self) -> None:
        for page, contents in self.sealed.items():
            check_payload(self.store, page, contents)


def check_payload(store: PageStore, page: int, contents: tuple[torch.Tensor, torch.Tensor]) -> None:
    """What is read back from a sealed page is what was written, up to its tiers' steps."""
    layout, directory = store.layout, store.directory
    demoted = bool(directory.demotions[page])
    for layer, written in enumerate(zip(*contents, strict=True)):
        frames, heads = directory.frames[layer], directory.heads[layer]
        tables = SealedTables(store.arena.buffer, frames, heads, layout)
        got = unpack(tables, torch.tensor([page]), torch.float32, torch.float32)
        keys, values = written
        if layout.rotates:
            keys = to_sealed_keys(keys, store.key_means.by_layer[layer])
            values = rotate(values)
        n_high, _ = head_counts(heads[page])
        for head in range(HEADS):
            kept = got.kept[0, head]
            position = got.position[0, head][kept].long()
            assert torch.unique(position).numel() == position.numel()
            assert store.policy.name != "lossless" or position.numel() == PAGE_TOKENS
            is_high = torch.arange(PAGE_TOKENS)[kept] < n_high[head]
            for read, sealed, bits in (
                (got.k, keys, (layout.high.key_bits, layout.low.key_bits)),
                (got.v, values, (layout.high.value_bits, layout.low.value_bits)),
            ):
                rows, expected = read[0, head][kept], sealed[position, head]
                high, low = (error_bound(x) + FP16_ERROR * (x > 0) for x in bits)
                most = torch.where(is_high, high, low + high * demoted)[:, None]
                spread = expected.amax(1, keepdim=True) - expected.amin(1, keepdim=True)
                assert bool(((rows - expected).abs() <= most * spread).all())


TestDiffXKVStore = walks(StoreMachine, "diffxkv", examples=100, steps=30)
TestXKVStore = walks(StoreMachine, "xkv", examples=100, steps=30)
TestDiffKVStore = walks(StoreMachine, "diffkv", examples=100, steps=30)
TestLosslessStore = walks(StoreMachine, "lossless", examples=100, steps=30)
TestStreamingStore = walks(StoreMachine, "streaming", examples=100, steps=30)
TestSnapKVStore = walks(StoreMachine, "snapkv", examples=100, steps=30)


def test_plan_stays_within_the_budget() -> None:
    for policy, budget in product(POLICIES, (5 << 20, 17 << 20)):
        slack = DEMOTION_SLACK if POLICIES[policy].can_demote else VIRTUAL_SLACK
        store = make_store(policy, budget, slack)
        assert store.nbytes + 8 * store.sizes.virtual_pages <= budget
        assert store.nbytes > 0.85 * budget


def test_too_little_memory_is_refused_with_what_is_needed() -> None:
    with pytest.raises(ValueError, match="raise memory_bytes") as refusal:
        make_store("diffkv", 1 << 20)
    needed = float(str(refusal.value).rsplit("at least ", 1)[1].split()[0])
    make_store("diffkv", int(needed * 2**20) + 1)


def test_ledger_refuses_more_than_it_can_reserve() -> None:
    store = make_store("lossless")
    too_many = store.ledger.headroom + 1
    with pytest.raises(RuntimeError, match="can be opened"):
        store.open(torch.arange(1, too_many + 1))
    assert check_integrity(store) == []


def test_cold_pages_go_before_recent_ones() -> None:
    store = make_store("diffkv")
    store.open(torch.arange(1, 4))
    # sequence of 192 tokens: page 2 (the last) lies in the window of 64
    pages, position = torch.arange(1, 4), torch.arange(3)
    write(store, pages, position, torch.full((3,), 192))
    assert sorted(store.recency.sealable(EVERY_SLOT, include_window=False).tolist()) == [1, 2]
    store.recency.step += 1
    write(store, torch.tensor([1]), torch.tensor([0]), torch.tensor([192]))
    assert store.recency.sealable(EVERY_SLOT, include_window=False).tolist() == [2, 1]
    assert store.recency.sealable(EVERY_SLOT, include_window=True).tolist()[-1] == 1


def test_pages_keep_their_quality() -> None:
    store = make_store("diffkv")
    pages = torch.arange(1, 7)
    store.open(pages)
    write(store, pages, torch.arange(6), torch.full((6,), 6 * PAGE_TOKENS), window=0)
    asked = [Quality.HIGH, Quality.SMALL, Quality.SMALL, Quality.LOSSLESS, Quality.LOSSLESS]
    ask(store, pages[:5], asked)
    assert sorted(store.recency.sealable(EVERY_SLOT, include_window=True).tolist()) == [1, 2, 3, 6]
    seal(store, torch.tensor([1, 2, 6]))
    assert pool_stats(store)["pages_by_quality"] == {
        "balanced": 1,
        "lossless": 2,
        "high": 1,
        "small": 2,
    }
    assert check_integrity(store) == []
    store.release(torch.tensor([4, 1]))
    assert pool_stats(store)["pages_by_quality"] == {
        "balanced": 1,
        "lossless": 1,
        "high": 0,
        "small": 2,
    }
    store.open(torch.tensor([4, 1]))  # as a fresh page, whoever had it before
    assert pool_stats(store)["pages_by_quality"] == {
        "balanced": 3,
        "lossless": 1,
        "high": 0,
        "small": 2,
    }


def test_lossless_pages_release_reserved_frames() -> None:
    store = make_store("diffkv")
    free = store.ledger.frames_free
    pages = torch.arange(1, 4)
    store.open(pages)
    ask(store, pages, [Quality.LOSSLESS] * 3)
    assert store.ledger.frames_free == free
    store.release(pages)
    assert store.ledger.frames_free == free and store.ledger.never_compressed == 0
