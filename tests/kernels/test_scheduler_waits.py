# SPDX-License-Identifier: Apache-2.0
"""Decode steps as SGLang's scheduler has them, statistics included, do not wait for the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.scheduler_components.pool_stats_observer import SchedulerPoolStatsObserver

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.metrics import pool_gauges, pool_stats
from sglang_diffxkv.patches.observability import _get_token_info
from sglang_diffxkv.policy.diffxkv import DiffXKVPolicy
from sglang_diffxkv.policy.plan import Plan, solve_plan
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.policy.sketch import ImportanceSketch
from sglang_diffxkv.pool.request_rows import RunningRequest
from sglang_diffxkv.pool.store import PageStateError, PageStore
from tests.kernels.fake_device import fake_device, waits
from tests.kernels.test_device_placement import HEADS, LAYERS, Server

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real device has its own tools")


@pytest.fixture
def device() -> Iterator[None]:
    with fake_device():
        yield


def started(policy: str, second: Quality, lengths: tuple[int, int] = (130, 62)) -> Server:
    """Two requests that decode; the second one may have asked for a quality."""
    server = Server(policy)
    requests = [RunningRequest(Quality.BALANCED, 0), RunningRequest(second, 0)]
    server.backend.rows.enter([2, 1], requests)
    server.extend(list(lengths))
    server.backend.decode._full_pages = 0  # as after the decode step that seals what they left
    return server


def load_snapshot(server: Server) -> Any:
    """What `publish_load_snapshot`, the log and the metrics of a decode step ask for."""
    observer = SchedulerPoolStatsObserver(
        tree_cache=server.cache,
        token_to_kv_pool_allocator=server.allocator,
        req_to_token_pool=None,
        session_controller=SimpleNamespace(sessions={}),
        hisparse_coordinator=None,
        is_hybrid_swa=False,
        is_hybrid_ssm=False,
        enable_hisparse=False,
        full_tokens_per_layer=None,
        swa_tokens_per_layer=None,
        max_total_num_tokens=server.allocator.size,
    )
    stats = _get_token_info(SchedulerPoolStatsObserver._get_token_info(observer), observer)
    pool_gauges(server.store)
    assert server.allocator.verify_byte_accounting() == []
    return stats


@pytest.mark.usefixtures("device")
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


def cached(server: Server) -> torch.Tensor:
    """Slots of two pages that no one runs with, the first of them sealed."""
    store = server.store
    slots = server.allocator.alloc(2 * PAGE_TOKENS)
    assert slots is not None
    first = slots[:1] // PAGE_TOKENS
    store.ledger.write(PAGE_TOKENS, full=1)
    store.directory.filled.index_fill_(0, first, PAGE_TOKENS)
    store.seal(first)
    return slots


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("policy", ["diffxkv", "uniform"])
def test_who_finishes_and_who_enters_does_not_wait(policy: str) -> None:
    """The ledger counts freed pages until two steps later, and says so wherever it is asked."""
    server = started(policy, Quality.LOSSLESS)
    slots, ledger = cached(server), server.store.ledger
    server.decode(checks=False)
    with waits() as found:
        before = replace(ledger)
        server.allocator.free_segment(slots, start_pos=0)
        server.backend.rows.enter([3], [RunningRequest(Quality.LOSSLESS, server.store.next_step)])
        load_snapshot(server)
        assert ledger == before
        budget = server.allocator.create_prefill_budget(server.cache)
        assert budget.has_capacity()
        server.decode(checks=False)
        server.backend.rows.leave([3])
        assert ledger == replace(before, open_tokens=before.open_tokens + 2)
        server.decode(checks=False)
        load_snapshot(server)
        assert found == []
    # One of the two that were freed was sealed; the step that knows of them opened a page.
    assert ledger.sealed_pages == before.sealed_pages - 1
    assert ledger.open_pages == before.open_pages - 1 + 1
    assert server.allocator.check() == []


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("policy", ["diffxkv", "diffkv", "uniform", "streaming"])
def test_decode_steps_that_seal_do_not_wait(policy: str) -> None:
    server = started(policy, Quality.BALANCED, lengths=(190, 62))
    store, ledger = server.store, server.store.ledger
    if isinstance(store.policy, DiffXKVPolicy):  # without a plan each page is solved for by itself
        store.policy.learner.plan = some_plan(store)
    with waits() as found:
        for _ in range(3):  # to lengths of 193 and 65
            server.decode(checks=False)
        before = replace(ledger)
        load_snapshot(server)
        for _ in range(3):
            server.decode(checks=False)
            load_snapshot(server)
        assert found == []
    # Where nothing is scored, the prefill has sealed one of the two.
    assert before.sealed_pages < store.counters.sealed == ledger.sealed_pages == 2
    assert ledger.open_pages == before.open_pages + before.sealed_pages - 2
    assert ledger.frames_used == int(store.directory.num_frames.sum())
    assert server.allocator.check() == []


def some_plan(store: PageStore) -> Plan:
    sketch = ImportanceSketch.empty(LAYERS, HEADS, "cpu")
    importance = torch.rand(20, LAYERS, HEADS, PAGE_TOKENS) ** 4
    sketch.update(importance, torch.ones(20, PAGE_TOKENS, dtype=torch.bool))
    return solve_plan(1, 0.9, sketch, store.layout)


@pytest.mark.usefixtures("device")
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


@pytest.mark.usefixtures("device")
def test_freed_pages_are_known_at_once_when_nobody_runs() -> None:
    server = started("uniform", Quality.BALANCED)
    slots, ledger = cached(server), server.store.ledger
    server.backend.rows.leave([2, 1])
    open_pages = ledger.open_pages
    server.allocator.free_segment(slots, start_pos=0)
    server.allocator.create_prefill_budget(server.cache)
    assert ledger.open_pages == open_pages - 1


@pytest.mark.usefixtures("device")
def test_pages_freed_twice_are_noticed() -> None:
    server = started("uniform", Quality.BALANCED)
    pages = cached(server)[::PAGE_TOKENS] // PAGE_TOKENS
    server.store.release(pages[:1])
    server.store.release(pages[:1])
    with pytest.raises(PageStateError, match="already free"):
        server.store.settle()


@pytest.mark.usefixtures("device")
def test_who_waits_is_noticed() -> None:
    server = started("uniform", Quality.BALANCED)
    with waits() as found:
        pool_stats(server.store)
        assert len(found) == 1 and "totals.py" in found[0], "one read of the sums by layer"
    server.backend.decode.expect_full_pages()
    with waits() as found:
        server.decode(checks=False)
        assert any("batch.py" in wait for wait in found), f"sealing lists pages: {found}"
