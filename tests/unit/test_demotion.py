# SPDX-License-Identifier: Apache-2.0
"""Demotion: which pages, which tokens, what is left of their values, and what it frees."""

import random
from types import SimpleNamespace

import pytest
import torch

from sglang_diffxkv.config import Tiers
from sglang_diffxkv.kernels.basis.rotation import rotate
from sglang_diffxkv.kernels.basis.sealed import to_sealed_keys
from sglang_diffxkv.kernels.layout import HIGH, LOW, PAGE_TOKENS, PRUNED
from sglang_diffxkv.policy.demotion import MAX_DEMOTIONS, DemotionContext
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.allocator import DiffXKVAllocator
from sglang_diffxkv.pool.demotion import (
    cold_pages,
    demote,
    demote_cold,
)
from sglang_diffxkv.pool.integrity import check_integrity
from sglang_diffxkv.pool.sealing import seal
from tests.support.builders import error_bound
from tests.support.demotion import fill, sealed_store, tokens_of
from tests.support.machines import AllocatorMachine, lens
from tests.support.pages import write
from tests.support.stores import STORE, PrefixCache, make_allocator, make_store

SINK = 4


def random_context(demotions: int, gen: torch.Generator) -> DemotionContext:
    shape = (5, 3, PAGE_TOKENS)
    importance = torch.rand(shape, generator=gen) ** 4
    return DemotionContext(
        layer=1,
        tiers=torch.randint(3, shape, generator=gen, dtype=torch.uint8),
        importance=importance.masked_fill(importance < 1e-4, 0),
        position=torch.tensor([3, 0, 1, 0, 7]),
        demotions=torch.full((5,), demotions),
    )


@pytest.mark.parametrize("demotions", range(MAX_DEMOTIONS))
def test_tiers_of_the_policy(demotions: int) -> None:
    """Against a plain loop: high goes low, then low loses its tail; sinks and unscored stay."""
    ctx = random_context(demotions, torch.Generator().manual_seed(demotions))
    got = make_store("diffkv").policy.demote(ctx)
    for page, position in enumerate(ctx.position.tolist()):
        expected, prunable = ctx.tiers[page].clone(), []
        for head in range(3):
            for token in range(PAGE_TOKENS):
                if position * PAGE_TOKENS + token < SINK or expected[head, token] == PRUNED:
                    continue
                expected[head, token] = LOW
                importance = float(ctx.importance[page, head, token])
                if importance:
                    prunable.append((importance, head, token))
        if demotions:
            left = 0.005 * sum(importance for importance, *_ in prunable)
            for importance, head, token in sorted(prunable):
                left -= importance
                if left >= 0:
                    expected[head, token] = PRUNED
            assert 0 < int((expected == PRUNED).sum()) < PAGE_TOKENS * 3
        assert torch.equal(got[page], expected)


def test_nothing_is_pruned_where_the_policy_does_not_prune() -> None:
    ctx = random_context(1, torch.Generator().manual_seed(5))
    kept = make_store("diffkv", alpha_low=0.0).policy.demote(ctx)
    assert torch.equal(kept == PRUNED, ctx.tiers == PRUNED)
    assert ((kept == PRUNED) != (make_store("diffkv").policy.demote(ctx) == PRUNED)).any()


def test_negligible_tokens_are_told_from_unscored_ones() -> None:
    """However little attention a scored token got, its code is not that of an unscored one."""
    store = make_store("diffkv", alpha_low=0.0)
    pages = torch.tensor([1])
    store.open(pages)
    store.raw.scores[:, store.directory.raw_slot[pages].long()] = 1e-15
    slot = int(store.directory.raw_slot[1])
    store.raw.counts[slot] = 8
    store.raw.counts[slot, 60:] = 0
    write(store, pages, torch.tensor([2]), torch.tensor([500]))
    seal(store, pages)
    for tokens in tokens_of(store, pages):
        assert (tokens.codes[..., :60] == 1).all() and (tokens.codes[..., 60:] == 0).all()


def test_tokens_keep_what_they_are() -> None:
    """Position, importance, and bit for bit the rows of tokens whose tier stays."""
    store, pages, _ = sealed_store(9)
    before = tokens_of(store, pages)
    for demotion in (1, 2):
        frames = store.ledger.frames_used
        demote(store, pages)
        after = tokens_of(store, pages)
        assert check_integrity(store) == []
        assert store.ledger.frames_used < frames
        assert store.directory.demotions[pages].tolist() == [demotion] * 9
        for old, new in zip(before, after, strict=True):
            kept, same = new.tiers != PRUNED, (new.tiers == old.tiers) & (new.tiers != PRUNED)
            assert torch.equal(new.codes[kept], old.codes[kept])
            assert bool((new.tiers <= old.tiers).all())
            rows = same.transpose(1, 2)
            assert torch.equal(new.keys[rows], old.keys[rows])
            assert torch.equal(new.values[rows], old.values[rows])
            assert bool((new.tiers[0, :, :SINK] == HIGH).all()), "a sink was demoted"
            high = (new.tiers == HIGH).sum()
            assert high == STORE.heads * SINK
        before = after
    counters = store.counters
    assert counters.demoted == 18
    assert counters.frames_demoted > 0


@pytest.mark.parametrize(("high", "low"), [("K8V4", "K4V2"), ("raw", "K4V2"), ("K8V8", "K4V4")])
def test_values_stay_close(high: str, low: str) -> None:
    """A demoted token is off by the errors of both formats at most, so by about the coarser's."""
    store, pages, contents = sealed_store(5, tiers=Tiers(high, low))
    before = tokens_of(store, pages)
    demote(store, pages)
    layout = store.layout
    after = tokens_of(store, pages)
    for layer, (old, new, written) in enumerate(zip(before, after, contents, strict=True)):
        fell = ((old.tiers == HIGH) & (new.tiers == LOW)).transpose(1, 2)
        assert bool(fell.any())
        keys, values = written
        if layout.rotates:  # demotion works on what is sealed, as it is
            keys = to_sealed_keys(keys, store.key_means.by_layer[layer])
            values = rotate(values)
        for got, original, high_bits, low_bits in (
            (new.keys, keys, layout.high.key_bits, layout.low.key_bits),
            (new.values, values, layout.high.value_bits, layout.low.value_bits),
        ):
            rows, expected = got[fell].double(), original[fell].double()
            spread = expected.amax(1, keepdim=True) - expected.amin(1, keepdim=True)
            # Of each, and what fp16 scales and zeros add.
            most = error_bound(low_bits) + error_bound(high_bits)
            assert bool(((rows - expected).abs() <= (most + 0.005) * spread).all())
            if got is new.values:
                continue  # rotation gathers their offset, which the range must then cover
            centred = (expected - expected.mean(1, keepdim=True)).norm()
            assert (rows - expected).norm() <= 3 / 2**low_bits * centred


@pytest.mark.parametrize("heads", [1, 2])
def test_page_that_would_not_shrink_keeps_its_payload(heads: int) -> None:
    """Where only sinks are high, the first demotion frees nothing."""
    shape = STORE._replace(heads=heads)
    store, pages, _ = sealed_store(3, shape=shape, alpha_high=1e9, alpha_low=1e-9)
    frames = store.directory.frames[:, pages].clone()
    demote(store, pages)
    assert torch.equal(store.directory.frames[:, pages], frames)
    assert (store.counters.demoted, store.counters.frames_demoted) == (0, 0)
    demote(store, pages)
    assert store.counters.demoted == 3 and store.counters.frames_demoted > 0
    assert check_integrity(store) == []


def test_demotion_needs_no_free_frame() -> None:
    store, pages, _ = sealed_store(4)
    free = int(store.arena.num_free)
    taken = store.arena.take(torch.tensor([free], dtype=torch.int32), free)
    demote(store, pages)
    store.arena.give_back(taken)
    assert check_integrity(store) == []


def test_colder_half_goes_coldest_first() -> None:
    store, _, _ = sealed_store(8)
    for page in (2, 7, 1, 5):  # and 3, 4, 6, 8 never again
        store.begin_step(decodes=True)
        store.recency.read(torch.tensor([page]))
    everything, now = slice(0, store.sizes.virtual_pages), store.recency.step + 1
    assert cold_pages(store, [everything], now).tolist() == [8, 6, 4, 3]
    assert cold_pages(store, [slice(3, 6)], now).tolist() == [6], "4 to 6 are all that is searched"
    parts = [slice(4, store.sizes.virtual_pages), slice(0, 4)]
    assert cold_pages(store, parts, now).tolist() == [8, 6, 4, 3]
    held_since = store.recency.step - 1  # 1 and 5 are held
    assert cold_pages(store, [everything], held_since).tolist() == [8, 6, 4]
    before = store.directory.frames[:, [1, 2, 3, 5, 7]].clone()
    demote_cold(store, held_since, headroom=10**6)
    assert torch.equal(store.directory.frames[:, [1, 2, 3, 5, 7]], before)
    # As often as may be, and the warmer half not at all.
    assert store.directory.demotions[1:9].tolist() == [0, 0, 0, 2, 0, 2, 0, 2]
    assert cold_pages(store, [everything], held_since).tolist() == []


def test_each_page_once_before_any_twice_and_no_more_than_needed() -> None:
    store, ids, _ = sealed_store(48)
    batch = store.sizes.workspace.demoted_pages
    asked = store.ledger.frame_headroom + 1
    demote_cold(store, store.recency.step, asked)
    demoted = store.counters.demoted
    assert demoted % batch == 0 and store.ledger.frame_headroom >= asked
    assert store.directory.demotions[ids].tolist() == [0] * (48 - demoted) + [1] * demoted
    most = store.counters.frames_demoted / demoted * batch  # that the last batch has freed, about
    assert store.ledger.frames_free - 1.2 * most < asked * store.ledger.worst_frames
    demote_cold(store, store.recency.step, store.ledger.frame_headroom)
    assert store.counters.demoted == demoted, "nothing was needed"


def test_who_asked_for_high_quality_keeps_it() -> None:
    store, _, _ = sealed_store(4)
    store.directory.quality[4] = Quality.HIGH
    assert cold_pages(store, [slice(0, 64)], store.recency.step).tolist() == [3]


def test_a_page_that_is_used_again_starts_anew() -> None:
    store, pages, _ = sealed_store(4)
    demote(store, pages)
    store.release(pages[:2])
    assert check_integrity(store) == []
    fill(store, pages[:2])
    write(store, pages[:2], torch.arange(2), torch.full((2,), 300))
    seal(store, pages[:2])
    assert store.directory.demotions[pages].tolist() == [0, 0, 1, 1]
    assert check_integrity(store) == []


def serve(allocator: DiffXKVAllocator, cache: PrefixCache, tokens: int) -> None:
    """A request of so many tokens, a multiple of the page, that ends up in the cache."""
    budget = allocator.create_prefill_budget(cache)
    assert budget.check_prefill(
        extend_input_len=tokens,
        total_tokens=tokens + 64,
        max_new_tokens=0,
        input_tokens=tokens,
        swa_host_hit_length=0,
        chunk_limit=None,
    ) == (True, None)
    out = allocator.alloc_extend(lens(0), lens(0), lens(tokens), lens(tokens), lens(-1), tokens)
    assert out is not None
    store, pages = allocator.store, out[::PAGE_TOKENS] // PAGE_TOKENS
    store.begin_step(decodes=False)
    store.raw.scores[:, store.directory.raw_slot[pages].long()] = 8
    store.raw.counts[store.directory.raw_slot[pages].long()] = 1
    write(store, pages, torch.arange(len(pages)), torch.full((len(pages),), tokens))
    store.begin_step(decodes=True)
    cache.sequences.append(out)


@pytest.mark.parametrize("demotes", [True, False])
def test_prefixes_are_demoted_before_any_is_evicted(demotes: bool) -> None:
    allocator = make_allocator(mib=6, demote=demotes)
    cache = PrefixCache(allocator)
    counters = allocator.store.counters
    while not counters.demoted and not counters.evicted:
        serve(allocator, cache, 4 * PAGE_TOKENS)
    held = len(cache.sequences)
    assert bool(counters.demoted) == demotes
    assert bool(counters.evicted) == (not demotes)
    while not counters.evicted:
        serve(allocator, cache, 4 * PAGE_TOKENS)
    assert bool(counters.demoted) == demotes
    assert len(cache.sequences) > held if demotes else len(cache.sequences) == held
    newest = cache.sequences[-2][::PAGE_TOKENS] // PAGE_TOKENS
    assert not bool(allocator.store.directory.demotions[newest].any())
    assert allocator.check() == []


@pytest.mark.parametrize("policy", ["uniform", "lossless", "streaming", "snapkv"])
def test_other_policies_evict(policy: str) -> None:
    allocator = make_allocator(policy, mib=6)
    cache = PrefixCache(allocator)
    while not allocator.store.counters.evicted:
        serve(allocator, cache, 4 * PAGE_TOKENS)
    assert allocator.store.counters.demoted == 0


def test_random_load_over_memory() -> None:
    """Requests come, decode, finish into the cache and read it again; it gets more than fits."""
    machine, rng = AllocatorMachine(), random.Random(1)
    store, cache = machine.allocator.store, machine.cache
    first_of = SimpleNamespace(draw=lambda _: 0)
    for _ in range(30):
        machine.prefill(tokens=rng.randint(100, 700), answer=64, quality=Quality.BALANCED)
        for _ in range(rng.randint(0, 3)):
            machine.decode()
        while len(machine.running) > 2:
            machine.finish(data=first_of, cached=True)
        for slots in rng.sample(cache.sequences, len(cache.sequences) // 3):
            pages = slots[::PAGE_TOKENS] // PAGE_TOKENS
            store.recency.read(pages[store.directory.sealed[pages]])
        machine.consistent()
    assert store.counters.demoted > 20 and store.counters.evicted > 20
    assert store.ledger.demoted_pages > 0
