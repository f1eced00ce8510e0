# SPDX-License-Identifier: Apache-2.0
"""What serves a GPU makes its tensors there, and takes there what the host lists: every policy.

Page store, SGLang's allocator over it and the backend run on a device that notices (`fake_device`).
"""

from __future__ import annotations

import pytest
import torch

from sglang_diffxkv.metrics import pool_stats
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.policy.registry import POLICIES
from tests.support.device_server import Server
from tests.support.pages import running

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real device does notice")


@pytest.mark.usefixtures("noticing_device")
@pytest.mark.parametrize(
    ("policy", "predicts"), [*((policy, False) for policy in POLICIES), ("diffxkv", True)]
)
def test_serving_stays_on_the_device(policy: str, predicts: bool) -> None:
    server = Server(policy, predicts=predicts)
    store, allocator, cache = server.store, server.allocator, server.cache
    requests = [
        running(Quality.BALANCED, step=0),
        running(Quality.LOSSLESS, step=0),
    ]
    server.allocator.running.enter([2, 1], requests)
    server.warm_up()
    server.extend([192, 70])
    server.extend([69, 57])
    for _ in range(3):
        server.decode()
    assert store.counters.sealed >= 2 and store.ledger.never_compressed == 3
    # The first sequence ends, and its prefix stays in the cache.
    cache.sequences.append(server.table[2, :256].long())
    allocator.free(server.table[2, 256:264].long())
    server.allocator.running.leave([2])
    store.begin_step(decodes=True)
    assert allocator.capacity.usage(cache) > 0
    budget = allocator.create_prefill_budget(cache)
    assert budget.remaining_total > 0
    allocator.reclaimer.reclaim(cache, allocator.available_size())
    assert store.policy.can_demote == (store.counters.demoted > 0)
    assert pool_stats(store)["open_pages"] == store.ledger.open_pages
    assert allocator.check() == []
    allocator.clear()
    assert allocator.check() == []
