# SPDX-License-Identifier: Apache-2.0
"""The pages of a batch, and what is counted and sealed after it, against plain loops."""

import pytest
import torch

from sglang_diffxkv.attention.ready_pages import pages_to_seal, ready_pages
from sglang_diffxkv.attention.scoring import (
    NewTokens,
    ScoringSample,
    count_scores,
    extend_queries,
)
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.policy.scoring import Sampler, last_queries, sample_queries
from sglang_diffxkv.pool.committed import note_quality
from sglang_diffxkv.pool.running import RunningRequests
from sglang_diffxkv.pool.sealing import seal, seal_ready
from sglang_diffxkv.pool.store import PageStateError
from tests.support.batches import Batch
from tests.support.pages import EVERY_SLOT, running


def test_gather_lists_every_page_once_per_sequence() -> None:
    b = Batch([130, 64, 1, 400], sealed=[1, 0, 0, 3])
    got = b.gather()
    for i, own in enumerate(b.pages):
        n = [1, 0, 0, 3][i]
        begin, end = got.sealed.indptr[i], got.sealed.indptr[i + 1]
        assert got.sealed.pages[begin:end].tolist() == own[:n]
        begin, end = got.opened.indptr[i], got.opened.indptr[i + 1]
        assert got.pages[begin:end].tolist() == own[n:]
        assert got.opened.position[begin:end].tolist() == list(range(n, len(own)))
        slots = b.store.directory.raw_slot[own[n:]].tolist()
        assert got.opened.slots[begin:end].tolist() == slots
    assert got.last_len.tolist() == [2, 64, 1, 16]
    assert got.any_sealed


def test_gather_refuses_a_free_page() -> None:
    b = Batch([130], sealed=[0])
    b.store.release(torch.tensor(b.pages[0][:1]))
    with pytest.raises(PageStateError, match="free page"):
        b.gather()


@pytest.mark.parametrize("most", [16, 1000])
@pytest.mark.parametrize("sampler", [None, sample_queries, last_queries])
def test_counts_are_of_later_queries(sampler: Sampler | None, most: int) -> None:
    """Queries of a decode step where there is no sampler."""
    b = Batch([130, 64, 300], sealed=[0, 0, 2], shared=1)
    prefix = b.lens - 1 if sampler is None else torch.tensor([70, 0, 128])
    extend = (b.lens - prefix).tolist()
    if sampler is None:
        queries = ScoringSample.at(None, torch.arange(4, dtype=torch.int32), b.lens - 1)
    else:
        lens = torch.tensor(extend)
        indptr = torch.nn.functional.pad(lens.cumsum(0), (1, 0)).int()
        spans = zip(prefix.tolist(), b.lens.tolist(), strict=True)
        new = torch.cat([torch.arange(start, end) for start, end in spans])
        queries = extend_queries(NewTokens(indptr, new, prefix, extend), most, sampler)
    positions = [
        queries.position[queries.indptr[i] : queries.indptr[i + 1]].tolist() for i in range(3)
    ]
    for i, asked in enumerate(positions):
        assert asked[-1] == b.lens[i] - 1 and min(asked) >= prefix[i]
        assert len(asked) == min(most, extend[i])
    batch = b.gather()
    count_scores(b.store, batch, queries)
    expected = torch.zeros_like(b.store.raw.counts)
    for i, own in enumerate(b.pages):
        for place, page in enumerate(own):
            slot = int(b.store.directory.raw_slot[page])
            for token in range(PAGE_TOKENS if slot >= 0 else 0):
                number = place * PAGE_TOKENS + token
                expected[slot, token] += sum(position > number for position in positions[i])
    assert torch.equal(b.store.raw.counts, expected)


def test_pages_seal_when_scored_and_out_of_the_window() -> None:
    b = Batch([700, 130], sealed=[2, 0])
    b.touch(decodes=False)
    batch = b.gather()
    first, second = b.pages
    # written by this very step: not scored by a following one yet
    assert pages_to_seal(b.store, batch, torch.tensor([128, 0])).pages.tolist() == []
    # a second chunk from 384 on: what was there before it, less what was sealed
    assert pages_to_seal(b.store, batch, torch.tensor([384, 0])).pages.tolist() == first[2:6]
    # all scored: up to the window, which reaches back from 700 to 636 and from 130 to 66
    sealable = pages_to_seal(b.store, batch, b.lens)
    assert sealable.pages.tolist() == sorted(first[2:9] + second[:1])
    assert sealable.sequence.tolist() == [0] * 7 + [1]


@pytest.mark.parametrize("due", [1, 8, 9, 30])
def test_ready_pages_are_the_first_that_may_be_sealed(due: int) -> None:
    """A page that two sequences share comes once."""
    b = Batch([800, 700, 600, 30], sealed=[2, 0, 1, 0], shared=3)
    b.touch(decodes=True)
    scored = b.lens - 1
    listed = pages_to_seal(b.store, b.gather(), scored).pages.tolist()
    pages, ready = ready_pages(b.store, b.table, scored, due)
    assert len(pages) == len(ready) == due
    found = pages[ready].tolist()
    assert len(set(found)) == len(found) and set(found) <= set(listed) and len(listed) > 8
    assert due < 30 or set(found) == set(listed)
    before = b.store.ledger.sealed_pages
    seal_ready(b.store, pages, ready)
    assert bool(b.store.directory.sealed[found].all())
    assert b.store.ledger.sealed_pages == before + len(found)


def test_pages_of_lossless_sequences_never_seal() -> None:
    b = Batch([700, 130, 300], sealed=[0, 0, 0])
    b.touch(decodes=False)
    batch = b.gather()
    requests = RunningRequests()
    asked = [Quality.SMALL, Quality.BALANCED, Quality.LOSSLESS]
    requests.enter(b.rows.tolist(), [running(level, step=0) for level in asked])
    before = torch.tensor([0, 0, 100])  # 2 pages of the last one were opened before
    committed = requests.commit(b.rows.tolist(), before, b.lens)
    asked = committed.asked
    assert asked is not None and asked.lossless_full == 3
    assert list(asked.quality) == [Quality.SMALL] * 11 + [Quality.LOSSLESS] * 3
    note_quality(b.store, asked, b.req_to_token)
    first, second, third = b.pages
    quality = b.store.directory.quality
    assert set(quality[first].tolist()) == {Quality.SMALL}
    assert quality[third].tolist() == [Quality.BALANCED] * 2 + [Quality.LOSSLESS] * 3
    third = third[2:]
    sealable = pages_to_seal(b.store, batch, b.lens).pages.tolist()
    assert set(third).isdisjoint(sealable) and set(first[:9] + second[:1]) < set(sealable)
    assert not set(third) & set(b.store.recency.sealable(EVERY_SLOT, include_window=True).tolist())
    assert [s.length for s in requests.lossless] == [300]
    requests.leave(b.rows.tolist())
    assert not requests.lossless
    assert requests.commit(b.rows.tolist(), before, b.lens).asked is None


def test_every_page_of_a_batch_counts_as_used() -> None:
    """Sealed ones, too: what is read in a step is not cold."""
    b = Batch([700, 130, 300], sealed=[9, 1, 2])
    b.store.recency.step = 40
    b.touch(decodes=True)
    used = b.store.directory.last_used
    held = torch.tensor([page for own in b.pages for page in own])
    assert (used[held] == 41).all()
    assert used.sum() == 41 * held.numel()


def test_shared_page_waits_for_every_window() -> None:
    """Page 1 of the short sequence is recent for it, though not for the long one."""
    b = Batch([700, 140], sealed=[0, 0], shared=2)
    b.touch(decodes=True)
    batch = b.gather()
    assert b.pages[0][1] not in pages_to_seal(b.store, batch, b.lens).pages.tolist()
    b.store.begin_step(decodes=True)  # the short one has finished, the long one goes on
    assert b.pages[0][1] in b.store.recency.sealable(EVERY_SLOT, include_window=False).tolist()


def test_shared_page_is_sealed_once_with_the_first_sequence_that_may() -> None:
    b = Batch([400, 300, 500], sealed=[0, 0, 0], shared=3)
    b.touch(decodes=False)
    batch = b.gather()
    first, second, third = b.pages
    pages, sequence = pages_to_seal(b.store, batch, b.lens)
    owners = (
        dict.fromkeys(third[:6], 2) | dict.fromkeys(second[:3], 1) | dict.fromkeys(first[:5], 0)
    )
    assert dict(zip(pages.tolist(), sequence.tolist(), strict=True)) == owners
    assert len(pages) == len(owners)
    seal(b.store, pages, sequence)
    assert bool(b.store.directory.sealed[pages].all())
    # for the first sequence, they were written by this very step
    b = Batch([400, 300, 500], sealed=[0, 0, 0], shared=3)
    b.touch(decodes=False)
    assert pages_to_seal(b.store, b.gather(), torch.tensor([64, 192, 0])).sequence.tolist() == [
        0,
        1,
        1,
    ]
