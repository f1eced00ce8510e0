# SPDX-License-Identifier: Apache-2.0
"""What demotion leaves alone, whatever came before, and what the statistics say that it took."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sglang_diffxkv.kernels.layout import HIGH, PAGE_TOKENS, PRUNED, decode_importance
from sglang_diffxkv.metrics import pool_stats
from sglang_diffxkv.policy.budgeting.target import low_utility
from sglang_diffxkv.policy.demotion import MAX_DEMOTIONS
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.demotion import GradedTokens, demote, demote_cold
from sglang_diffxkv.pool.integrity import check_integrity
from sglang_diffxkv.pool.sealing import seal
from tests.support.demotion import fill, sealed_store, tokens_of
from tests.support.machines import walks
from tests.support.pages import ask, write
from tests.support.stores import STORE, make_store

SINK = 4
NEVER = 10**6
"""Pages that no pool has room for: so all that may be demoted is."""


class Sealed(NamedTuple):
    """A page as it was sealed: `tokens` by layer, each of one page."""

    quality: Quality
    tokens: list[GradedTokens]


class DemotionMachine(RuleBasedStateMachine):
    """Sequences are sealed, read, demoted and freed in any order."""

    policy = "diffxkv"

    def __init__(self) -> None:
        super().__init__()
        self.high_layers = (1,) if self.policy == "diffxkv" else ()
        config = {"high_layers": self.high_layers} if self.high_layers else {}
        self.store = make_store(self.policy, 24 << 20, **config)
        self.sealed: dict[int, Sealed] = {}

    @rule(
        pages=st.integers(1, 6),
        quality=st.sampled_from([Quality.BALANCED, Quality.HIGH]),
        unscored=st.integers(0, PAGE_TOKENS),
    )
    def seal(self, pages: int, quality: Quality, unscored: int) -> None:
        store = self.store
        free = torch.arange(1, 65)[~store.directory.sealed[1:65]][:pages]
        fill(store, free)
        store.raw.counts[store.directory.raw_slot[free].long(), :unscored] = 0
        ask(store, free, [quality] * len(free))
        position = torch.arange(len(free))
        write(store, free, position, torch.full((len(free),), len(free) * PAGE_TOKENS + 64))
        seal(store, free, torch.zeros_like(free))
        for page in free.tolist():
            self.sealed[page] = Sealed(quality, tokens_of(store, torch.tensor([page])))

    @rule(headroom=st.sampled_from([1, 2, NEVER]), held_for=st.integers(0, 2))
    def demote(self, headroom: int, held_for: int) -> None:
        store = self.store
        demote_cold(
            store, store.recency.step + 1 - held_for, store.ledger.frame_headroom + headroom
        )

    @precondition(lambda self: self.sealed)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        self.store.recency.read(torch.tensor(data.draw(self._some())))

    @precondition(lambda self: self.sealed)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        pages = data.draw(self._some())
        self.store.release(torch.tensor(pages))
        for page in pages:
            del self.sealed[page]

    @rule()
    def step(self) -> None:
        self.store.begin_step(decodes=True)

    def _some(self) -> st.SearchStrategy[list[int]]:
        pages = st.sampled_from(sorted(self.sealed))
        return st.lists(pages, min_size=1, max_size=4, unique=True)

    @invariant()
    def what_is_protected_is_whole(self) -> None:
        """Bit for bit: sinks, high layers, pages of who asked for high quality; none unscored is
        pruned."""
        pages = torch.tensor(list(self.sealed), dtype=torch.int64)
        number = self.store.directory.position[pages][:, None] * PAGE_TOKENS
        sinks = number + torch.arange(PAGE_TOKENS) < SINK
        asked = torch.tensor([x.quality == Quality.HIGH for x in self.sealed.values()])
        for layer, new in enumerate(tokens_of(self.store, pages) if self.sealed else ()):
            parts = [x.tokens[layer] for x in self.sealed.values()]
            old = GradedTokens(*(torch.cat(field) for field in zip(*parts, strict=True)))
            whole = sinks | asked[:, None] | (layer in self.high_layers)
            by_head = whole[:, None].expand_as(new.tiers)
            assert torch.equal(new.tiers[by_head], old.tiers[by_head])
            assert torch.equal(new.codes[by_head], old.codes[by_head])
            assert torch.equal(new.keys[whole], old.keys[whole])
            assert torch.equal(new.values[whole], old.values[whole])
            if layer in self.high_layers:
                assert bool((new.tiers == HIGH).all())
            assert bool((new.tiers <= old.tiers).all())
            unscored = (old.tiers != PRUNED) & (old.codes == 0)
            assert bool((new.tiers[unscored] != PRUNED).all())

    def teardown(self) -> None:
        assert check_integrity(self.store) == []


TestDiffXKV = walks(DemotionMachine, "diffxkv", examples=20, steps=25)
TestDiffKV = walks(DemotionMachine, "diffkv", examples=20, steps=25)


def test_a_prefix_that_came_back_keeps_what_is_left_of_it() -> None:
    """Demoted, then read by a request: it is left alone while others have not been read since."""
    store, _, _ = sealed_store(12)
    cold, never = store.recency.step, 10**6
    demote_cold(store, cold, store.ledger.frame_headroom + 1)
    back = store.directory.demotions.nonzero().flatten()[:3]
    assert len(back) == 3
    store.begin_step(decodes=True)
    store.recency.read(back)
    store.begin_step(decodes=True)  # whose request has ended: nobody holds them
    frames = store.directory.frames[:, back].clone()
    for _ in range(4):
        demote_cold(store, store.recency.step, never)
    assert store.directory.demotions[back].tolist() == [1, 1, 1]
    assert torch.equal(store.directory.frames[:, back], frames)
    others = store.directory.demotions[1:13].tolist()
    assert others.count(MAX_DEMOTIONS) == 6, "the colder half is at its floor"
    store.begin_step(decodes=True)
    store.recency.read(torch.tensor([p for p in range(1, 13) if p not in back]))
    store.begin_step(decodes=True)
    demote_cold(store, store.recency.step, never)
    assert store.directory.demotions[back].tolist() == [2, 2, 2], "now they are the coldest"


def test_a_large_prefix_that_came_back_is_compared_with_pages_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It fills the window that the search begins in, whose colder half is warm beside others."""
    monkeypatch.setattr("sglang_diffxkv.pool.recency.SEALED_WINDOW", 4)
    store, _, _ = sealed_store(16)
    back = torch.arange(1, 5)
    demote(store, back)
    store.begin_step(decodes=True)
    store.recency.read(back)
    store.begin_step(decodes=True)
    demote_cold(store, store.recency.step, headroom=10**6)
    assert store.directory.demotions[back].tolist() == [1] * 4
    assert store.directory.demotions[1:17].tolist().count(MAX_DEMOTIONS) == 8


def test_statistics_tell_what_demotion_took() -> None:
    """By layer, against tokens themselves; sinks and unscored ones count nothing."""
    store, pages, _ = sealed_store(9)
    unscored = torch.arange(20, 23)
    fill(store, unscored)
    store.raw.counts.fill_(0)
    write(store, unscored, torch.arange(3), torch.full((3,), 300))
    seal(store, unscored)
    pages, meter = torch.cat([pages, unscored]), store.retention
    assert meter is not None and meter.demoted_by_layer() == [0.0] * STORE.layers
    context = store.directory.context[pages][:, None, None]
    number = store.directory.position[pages][:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)
    low = low_utility(store.layout.high, store.layout.low, False)
    worth = torch.tensor([0, low, 1], dtype=torch.float64)
    sealed, before = meter.by_layer(), tokens_of(store, pages)

    def weights(codes: torch.Tensor) -> torch.Tensor:
        counted = (codes > 0) & (number >= SINK)[:, None]
        return decode_importance(codes).double() * context * counted

    for _ in range(MAX_DEMOTIONS):
        demote(store, pages)
        found = zip(before, tokens_of(store, pages), meter.demoted_by_layer(), strict=True)
        for layer, (old, new, taken) in enumerate(found):
            weight = weights(old.codes)
            kept, left = ((weight * worth[x.tiers.long()]).sum() for x in (old, new))
            assert taken is not None and taken > 0
            assert taken == pytest.approx(sealed[layer] * float((kept - left) / kept), rel=0.02)
    assert meter.by_layer() == sealed
    assert pool_stats(store)["retention_demoted_by_layer"] == meter.demoted_by_layer()
