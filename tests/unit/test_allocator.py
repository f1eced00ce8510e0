# SPDX-License-Identifier: Apache-2.0
"""SGLang's allocator interface over the page store, randomised, with a small prefix cache."""

import pytest
import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.reclaim import seal_cold
from sglang_diffxkv.pool.store import PageStateError
from tests.support.drafting import DraftingMachine
from tests.support.machines import AllocatorMachine, lens, walks
from tests.support.pages import ask, running, write
from tests.support.stores import PrefixCache, make_allocator

TestDiffXKVAllocator = walks(AllocatorMachine, "diffxkv", examples=100, steps=40)
TestDiffKVAllocator = walks(AllocatorMachine, "diffkv", examples=100, steps=40)
TestLosslessAllocator = walks(AllocatorMachine, "lossless", examples=100, steps=40)
TestUniformAllocator = walks(AllocatorMachine, "uniform", examples=100, steps=40)
TestSnapKVAllocator = walks(AllocatorMachine, "snapkv", examples=100, steps=40)
TestDraftingDiffXKV = walks(DraftingMachine, "diffxkv", examples=40, steps=30)
TestDraftingUniform = walks(DraftingMachine, "uniform", examples=40, steps=30)
TestDraftingLossless = walks(DraftingMachine, "lossless", examples=40, steps=30)


def cached_sequence(cache: PrefixCache, pages: int, quality: Quality) -> None:
    """A sequence that ran and ended."""
    allocator = cache.allocator
    slots = allocator.alloc(pages * PAGE_TOKENS)
    assert slots is not None
    ids, context = slots[::PAGE_TOKENS] // PAGE_TOKENS, torch.full((pages,), len(slots))
    allocator.store.begin_step(decodes=True)
    write(allocator.store, ids, torch.arange(pages), context)
    if quality is not Quality.BALANCED:
        ask(allocator.store, ids, [quality] * pages)
    cache.sequences.append(slots)


def test_lossless_prefixes_are_evicted_for_raw_pages() -> None:
    allocator = make_allocator()
    cache, ledger = PrefixCache(allocator), allocator.store.ledger
    raw = ledger.raw_total
    cached_sequence(cache, 2, Quality.LOSSLESS)
    cached_sequence(cache, 2, Quality.BALANCED)
    cached_sequence(cache, raw - 6, Quality.LOSSLESS)
    cached_sequence(cache, 1, Quality.BALANCED)
    assert (ledger.raw_free, ledger.never_compressed) == (1, raw - 4)
    assert allocator.reclaimer.reclaim(cache, 4 * PAGE_TOKENS)
    assert len(cache.sequences) == 4, "sealing the balanced ones was enough"
    assert ledger.raw_free == 4
    assert allocator.reclaimer.reclaim(cache, 5 * PAGE_TOKENS)
    assert [len(s) // PAGE_TOKENS for s in cache.sequences] == [2, raw - 6, 1]
    assert ledger.raw_free == 6
    assert allocator.reclaimer.reclaim(cache, 7 * PAGE_TOKENS)
    # the oldest goes first, sealed as it is; what is younger than the last lossless one stays
    assert [len(s) // PAGE_TOKENS for s in cache.sequences] == [1]
    assert ledger.raw_free == raw and ledger.never_compressed == 0


def test_held_lossless_pages_cost_no_prefix() -> None:
    """What is held comes free by no eviction, so nothing is evicted in vain."""
    allocator = make_allocator()
    cache, ledger = PrefixCache(allocator), allocator.store.ledger
    cached_sequence(cache, 3, Quality.BALANCED)
    cached_sequence(cache, ledger.raw_total - 3, Quality.LOSSLESS)
    held = len(cache.sequences.pop())  # by somebody who runs
    allocator.running.enter([2], [running(Quality.LOSSLESS, allocator.store.recency.step)])
    allocator.running.commit([2], torch.tensor([0]), torch.tensor([held]))
    assert not allocator.reclaimer.reclaim(cache, 4 * PAGE_TOKENS)
    assert [len(s) // PAGE_TOKENS for s in cache.sequences] == [3]
    assert allocator.capacity.usage(cache) == pytest.approx(1 - 3 / ledger.raw_total)
    assert allocator.reclaimer.reclaim(cache, 3 * PAGE_TOKENS)


def test_pressure_is_met_once_for_many_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raw pages run out: sealing makes room beyond the page that is asked for; so does eviction."""
    monkeypatch.setattr("sglang_diffxkv.pool.reclaim.SEALED_SPARE", 1 / 4)
    allocator = make_allocator("uniform", mib=6)
    cache, store = PrefixCache(allocator), allocator.store
    raw = store.ledger.raw_total
    cached_sequence(cache, raw, Quality.BALANCED)
    store.begin_step(decodes=True)  # so that its window is nobody's
    assert store.ledger.raw_free == 0 and allocator.reclaimer.reclaim(cache, PAGE_TOKENS)
    assert store.ledger.raw_free == 1 + raw // 4 and store.counters.evicted == 0
    monkeypatch.setattr("sglang_diffxkv.pool.reclaim.RECLAIMED_SPARE", 1 / 8)
    while store.ledger.frame_headroom > 0:
        cached_sequence(cache, 1, Quality.BALANCED)
        store.begin_step(decodes=True)
        seal_cold(store, store.ledger.raw_total, include_window=True)
    cache.sequences = [page for slots in cache.sequences for page in slots.split(PAGE_TOKENS)]
    assert allocator.reclaimer.reclaim(cache, PAGE_TOKENS)
    assert store.ledger.frame_headroom >= 1 + store.ledger.largest_sequence // 8
    reclaims = store.counters.reclaims
    for _ in range(store.ledger.largest_sequence // 8):
        assert allocator.reclaimer.reclaim(cache, PAGE_TOKENS)
        assert allocator.alloc(PAGE_TOKENS) is not None
    assert store.counters.reclaims == reclaims, "there was room"


def test_nobody_holds_what_the_last_step_used() -> None:
    """Where nobody runs no step follows: a prompt must not wait for one."""
    allocator = make_allocator()
    cache, raw = PrefixCache(allocator), allocator.store.ledger.raw_total
    cached_sequence(cache, raw - 1, Quality.LOSSLESS)
    # nor where the only one who runs is a prompt between two chunks, whose pages stay
    own = allocator.alloc(PAGE_TOKENS)
    assert own is not None
    write(allocator.store, own[:1] // PAGE_TOKENS, torch.tensor([0]), torch.tensor([PAGE_TOKENS]))
    ask(allocator.store, own[:1] // PAGE_TOKENS, [Quality.LOSSLESS])
    allocator.running.enter([2], [running(Quality.LOSSLESS, allocator.store.recency.step)])
    allocator.store.recency.expect(own[:1] // PAGE_TOKENS)
    allocator.running.stay(2, allocator.store.recency.next_step)
    assert allocator.reclaimer.reclaim(cache, 3 * PAGE_TOKENS)
    assert not cache.sequences and allocator.store.ledger.never_compressed == 1
    assert not allocator.reclaimer.reclaim(cache, raw * PAGE_TOKENS)


def test_double_free_raises() -> None:
    allocator = make_allocator()
    slots = allocator.alloc(2 * PAGE_TOKENS)
    assert slots is not None
    allocator.free(slots)
    with pytest.raises(PageStateError, match="already free"):
        allocator.free(slots)


def test_reading_by_slot_raises() -> None:
    pool = make_allocator().get_kvcache()
    with pytest.raises(RuntimeError, match="only be read through the diffxkv backend"):
        pool.get_key_buffer(0)


@pytest.mark.parametrize("policy", ["diffkv", "lossless", "snapkv"])
def test_longest_request_is_admitted_alone(policy: str) -> None:
    """What `max_new_tokens_for_memory` lets in goes all the way, chunk by chunk, at its worst."""
    allocator = make_allocator(policy)
    cache = PrefixCache(allocator)
    capacity = allocator.store.ledger.largest_sequence * PAGE_TOKENS
    tokens = capacity - 2 * PAGE_TOKENS
    clip = {"token_capacity": allocator.size, "sliding_window_size": None, "chunk_size": 512}
    assert allocator.max_new_tokens_for_memory(tokens, 10**6, **clip) == PAGE_TOKENS - 1
    assert allocator.max_new_tokens_for_memory(capacity, 1, **clip) == 0
    assert allocator.capacity.longest_prompt == tokens
    done, last = 0, lens(-1)
    while done < tokens:
        budget = allocator.create_prefill_budget(cache)
        chunk = budget.available_chunk_tokens(512) if done else 512
        assert chunk, "a request alone in the pool must go on"
        if not done:
            fits, chunk = budget.check_prefill(
                extend_input_len=tokens,
                total_tokens=tokens + PAGE_TOKENS,
                max_new_tokens=0,
                input_tokens=tokens,
                swa_host_hit_length=0,
                chunk_limit=512,
            )
            assert fits and chunk
        end = min(tokens, done + chunk)
        out = allocator.alloc_extend(lens(done), lens(done), lens(end), lens(end), last, end - done)
        assert out is not None
        pages = torch.unique(out // PAGE_TOKENS)
        allocator.store.begin_step(decodes=False)
        position = torch.arange(done // PAGE_TOKENS, -(-end // PAGE_TOKENS))
        write(allocator.store, pages, position, torch.full((len(pages),), end))
        done, last = end, out[-1:]
        assert allocator.check() == []
