# SPDX-License-Identifier: Apache-2.0
"""Who is admitted, and who is preempted for whom: SGLang's own objects on our pool."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.allocator import DiffXKVAllocator
from sglang_diffxkv.pool.shared_pages import distinct_pages, paged
from tests.support.published import published
from tests.support.scheduling import Requests, Scheduling, prompt
from tests.support.stores import make_allocator

LOSSLESS, BALANCED = Quality.LOSSLESS, Quality.BALANCED


@pytest.fixture(scope="module", autouse=True)
def server_arguments(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with published(tmp_path_factory.mktemp("model"), "--enable-priority-scheduling"):
        yield


@pytest.fixture
def allocator() -> DiffXKVAllocator:
    """15 pages for lossless requests."""
    allocator = make_allocator(mib=6)
    assert allocator.capacity.lossless_pages == 15
    return allocator


make = Requests()


def with_cached_prefix(
    allocator: DiffXKVAllocator, pages: int, quality: Quality
) -> tuple[Scheduling, list[int]]:
    """A scheduler whose cache has a prompt of so many pages; the prompt."""
    scheduling, prefix = Scheduling(allocator, rows=16), prompt(pages)
    scheduling.waiting = [make(prefix, 1, quality)]
    scheduling.finish(scheduling.prefill()[0])
    return scheduling, prefix


def test_a_shared_prefix_counts_once(allocator: DiffXKVAllocator) -> None:
    """Six requests of 5 cached pages and one of their own are 11 pages, not 36."""
    scheduling, prefix = Scheduling(allocator, rows=16), prompt(5)
    scheduling.waiting = [make(prefix, 1, LOSSLESS)]
    (first,) = scheduling.prefill()
    scheduling.finish(first)
    scheduling.waiting = [make([*prefix, 1, i, 1], 30, LOSSLESS) for i in range(6)]
    assert len(scheduling.prefill()) == 6
    assert allocator.store.ledger.never_compressed == 11
    assert allocator.capacity.usage(scheduling.tree) == pytest.approx(11 / 18)


def test_equal_prompts_that_nobody_has_cached_count_each(allocator: DiffXKVAllocator) -> None:
    scheduling, prefix = Scheduling(allocator, rows=16), prompt(5)
    scheduling.waiting = [make([*prefix, 1, i, 1], 30, LOSSLESS) for i in range(6)]
    assert len(scheduling.prefill()) == 2, "6 pages each while they are computed"
    assert allocator.store.ledger.never_compressed == 7, "the second one's prefix was freed again"
    assert len(scheduling.prefill()) == 4


def test_answers_are_not_shared(allocator: DiffXKVAllocator) -> None:
    """Those of one prompt diverge: each may get as long as it asked for."""
    scheduling, prefix = with_cached_prefix(allocator, 5, LOSSLESS)
    scheduling.waiting = [make([*prefix, 7], 4 * PAGE_TOKENS - 1, LOSSLESS) for _ in range(6)]
    assert len(scheduling.prefill()) == 2, "5 + 2 * 4 pages of 15"
    assert not scheduling.prefill()


def test_who_waits_is_not_overtaken_by_its_kind(allocator: DiffXKVAllocator) -> None:
    scheduling = Scheduling(allocator, rows=16)
    scheduling.waiting = [make(prompt(9, 1), 64, LOSSLESS), make(prompt(9, 2), 64, LOSSLESS)]
    scheduling.waiting += [make(prompt(1, 3), 64, LOSSLESS), make(prompt(1, 4), 64, BALANCED)]
    assert [len(r.origin_input_ids) for r in scheduling.prefill()] == [9 * 64, 64]
    assert [r.extra_key for r in scheduling.running.reqs] == ["|diffxkv:lossless", None]
    scheduling.finish(scheduling.running.reqs[0])
    scheduling.decode()
    assert [len(r.origin_input_ids) for r in scheduling.prefill()] == [9 * 64, 64]


def test_other_qualities_share_nothing_and_take_no_raw_page_for_good(
    allocator: DiffXKVAllocator,
) -> None:
    scheduling, prefix = with_cached_prefix(allocator, 5, BALANCED)
    scheduling.waiting = [make([*prefix, i], 2 * PAGE_TOKENS - 1, LOSSLESS) for i in range(3)]
    assert len(scheduling.prefill()) == 2
    scheduling.waiting += [make([*prefix, 9], 9 * PAGE_TOKENS, BALANCED)]
    assert len(scheduling.prefill()) == 2, "by now the third one shares, too"


def test_a_cached_prefix_that_was_evicted_meanwhile_is_no_promise(
    allocator: DiffXKVAllocator,
) -> None:
    """While a request waits its prefix may go; when it is admitted it counts as it is then."""
    scheduling, prefix = with_cached_prefix(allocator, 6, LOSSLESS)
    scheduling.waiting = [make(prompt(10, 1), PAGE_TOKENS, LOSSLESS)]
    (other,) = scheduling.prefill()
    scheduling.waiting = [make([*prefix, 1], PAGE_TOKENS - 1, LOSSLESS) for _ in range(2)]
    assert not scheduling.prefill(), "11 + 7 pages"
    allocator.reclaimer.evict_for_raw_pages(scheduling.tree, 7 * PAGE_TOKENS)
    assert allocator.store.ledger.never_compressed == 10, "the waiting ones' prefix has gone"
    assert not scheduling.prefill()
    scheduling.finish(other)
    assert len(scheduling.prefill()) == 2
    assert allocator.check() == []


def test_prompts_between_two_chunks_count_whole(allocator: DiffXKVAllocator) -> None:
    scheduling, prefix = Scheduling(allocator, rows=16, chunk=2 * PAGE_TOKENS), prompt(8)
    scheduling.waiting = [make([*prefix, 1], 63, LOSSLESS), make([*prefix, 2], 63, LOSSLESS)]
    for step in range(4):
        (first,) = scheduling.prefill()
        assert first.origin_input_ids[-1] == 1, f"step {step}: the other would need 9 of 6 pages"
    assert len(scheduling.prefill()) == 2, "the first ends, and the second finds it in the tree"


def test_they_never_outgrow_the_raw_pages() -> None:
    """Random prompts of few prefixes come and go; what all may come to take is always there."""
    rng = random.Random(5)
    allocator = make_allocator(mib=8)
    scheduling = Scheduling(allocator, rows=12, chunk=3 * PAGE_TOKENS)
    prefixes, shared = [prompt(rng.uniform(1, 9), seed) for seed in range(4)], 0
    for step in range(150):
        cut = rng.choice(prefixes)
        tokens = cut[: rng.randint(1, len(cut))] + prompt(rng.uniform(0.02, 2), 100 + step)
        new = rng.randint(1, 2 * PAGE_TOKENS)
        if len(tokens) + new <= allocator.capacity.lossless_pages * PAGE_TOKENS:
            scheduling.waiting.append(make(tokens, new, rng.choice([LOSSLESS, BALANCED])))
        scheduling.prefill()
        held = [r for r in scheduling.held if r.extra_key]
        longest = [
            paged(r, len(r.origin_input_ids) + r.sampling_params.max_new_tokens) for r in held
        ]
        most = distinct_pages(scheduling.tree, longest)
        assert most <= allocator.capacity.lossless_pages
        now = distinct_pages(scheduling.tree, allocator.running.lossless)
        assert now == len(set().union(*(scheduling.pages(r) for r in held), set()))
        shared += now < sum(len(scheduling.pages(r)) for r in held)
        scheduling.decode()
        if scheduling.running.reqs and rng.random() < 0.6:
            scheduling.finish(rng.choice(scheduling.running.reqs))
        assert allocator.verify_byte_accounting() == []
    assert shared > 20 and allocator.check() == []


def test_without_a_radix_cache_nothing_is_shared(allocator: DiffXKVAllocator) -> None:
    scheduling, prefix = Scheduling(allocator, rows=16, radix=False), prompt(5)
    scheduling.waiting = [make([*prefix, i], 30, LOSSLESS) for i in range(3)]
    assert len(scheduling.prefill()) == 2
    assert not scheduling.prefill()


def test_nobody_is_preempted_for_who_is_not_admitted_then(allocator: DiffXKVAllocator) -> None:
    """The one in the way is as important: preempting others would make no room."""
    scheduling = Scheduling(allocator, rows=3)
    scheduling.waiting = [make(prompt(9, 1), 64, LOSSLESS, priority=100)]
    scheduling.waiting += [make(prompt(1, 2 + i), 500, BALANCED) for i in range(2)]
    assert len(scheduling.prefill(preemption=True)) == 3
    scheduling.waiting = [make(prompt(9, 5), 64, LOSSLESS, priority=100)]
    important = make(prompt(1, 6), 64, BALANCED, priority=50)
    for _ in range(5):
        assert not scheduling.prefill(preemption=True)
    assert scheduling.preempted == 0
    scheduling.waiting.append(important)
    assert scheduling.prefill(preemption=True) == [important], "it waits for no raw pages"
    assert scheduling.preempted == 1


@pytest.mark.parametrize("rows", [3, 16])
def test_preempting_lossless_requests_makes_room(allocator: DiffXKVAllocator, rows: int) -> None:
    """Whether rows lack or raw pages: the least important lossless requests go, nobody else."""
    scheduling = Scheduling(allocator, rows)
    balanced = make(prompt(1, 1), 500, BALANCED, priority=-50)
    low, lower = make(prompt(6, 2), 64, LOSSLESS, 5), make(prompt(5, 3), 64, LOSSLESS, 0)
    scheduling.waiting = [balanced, low, lower]
    assert len(scheduling.prefill(preemption=True)) == 3
    important = make(prompt(5, 4), 64, LOSSLESS, priority=100)
    scheduling.waiting = [important]
    assert scheduling.prefill(preemption=True) == [important]
    assert set(scheduling.running.reqs) == {balanced, low, important}
    assert scheduling.waiting == [lower] and scheduling.preempted == 1
    for _ in range(3):
        assert not scheduling.prefill(preemption=True)
    scheduling.finish(important)
    assert scheduling.prefill(preemption=True) == [lower]
    assert allocator.check() == []


def test_what_important_requests_share_is_no_reason_to_preempt(
    allocator: DiffXKVAllocator,
) -> None:
    scheduling, prefix = Scheduling(allocator, rows=2), prompt(9)
    scheduling.waiting = [make([*prefix, 1], 63, LOSSLESS, 100), make(prompt(1, 1), 9, BALANCED)]
    assert len(scheduling.prefill(preemption=True)) == 2
    scheduling.waiting = [important := make([*prefix, 2], 63, LOSSLESS, 100)]
    assert scheduling.prefill(preemption=True) == [important], "for its row one has to go"
    assert scheduling.preempted == 1


def test_bytes_that_lack_preempt_one_at_most() -> None:
    """A balanced request that is refused by bytes is not passed over: nobody overtakes it, so who
    was preempted for its row is not admitted again to be preempted again."""
    allocator = make_allocator("uniform", mib=3)
    scheduling = Scheduling(allocator, rows=3)
    largest = allocator.store.ledger.largest_sequence
    scheduling.waiting = [make(prompt(largest - 6, 1), 64, BALANCED, priority=100)]
    while scheduling.waiting or scheduling.chunked:
        scheduling.prefill(preemption=True)
    scheduling.waiting = [make(prompt(0.5, i), 9, BALANCED) for i in range(2)]
    scheduling.prefill(preemption=True)
    assert len(scheduling.running.reqs) == 3
    scheduling.waiting = [make(prompt(largest - 4, 9), 64, BALANCED, priority=100)]
    for _ in range(20):
        scheduling.prefill(preemption=True)
    assert scheduling.preempted <= 1
    assert allocator.check() == []


def test_nobody_is_preempted_beside_an_unfinished_prompt(allocator: DiffXKVAllocator) -> None:
    """SGLang keeps track of one: nobody is admitted in a step that has shortened it."""
    scheduling = Scheduling(allocator, rows=2)
    scheduling.waiting = [make(prompt(1, 1), 9, BALANCED)]
    scheduling.prefill()
    scheduling.waiting = [make(prompt(60, 2), 9, BALANCED, 100)]
    scheduling.prefill()
    scheduling.waiting = [make(prompt(1, 3), 9, BALANCED, 50)]
    assert len(scheduling.prefill(preemption=True)) == 1 and scheduling.chunked is not None
    assert scheduling.preempted == 0
