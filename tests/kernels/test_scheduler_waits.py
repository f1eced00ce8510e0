# SPDX-License-Identifier: Apache-2.0
"""Decode steps as SGLang's scheduler has them, statistics included, do not wait for the device."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.scheduler_components.pool_stats_observer import SchedulerPoolStatsObserver

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.metrics import pool_gauges, pool_stats
from sglang_diffxkv.patches.published_capacity import _publish_physical
from sglang_diffxkv.policy.budgeting.learner import CHECK_PAGES
from sglang_diffxkv.policy.budgeting.plan import Plan, solve_plan
from sglang_diffxkv.policy.budgeting.sketch import ImportanceSketch
from sglang_diffxkv.policy.methods.diffxkv import DiffXKVPolicy
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.offload import load_back, offload
from sglang_diffxkv.pool.sealing import seal
from sglang_diffxkv.pool.store import PageStateError, PageStore
from tests.support.device_server import HEADS, LAYERS, Server
from tests.support.fake_device import DEVICE, waits
from tests.support.pages import running

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real device has its own tools")


def started(
    policy: str,
    second: Quality,
    lengths: tuple[int, int] = (130, 62),
    *,
    predicts: bool = False,
    host_bytes: int = 0,
) -> Server:
    """Two requests that decode; the second one may have asked for a quality."""
    server = Server(policy, predicts=predicts, host_bytes=host_bytes)
    requests = [running(Quality.BALANCED, 0), running(second, 0)]
    server.allocator.running.enter([2, 1], requests)
    server.extend(list(lengths))
    server.backend.full_pages._waiting = 0  # as after the decode step that seals what they left
    return server


def load_snapshot(server: Server) -> Any:
    """What `publish_load_snapshot`, the log and the metrics of a decode step ask for."""
    observer = SchedulerPoolStatsObserver(
        tree_cache=server.cache,
        token_to_kv_pool_allocator=server.allocator,
        session_controller=SimpleNamespace(sessions={}),
        max_total_num_tokens=server.allocator.size,
        **dict.fromkeys(("is_hybrid_swa", "is_hybrid_ssm", "enable_hisparse"), False),
        **dict.fromkeys(("req_to_token_pool", "hisparse_coordinator")),
        **dict.fromkeys(("full_tokens_per_layer", "swa_tokens_per_layer")),
    )
    stats = _publish_physical(SchedulerPoolStatsObserver._get_token_info(observer), observer)
    pool_gauges(server.store)
    assert server.allocator.verify_byte_accounting() == []
    return stats


@pytest.mark.usefixtures("noticing_device")
@pytest.mark.parametrize("second", [Quality.BALANCED, Quality.LOSSLESS])
@pytest.mark.parametrize("policy", ["diffxkv", "uniform"])
def test_decode_steps_with_statistics_do_not_wait(policy: str, second: Quality) -> None:
    server = started(policy, second)
    opened = server.store.counters.opened
    with waits() as found:
        for _ in range(5):  # in the third of which a page is opened
            server.decode(checks=False)
            server.allocator.evict_to_free_tokens(server.cache, 128)
            stats = load_snapshot(server)
        assert found == []
    assert server.store.counters.opened == opened + 1
    assert 0 < stats.full_token_usage < 1
    assert server.allocator.check() == []


@pytest.mark.usefixtures("noticing_device")
@pytest.mark.parametrize("policy", ["diffxkv", "uniform"])
def test_decode_steps_do_not_wait_for_what_comes_back_from_the_host(policy: str) -> None:
    """Nor those that seal beside it, nor who finishes meanwhile with a page that is there."""
    server = started(policy, Quality.BALANCED, lengths=(126, 62), host_bytes=400_000)
    store = server.store
    if isinstance(store.policy, DiffXKVPolicy):
        store.policy.learner.plan = some_plan(store)
    slots = [cached(server) for _ in range(3)]
    pages = [x[:1] // PAGE_TOKENS for x in slots]
    server.decode(checks=False)
    offload(store, torch.cat(pages))
    load_back(store, pages[0])
    with waits() as found:
        for step in range(6):
            server.decode(checks=False)
            if step == 1:
                server.allocator.free_segment(slots[1], start_pos=0)
            load_snapshot(server)
        assert found == []
    assert store.ledger.host_pages == 1 and store.ledger.sealed_pages == 2
    assert server.allocator.check() == []


@pytest.mark.usefixtures("noticing_device")
@pytest.mark.parametrize("second", [Quality.BALANCED, Quality.LOSSLESS])
@pytest.mark.parametrize("policy", ["diffxkv", "uniform"])
def test_verifications_do_not_wait(policy: str, second: Quality) -> None:
    """Nor do those that seal; nothing is sealed of what may be written again."""
    server = started(policy, second, lengths=(120, 62))
    store = server.store
    if isinstance(store.policy, DiffXKVPolicy):
        store.policy.learner.plan = some_plan(store)
    with waits() as found:
        for accepted in ([4, 1], [1, 3], [2, 4], [4, 4], [1, 1], [1, 1], [1, 1]):
            server.verify(4, accepted)
            load_snapshot(server)
        assert found == []
    assert server.lens == [134, 77]
    assert store.counters.sealed == store.ledger.sealed_pages == 1
    assert store.ledger.open_tokens == 134 + 77 - PAGE_TOKENS
    assert server.allocator.check() == []


def cached(server: Server) -> torch.Tensor:
    """Slots of two pages that no one runs with, the first of them sealed."""
    store = server.store
    slots = server.allocator.alloc(2 * PAGE_TOKENS)
    assert slots is not None
    first = slots[:1] // PAGE_TOKENS
    store.ledger.commit(PAGE_TOKENS, full=1)
    store.directory.filled.index_fill_(0, first, PAGE_TOKENS)
    seal(store, first)
    return slots


@pytest.mark.usefixtures("noticing_device")
@pytest.mark.parametrize("policy", ["diffxkv", "uniform"])
def test_who_finishes_and_who_enters_does_not_wait(policy: str) -> None:
    """The ledger counts freed pages until two steps later, and says so wherever it is asked."""
    server = started(policy, Quality.LOSSLESS)
    slots, ledger = cached(server), server.store.ledger
    server.decode(checks=False)
    with waits() as found:
        before = replace(ledger)
        server.allocator.free_segment(slots, start_pos=0)
        server.allocator.running.enter(
            [3], [running(Quality.LOSSLESS, server.store.recency.next_step)]
        )
        load_snapshot(server)
        assert ledger == before
        budget = server.allocator.create_prefill_budget(server.cache)
        assert budget.has_capacity()
        server.decode(checks=False)
        server.allocator.running.leave([3])
        assert ledger == replace(before, open_tokens=before.open_tokens + 2)
        server.decode(checks=False)
        load_snapshot(server)
        assert found == []
    # One of the two that were freed was sealed; the step that knows of them opened a page.
    assert ledger.sealed_pages == before.sealed_pages - 1
    assert ledger.open_pages == before.open_pages - 1 + 1
    assert server.allocator.check() == []


@pytest.mark.usefixtures("noticing_device")
@pytest.mark.parametrize(
    ("policy", "predicts"),
    [
        ("diffxkv", False),
        ("diffxkv", True),
        ("diffkv", False),
        ("uniform", False),
        ("streaming", False),
    ],
)
def test_decode_steps_that_seal_do_not_wait(policy: str, predicts: bool) -> None:
    server = started(policy, Quality.BALANCED, lengths=(126, 62), predicts=predicts)
    store, ledger = server.store, server.store.ledger
    if isinstance(store.policy, DiffXKVPolicy):  # without a plan each page is solved for by itself
        store.policy.learner.plan = some_plan(store)
    with waits() as found:
        for _ in range(3):  # to lengths of 129 and 65
            server.decode(checks=False)
        before = replace(ledger)
        load_snapshot(server)
        for _ in range(3):
            server.decode(checks=False)
            load_snapshot(server)
        assert found == []
    assert before.sealed_pages == 0 and store.counters.sealed == ledger.sealed_pages == 1
    assert ledger.open_pages == before.open_pages - 1
    assert ledger.frames_used == int(store.directory.num_frames.sum())
    assert server.allocator.check() == []


def some_plan(store: PageStore) -> Plan:
    sketch = ImportanceSketch.empty(LAYERS, HEADS, "cpu")
    importance = torch.rand(20, LAYERS, HEADS, PAGE_TOKENS) ** 4
    sketch.update(importance, torch.ones(20, PAGE_TOKENS, dtype=torch.bool))
    return solve_plan(1, 0.9, sketch, store.layout)


@pytest.mark.usefixtures("noticing_device")
def test_who_runs_short_waits_for_what_was_freed() -> None:
    server = started("uniform", Quality.BALANCED)
    slots, ledger = cached(server), server.store.ledger
    server.decode(checks=False)
    taken = server.allocator.alloc(ledger.headroom * PAGE_TOKENS)
    assert taken is not None and ledger.headroom == 0
    server.allocator.free_segment(slots, start_pos=0)
    assert ledger.headroom == 0
    with waits() as found:
        assert server.allocator.check_decode_capacity(num_tokens=64, tree_cache=server.cache)
        assert ledger.headroom >= 1 and len(found) == 1 and "transfer.py" in found[0]
    assert server.store.counters.reclaims == 0
    assert server.allocator.check() == []


class NoPrefixCache:
    """As with --disable-radix-cache: nothing can be evicted."""

    def evictable_size(self) -> int:
        return 0

    def supports_prefix_sharing(self) -> bool:
        return False

    def supports_mamba(self) -> bool:
        return False


def filled_and_freed() -> Server:
    """Somebody has just freed sealed pages that took all frames; others still run."""
    server: Any = started("uniform", Quality.BALANCED)
    server.cache = NoPrefixCache()
    store, taken = server.store, []
    while most := min(16, store.ledger.headroom):
        slots = server.allocator.alloc(most * PAGE_TOKENS)
        pages = slots[::PAGE_TOKENS] // PAGE_TOKENS
        store.ledger.commit(len(slots), full=most)
        store.directory.filled.index_fill_(0, pages, PAGE_TOKENS)
        seal(store, pages)
        taken.append(slots)
    server.allocator.free_segment(torch.cat(taken), start_pos=0)
    assert store.ledger.frame_headroom == 0 < store.ledger.raw_free
    return server  # type: ignore[no-any-return]


@pytest.mark.usefixtures("noticing_device")
def test_who_would_be_refused_is_admitted_on_what_was_freed() -> None:
    """SGLang asks once, and then nobody until somebody leaves."""
    server = filled_and_freed()
    budget = server.allocator.create_prefill_budget(server.cache)
    admitted, _ = budget.check_prefill(
        extend_input_len=128, total_tokens=256, max_new_tokens=64, input_tokens=128,
        swa_host_hit_length=0, chunk_limit=2048,
    )  # fmt: skip
    assert admitted


@pytest.mark.usefixtures("noticing_device")
def test_a_prompt_between_two_chunks_goes_on_with_what_was_freed() -> None:
    """No step comes until it does."""
    server = filled_and_freed()
    budget = server.allocator.create_prefill_budget(server.cache)
    assert budget.available_chunk_tokens(128) == 128


@pytest.mark.usefixtures("noticing_device")
def test_statistics_are_of_one_moment() -> None:
    server = started("uniform", Quality.BALANCED)
    slots = cached(server)
    server.allocator.free_segment(slots, start_pos=0)
    assert pool_gauges(server.store)["tier_tokens"]["pruned"] >= 0
    stats = pool_stats(server.store)
    assert stats["tier_tokens"]["pruned"] == 0 <= stats["bytes"]["slack"]


@pytest.mark.usefixtures("noticing_device")
def test_plans_are_solved_without_a_wait() -> None:
    server = started("diffxkv", Quality.BALANCED)
    policy = server.store.policy
    assert isinstance(policy, DiffXKVPolicy)
    policy.learner.plan = plan = some_plan(server.store)
    policy.learner._sketch = plan.sketch.copy()  # on the host, as a plan file leaves it
    policy.learner._since_check = CHECK_PAGES
    importance = torch.rand(2, LAYERS, HEADS, PAGE_TOKENS, device=DEVICE)
    counted = torch.ones(2, PAGE_TOKENS, dtype=torch.bool, device=DEVICE)
    with waits() as found:
        policy.learner.observe(importance, counted)
        assert policy.learner._solving is not None and found == []
    policy.learner.wait()


@pytest.mark.usefixtures("noticing_device")
def test_pages_freed_twice_are_noticed() -> None:
    server = started("uniform", Quality.BALANCED)
    pages = cached(server)[::PAGE_TOKENS] // PAGE_TOKENS
    server.store.release(pages[:1])
    server.store.release(pages[:1])
    with pytest.raises(PageStateError, match="already free"):
        server.store.settle()


@pytest.mark.usefixtures("noticing_device")
def test_who_waits_is_noticed() -> None:
    server = started("uniform", Quality.BALANCED)
    with waits() as found:
        pool_stats(server.store)
        assert len(found) == 1 and "totals.py" in found[0], "one read of the sums by layer"
    server.backend.full_pages.expect_any()
    with waits() as found:
        server.decode(checks=False)
        assert any("pages_to_seal" in wait for wait in found), f"{found}"
