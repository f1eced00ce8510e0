# SPDX-License-Identifier: Apache-2.0
"""Decode steps as SGLang's scheduler has them, statistics included, do not wait for the device."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.scheduler_components.pool_stats_observer import SchedulerPoolStatsObserver

from sglang_diffxkv.metrics import pool_gauges, pool_stats
from sglang_diffxkv.patches.observability import _get_token_info
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.request_rows import RunningRequest
from tests.kernels.fake_device import fake_device, waits
from tests.kernels.test_device_placement import Server

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real device has its own tools")


@pytest.fixture
def device() -> Iterator[None]:
    with fake_device():
        yield


def started(policy: str, second: Quality) -> Server:
    """Two requests that decode; the second one may have asked for a quality."""
    server = Server(policy)
    requests = [RunningRequest(Quality.BALANCED, 0), RunningRequest(second, 0)]
    server.backend.rows.enter([2, 1], requests)
    server.extend([130, 62])
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
