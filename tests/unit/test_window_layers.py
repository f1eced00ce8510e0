# SPDX-License-Identifier: Apache-2.0
"""SGLang's composite of our pool and a window pool: pages, sizes and what steps list of them."""

from __future__ import annotations

import random

import pytest
import torch

from sglang_diffxkv.attention.decode_batch import StepTokens
from sglang_diffxkv.attention.window_layers import WindowPages
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.metrics import pool_stats
from sglang_diffxkv.pool.allocator import find_allocator
from sglang_diffxkv.pool.kv_pool import find_pool
from sglang_diffxkv.pool.window_allocator import DiffXKVWindowAllocator, find_windows
from sglang_diffxkv.pool.window_sizing import TYPICAL_TOKENS, WindowLayers, size_window_pool
from tests.support.machines import lens
from tests.support.stores import PrefixCache
from tests.support.window_pool import FULL, SHAPE, WINDOW_LEFT, WINDOWS, window_allocator

WINDOW_PAGES = 12


@pytest.fixture
def allocator() -> DiffXKVWindowAllocator:
    return window_allocator(8, WINDOW_PAGES)


def extend(
    allocator: DiffXKVWindowAllocator, start: int, end: int, last: torch.Tensor
) -> torch.Tensor | None:
    return allocator.alloc_extend(lens(start), lens(start), lens(end), lens(end), last, end - start)


def test_ours_is_found_in_the_composite(allocator: DiffXKVWindowAllocator) -> None:
    ours, pool = find_allocator(allocator), find_pool(allocator.get_kvcache())
    assert ours is allocator.full_attn_allocator and pool is not None
    assert ours.store is pool.store and pool.store.num_layers == len(FULL)
    assert pool.store_layers == {2: 0, 5: 1}
    row = torch.ones(1, SHAPE.heads, SHAPE.dim, dtype=SHAPE.dtype)
    loc = extend(allocator, 0, 1, lens(-1))
    assert loc is not None
    pool.set_kv_buffer(None, loc, 2 * row, 3 * row, None, None, layer_id_override=1)
    rows = pool.store.write_rows(loc)
    assert bool((pool.store.raw.keys[1].flatten(0, 1)[rows] == 2).all())
    assert bool((pool.store.raw.values[1].flatten(0, 1)[rows] == 3).all())
    assert find_windows(ours) is None


def test_pages_come_and_go_together(allocator: DiffXKVWindowAllocator) -> None:
    """A walk: sequences grow, their windows move on, they end; the tables always add up."""
    rng, ours = random.Random(0), allocator.full_attn_allocator
    sequences: list[torch.Tensor] = []
    freed: list[int] = []
    refused = 0
    for _ in range(300):
        move = rng.random()
        if move < 0.5 and sequences:  # a token, or some
            which = rng.randrange(len(sequences))
            slots = sequences[which]
            new = extend(allocator, len(slots), len(slots) + rng.randint(1, 90), slots[-1:])
            refused += new is None
            if new is not None:
                sequences[which] = torch.cat([slots, new])
        elif move < 0.75:
            new = extend(allocator, 0, rng.randint(1, 200), lens(-1))
            refused += new is None
            if new is not None:
                sequences.append(new)
                freed.append(0)
        elif move < 0.9 and sequences:  # windows move on
            which = rng.randrange(len(sequences))
            end = max(0, len(sequences[which]) - 1 - WINDOW_LEFT) // PAGE_TOKENS * PAGE_TOKENS
            if end > freed[which]:
                allocator.free_swa_segment(
                    sequences[which][freed[which] : end], start_pos=freed[which]
                )
                freed[which] = end
        elif sequences:
            which = rng.randrange(len(sequences))
            slots, done = sequences.pop(which), freed.pop(which)
            allocator.free_full_segment(slots[:done], start_pos=0)
            allocator.free_segment(slots[done:], start_pos=done)
        assert allocator.check() == []
        use = allocator.window_use
        pages = [-(-len(s) // PAGE_TOKENS) for s in sequences]
        held = sum(pages) - sum(freed) // PAGE_TOKENS
        assert use.tokens_held == held * PAGE_TOKENS
        assert ours.store.pages_held == sum(pages)
    assert refused > 5
    allocator.clear()
    assert allocator.window_use.tokens_held == 0 and allocator.check() == []


def test_what_is_short_takes_nothing(allocator: DiffXKVWindowAllocator) -> None:
    """Where either side has no room, neither gives a page."""
    cache = PrefixCache(allocator.full_attn_allocator)
    slots = extend(allocator, 0, (WINDOW_PAGES - 1) * PAGE_TOKENS, lens(-1))
    assert slots is not None
    assert allocator.check_decode_capacity(num_tokens=PAGE_TOKENS, tree_cache=cache)
    before = allocator.full_attn_allocator.available_size()
    assert extend(allocator, 0, 2 * PAGE_TOKENS, lens(-1)) is None
    assert extend(allocator, 0, PAGE_TOKENS, lens(-1)) is not None
    assert not allocator.check_decode_capacity(num_tokens=PAGE_TOKENS, tree_cache=cache)
    length = lens(len(slots) + 1)
    assert allocator.alloc_decode(length, length, slots[-1:]) is None
    assert allocator.full_attn_allocator.available_size() == before - PAGE_TOKENS
    assert allocator.check() == []


def test_damage_is_found(allocator: DiffXKVWindowAllocator) -> None:
    first, second = (extend(allocator, 0, 70, lens(-1)) for _ in range(2))
    assert first is not None and second is not None
    mapping = allocator.full_to_swa_index_mapping
    kept = mapping.clone()
    mapping[first[:64]] = mapping[second[:64]]
    assert any("free or mapped twice" in problem for problem in allocator.check())
    mapping.copy_(kept)
    mapping[first[3]] += 1
    assert any("lie in several" in problem for problem in allocator.check())
    mapping.copy_(kept)
    assert allocator.check() == []


def test_statistics_have_both_kinds(allocator: DiffXKVWindowAllocator) -> None:
    assert extend(allocator, 0, 130, lens(-1)) is not None
    store, use = allocator.full_attn_allocator.store, find_windows(allocator)
    assert use is not None
    row = 2 * SHAPE.heads * SHAPE.dim * SHAPE.dtype.itemsize
    assert use == (len(WINDOWS), WINDOW_PAGES * PAGE_TOKENS, 192, len(WINDOWS) * row)
    stats = pool_stats(store, use)
    assert stats["window_layers"] == use.report()
    alone = pool_stats(store)
    assert alone["window_layers"] is None
    assert abs(stats["physical_compression"] - 1) <= abs(alone["physical_compression"] - 1)


@pytest.mark.parametrize("queries", [1, 3])
def test_pages_that_steps_see(queries: int) -> None:
    """Against the window, token by token; pages that SGLang has freed are not needed."""
    rng = torch.Generator().manual_seed(0)
    pages, longest, first_page = 40, 5 * PAGE_TOKENS, 1
    lengths = torch.tensor([queries, 64, 65, 100, 101, 163, 164, 165, 319])
    table = torch.zeros(len(lengths) + 1, longest, dtype=torch.int32)
    slots = torch.zeros((pages * len(lengths) + 1) * PAGE_TOKENS, dtype=torch.int64)
    ids = torch.randperm(pages, generator=rng) + first_page
    taken = 0
    for row, length in enumerate(lengths.tolist(), 1):
        dead = max(0, length - queries - WINDOW_LEFT) // PAGE_TOKENS
        for page in range(-(-length // PAGE_TOKENS)):
            loc = torch.arange(PAGE_TOKENS) + (row * 5 + page) * PAGE_TOKENS
            table[row, page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS] = loc.to(torch.int32)
            if page >= dead:
                slots[loc] = ids[taken % pages] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)
                taken += 1
    window = WindowPages([], [], slots, WINDOW_LEFT)
    rows = torch.arange(1, len(lengths) + 1)
    step = window.of_decode(table, StepTokens(rows, lengths, queries))
    opened = window.listed(
        table[rows, ::PAGE_TOKENS].long() // PAGE_TOKENS, lengths - queries, lengths
    )
    for b, length in enumerate(lengths.tolist()):
        start = length - int(step.lengths[b])
        listed = slice(int(opened.indptr[b]), int(opened.indptr[b + 1]))
        for position in range(max(0, length - queries - WINDOW_LEFT), length):
            true = int(slots[int(table[b + 1, position])])
            place = position - start
            page, within = int(step.table[b, place // PAGE_TOKENS]), place % PAGE_TOKENS
            assert page * PAGE_TOKENS + within == true > 0
            at = opened.position[listed].tolist().index(position // PAGE_TOKENS)
            found = int(opened.slots[listed][at]) * PAGE_TOKENS + position % PAGE_TOKENS
            assert found == true
        new = step.rows.view(-1, queries)[b].tolist()
        assert new == [int(slots[int(table[b + 1, length - queries + i])]) for i in range(queries)]
        assert int(step.count[b]) == -(-int(step.lengths[b]) // PAGE_TOKENS)
        assert int(step.last_len[b]) == (length - 1) % PAGE_TOKENS + 1
    assert bool((opened.slots > 0).all())


def test_memory_is_divided() -> None:
    windows = WindowLayers(layers=15, token_bytes=15360, window_left=511, least=4096)
    tokens = size_window_pool(windows, 1 << 30, 512.0, None)
    assert tokens % PAGE_TOKENS == 0
    full = ((1 << 30) - tokens * windows.token_bytes) / 512
    assert tokens / full == pytest.approx((512 + 128) / TYPICAL_TOKENS, rel=0.02)
    asked = size_window_pool(windows._replace(ratio=0.1), 1 << 30, 512.0, None)
    full = ((1 << 30) - asked * windows.token_bytes) / 512
    assert asked / full == pytest.approx(0.1, rel=0.02)
    assert size_window_pool(windows, 80 << 20, 512.0, None) >= 2600, "for chunks"
    assert size_window_pool(windows, 1 << 30, 512.0, 1000) == 1024
    with pytest.raises(ValueError, match="less than a window of 512 and a page: raise"):
        size_window_pool(windows, 8 << 20, 512.0, None)
