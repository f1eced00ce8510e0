# SPDX-License-Identifier: Apache-2.0
"""No request reads a page on the host, however SGLang came to give it to it; what is there stays
until its room is needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import Req

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.allocator import DiffXKVAllocator
from sglang_diffxkv.pool.offload import offload, offload_cold
from sglang_diffxkv.pool.payload import read_payload
from sglang_diffxkv.pool.sealing import seal
from tests.support.published import published
from tests.support.scheduling import Requests, Scheduling, prompt
from tests.support.stores import make_allocator

make = Requests()


@pytest.fixture(scope="module", autouse=True)
def server_arguments(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with published(tmp_path_factory.mktemp("model"), "--enable-priority-scheduling"):
        yield


@pytest.fixture
def scheduling() -> Scheduling:
    """A device of some 70 pages and a host of some 40."""
    allocator = make_allocator(mib=4, host_bytes=1 << 20, demote=False)
    return Scheduling(allocator, rows=64, chunk=512)


def run(scheduling: Scheduling, *prompts: list[int], **options: bool) -> list[Req]:
    scheduling.waiting = [make(text, 8, Quality.BALANCED) for text in prompts]
    return scheduling.prefill(**options)


def offload_cached(scheduling: Scheduling) -> torch.Tensor:
    """Seal and offload all pages that nobody runs on; which they are."""
    store = scheduling.allocator.store
    scheduling.decode()
    seal(store, store.recency.unheld_full(store.recency.next_step))
    held = {page for request in scheduling.held for page in scheduling.pages(request)}
    sealed = store.directory.sealed.nonzero().flatten().tolist()
    pages = torch.tensor([page for page in sealed if page not in held])
    offload(store, pages)
    return pages


def away(scheduling: Scheduling) -> set[int]:
    """Pages on the host that somebody reads."""
    on_host = set(scheduling.allocator.store.directory.on_host.nonzero().flatten().tolist())
    return on_host & {page for request in scheduling.held for page in scheduling.pages(request)}


@pytest.mark.parametrize("found", [4, 1])
def test_what_is_computed_again_is_read(scheduling: Scheduling, found: int) -> None:
    """It takes the place of the page on the host: a prompt's last page, which is computed in any
    case, and all from which log probabilities are asked for."""
    store, text = scheduling.allocator.store, prompt(5)
    scheduling.finish(run(scheduling, text)[0])
    pages = offload_cached(scheduling)
    assert len(pages) == 5
    request, opened = make(text, 8, Quality.BALANCED), store.counters.opened
    if found < 4:
        request.return_logprob, request.logprob_start_len = True, found * PAGE_TOKENS
    scheduling.waiting = [request]
    assert scheduling.prefill() == [request]
    assert store.counters.opened == opened + 5 - found
    assert not away(scheduling)
    assert store.ledger.host_pages == 0
    assert scheduling.pages(request) == set(pages.tolist())
    assert scheduling.allocator.check() == []


def test_what_others_cached_meanwhile(scheduling: Scheduling) -> None:
    """Two compute the same; the first is gone, and offloaded, when the second's result comes."""
    s, text = scheduling, prompt(5)
    (first,) = run(s, text, cached=False)
    (second,) = run(s, text, cached=False)
    s.cache([first])
    s.finish(first)
    assert len(offload_cached(s)) == 5
    s.cache([second])
    assert not away(s)
    assert s.allocator.check() == []


def test_sealed_pages_take_the_place(scheduling: Scheduling) -> None:
    s, text = scheduling, prompt(5)
    store = s.allocator.store
    s.finish(run(s, text)[0])
    (page,) = offload_cached(s)[-1:]
    (request,) = run(s, text, cached=False)
    (computed,) = s.pages(request) - set(store.directory.sealed.nonzero().flatten().tolist())
    seal(store, torch.tensor([computed]))
    (payload,) = read_payload(store, torch.tensor([computed]))
    s.cache([request])
    assert not away(s)
    (now,) = read_payload(store, page[None])
    assert all(torch.equal(*pair) for pair in zip(payload, now, strict=True))
    assert s.allocator.check() == []


def fill(scheduling: Scheduling) -> None:
    """Admit prompts until no more fit; they stay."""
    seed = 100
    while run(scheduling, prompt(6, seed)):
        scheduling.decode()
        seed += 1
    scheduling.waiting = []


def with_both_full(scheduling: Scheduling) -> int:
    """A device full of pages that are read, and some on the host; how many."""
    for seed in range(4):
        scheduling.finish(run(scheduling, prompt(2, seed))[0])
    pages = offload_cached(scheduling)
    fill(scheduling)
    ledger = scheduling.allocator.store.ledger
    assert len(pages) == ledger.host_pages == 8
    return len(pages)


def check_decode(allocator: DiffXKVAllocator, more: int, tree: Any) -> bool:
    """Whether a decode step gets ``more`` pages than can be opened now."""
    pages = allocator.store.ledger.frame_headroom + more
    return allocator.check_decode_capacity(num_tokens=pages * PAGE_TOKENS, tree_cache=tree)


def test_a_full_device_forgets_nothing_of_the_host(scheduling: Scheduling) -> None:
    """Who asks for more than can be had is told no; nothing is evicted, which would not help."""
    on_host = with_both_full(scheduling)
    allocator = scheduling.allocator
    assert not check_decode(allocator, 20, scheduling.tree)
    assert allocator.store.ledger.host_pages == on_host
    assert allocator.store.counters.evicted == 0
    assert not away(scheduling)


def test_who_has_just_finished_is_offloaded(scheduling: Scheduling) -> None:
    """Though its pages were read in the last step, as those of who runs."""
    on_host = with_both_full(scheduling)
    allocator = scheduling.allocator
    scheduling.decode()
    scheduling.finish(scheduling.running.reqs[0])
    assert check_decode(allocator, 1, scheduling.tree)
    assert allocator.store.ledger.host_pages > on_host
    assert allocator.store.counters.evicted == 0
    assert not away(scheduling)


def test_a_host_that_is_nearly_full_makes_room_for_a_page(scheduling: Scheduling) -> None:
    """It has as many frames free as lack, and fewer than a page has."""
    on_host = with_both_full(scheduling)
    allocator = scheduling.allocator
    ledger = allocator.store.ledger
    scheduling.decode()
    scheduling.finish(scheduling.running.reqs[0])
    scheduling.decode()
    ledger.host_total = ledger.host_used + ledger.worst_frames - 1
    lacking = -ledger.frames_free % ledger.worst_frames
    assert 0 < lacking < ledger.worst_frames - 1
    assert check_decode(allocator, 1, scheduling.tree)
    assert ledger.host_pages >= on_host - 1, "the coldest prefix went, of two pages"
    assert not away(scheduling)


def test_who_is_not_admitted_holds_nothing(
    scheduling: Scheduling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a queue's prefixes would keep each other from coming back, and wait for ever."""
    store = scheduling.allocator.store
    for seed in (0, 1):
        scheduling.finish(run(scheduling, prompt(4, seed))[0])
    scheduling.decode()
    seal(store, store.recency.unheld_full(store.recency.next_step))
    used = store.directory.last_used.clone()
    longer = [prompt(4, seed) + prompt(2, 9) for seed in (0, 1)]
    with monkeypatch.context() as patched:
        budget = "sglang_diffxkv.pool.prefill_budget.DiffXKVPrefillBudget"
        patched.setattr(f"{budget}._make_room", lambda *_: 0)
        assert run(scheduling, *longer) == []
    assert torch.equal(store.directory.last_used, used)
    admitted = scheduling.prefill()
    assert len(admitted) == 2
    pages = [page for request in admitted for page in scheduling.pages(request)]
    assert (store.directory.last_used[pages] > used[pages]).all()


def nearly_fill(scheduling: Scheduling) -> None:
    """Sealed prompts that nobody reads, until few pages can be opened; and two that are open."""
    store, seed = scheduling.allocator.store, 0
    while store.ledger.frame_headroom > 8:
        scheduling.finish(run(scheduling, prompt(4, seed))[0])
        scheduling.decode()
        seal(store, store.recency.unheld_full(store.recency.next_step))
        seed += 1
    scheduling.finish(run(scheduling, prompt(2, 99))[0])
    scheduling.decode()
    assert store.ledger.full_pages == 2 and store.ledger.raw_free > store.ledger.frame_headroom + 2


def test_pages_go_to_the_host_before_others_are_sealed_early(scheduling: Scheduling) -> None:
    store = scheduling.allocator.store
    nearly_fill(scheduling)
    sealed = store.counters.sealed
    assert check_decode(scheduling.allocator, 2, scheduling.tree)
    assert store.counters.offloaded > 0 and store.counters.sealed == sealed


def test_nothing_is_demoted_to_load_back_while_the_host_has_room() -> None:
    scheduling = Scheduling(make_allocator(mib=4, host_bytes=4 << 20), rows=64, chunk=512)
    store = scheduling.allocator.store
    for seed in range(8):
        scheduling.finish(run(scheduling, prompt(4, 100 + seed))[0])
    pages = offload_cached(scheduling)
    nearly_fill(scheduling)
    assert store.share(pages).frames > store.ledger.frames_free
    before, promised = store.counters.offloaded, store.ledger.frame_headroom
    assert scheduling.allocator.reclaimer.load_back(scheduling.tree, pages, promised)
    assert store.directory.sealed[pages].all() and store.counters.offloaded > before
    assert (store.counters.demoted, store.counters.evicted) == (0, 0)
    assert store.ledger.frame_headroom >= promised > 0, "others were admitted on it"


def test_nothing_is_demoted_while_the_host_has_room() -> None:
    scheduling = Scheduling(make_allocator(mib=4, host_bytes=1 << 20), rows=64, chunk=512)
    store = scheduling.allocator.store
    nearly_fill(scheduling)
    assert check_decode(scheduling.allocator, 2, scheduling.tree)
    assert store.counters.offloaded > 0 and store.counters.demoted == 0
    store.ledger.host_total = store.ledger.host_used  # full
    offloaded, evicted = store.counters.offloaded, store.counters.evicted
    assert check_decode(scheduling.allocator, 4, scheduling.tree)
    assert store.counters.demoted > 0
    assert (store.counters.offloaded, store.counters.evicted) == (offloaded, evicted)


def cold_prefix(scheduling: Scheduling) -> list[int]:
    """A prompt that is cached on the device, sealed, and that nobody has read for long."""
    store, text = scheduling.allocator.store, prompt(5)
    scheduling.finish(run(scheduling, text)[0])
    for seed in (1, 2):
        run(scheduling, prompt(1, seed))
        scheduling.decode()
    seal(store, store.recency.unheld_full(scheduling.allocator.reclaimer.held_since))
    assert store.ledger.sealed_pages == 5
    return text


def test_cached_pages_given_for_computed_ones_are_held(scheduling: Scheduling) -> None:
    """Nobody had read them for long, and the request has not run a step with them yet."""
    store, text = scheduling.allocator.store, cold_prefix(scheduling)
    request = make(text, 8, Quality.BALANCED)
    request.return_logprob, request.logprob_start_len = True, 0
    scheduling.waiting = [request]
    assert scheduling.prefill(cached=False) == [request]
    scheduling.decode()  # of a step that was launched before the results came
    scheduling.cache([request])
    assert store.directory.sealed[list(scheduling.pages(request))].any(), "the cached ones"
    scheduling.allocator.create_prefill_budget(scheduling.tree)
    offload_cold(store, scheduling.allocator.reclaimer.held_since, 1 << 20)
    assert not away(scheduling)


def test_what_was_expected_for_a_step_that_never_came_is_cold(scheduling: Scheduling) -> None:
    """A prompt waits for room for its next chunk and is aborted: if nobody runs, there is no step
    that would make its pages cold, and who is next would wait for them for ever."""
    store, reclaimer = scheduling.allocator.store, scheduling.allocator.reclaimer
    text = cold_prefix(scheduling)
    for request in list(scheduling.running.reqs):
        scheduling.finish(request)
    assert run(scheduling, text + prompt(12, 7)) == [scheduling.chunked]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(reclaimer), "reclaim", lambda *_: False)
        patched.setattr(type(scheduling.allocator.capacity), "tokens_reservable", 0)
        assert scheduling.prefill() == []
    scheduling.abort_chunked()
    scheduling.prefill()
    seal(store, store.recency.unheld_full(reclaimer.held_since))
    assert (
        offload_cold(store, reclaimer.held_since, 1 << 20)
        == store.ledger.host_pages
        >= len(text) // PAGE_TOKENS
    )
    assert store.ledger.sealed_pages == 0
