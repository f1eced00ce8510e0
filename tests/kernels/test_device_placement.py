# SPDX-License-Identifier: Apache-2.0
"""What serves a GPU makes its tensors there, and takes there what the host lists: every policy.

Page store, SGLang's allocator over it and the backend run on a device that notices (`fake_device`).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_diffxkv.attention.device_backend import GPUBackend
from sglang_diffxkv.attention.device_decode import DeviceDecode
from sglang_diffxkv.attention.full_pages import FullPages
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.metrics import pool_stats
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.policy.registry import POLICIES, make_policy
from sglang_diffxkv.pool.allocator import DiffXKVAllocator
from sglang_diffxkv.pool.request_rows import RequestRows
from sglang_diffxkv.pool.sizing import DEMOTION_SLACK, plan_pool
from sglang_diffxkv.pool.store import PageStore
from tests.support.fake_device import DEVICE, Event, fake_device
from tests.support.pages import running
from tests.support.policies import config_of
from tests.unit.test_allocator import PrefixCache

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real device does notice")

LAYERS, HEADS, DIM, WINDOW = 2, 1, 64, 64


@pytest.fixture
def device() -> Iterator[None]:
    with fake_device():
        yield


class Server:
    """As much of SGLang as drives the backend: rows of requests, an allocator, forward passes."""

    def __init__(self, policy: str) -> None:
        config = config_of(policy, window=WINDOW)
        graded = make_policy(
            config, head_dim=DIM, num_kv_heads=HEADS, raw_itemsize=2, num_layers=LAYERS
        )
        plan = plan_pool(
            2 << 20, graded.layout, LAYERS, graded.caps, graded.expected_fill, 0.5,
            virtual_slack=DEMOTION_SLACK,
        )  # fmt: skip
        self.store = store = PageStore(plan, graded.layout, graded, torch.bfloat16, DEVICE)
        pool: Any = SimpleNamespace(store=store, write=self._write, start_layer=0)
        self.allocator = DiffXKVAllocator(
            plan.virtual_tokens, PAGE_TOKENS, torch.bfloat16, DEVICE, pool, need_sort=False
        )
        self.cache = PrefixCache(self.allocator)
        self.table = torch.zeros(4, 512, dtype=torch.int32, device=DEVICE)
        self.backend = backend = object.__new__(GPUBackend)
        backend.store, backend.config, backend.token_to_kv_pool = store, config, pool
        backend.req_to_token_pool = SimpleNamespace(req_to_token=self.table)
        backend.rows = self.allocator.rows = RequestRows(4, self.table.device)
        backend.decode = DeviceDecode(store, self.table, WINDOW)
        backend.full_pages = FullPages(WINDOW, store.policy.needs_scores)
        backend.decode_step = backend.decode_batch = backend.forward_metadata = None
        self.lens = [0, 0]
        self._checks = True
        self.rows = torch.tensor([2, 1], device=DEVICE)

    def _write(self, layer: int, rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.store.raw.keys[layer].flatten(0, 1)[rows] = k
        self.store.raw.values[layer].flatten(0, 1)[rows] = v

    def extend(self, new: list[int]) -> None:
        """A chunk of each prompt."""
        before = torch.tensor(self.lens)
        after = before + torch.tensor(new)
        last = self._last(before)
        loc = self.allocator.alloc_extend(
            before.to(DEVICE), before, after.to(DEVICE), after, last, sum(new)
        )
        self._run(after, loc, SimpleNamespace(
            forward_mode=SimpleNamespace(is_decode=lambda: False, is_mixed=lambda: False),
            positions=torch.cat(
                [torch.arange(a, b) for a, b in zip(before, after, strict=True)]
            ).to(DEVICE),
            extend_prefix_lens=before.to(DEVICE).int(),
            extend_prefix_lens_cpu=before.tolist(),
            extend_seq_lens_cpu=new,
        ))  # fmt: skip

    def warm_up(self) -> None:
        """SGLang's warm-up: a step over the page of padding that does not end."""
        batch = SimpleNamespace(
            forward_mode=SimpleNamespace(is_decode=lambda: True),
            batch_size=3,
            req_pool_indices=torch.zeros(3, dtype=torch.int64, device=DEVICE),
            seq_lens=torch.ones(3, dtype=torch.int64, device=DEVICE),
            seq_lens_cpu=torch.ones(3, dtype=torch.int64),
            out_cache_loc=torch.zeros(3, dtype=torch.int64, device=DEVICE),
        )
        self.backend.init_forward_metadata(batch)
        self._forward(3, batch)

    def decode(self, checks: bool = True) -> None:
        """One token for both; ``checks``: look at the output, which is to wait for it."""
        self._checks = checks
        before = torch.tensor(self.lens)
        assert self.allocator.check_decode_capacity(num_tokens=128, tree_cache=self.cache)
        loc = self.allocator.alloc_decode((before + 1).to(DEVICE), before + 1, self._last(before))
        self._run(before + 1, loc, SimpleNamespace(
            forward_mode=SimpleNamespace(is_decode=lambda: True)
        ))  # fmt: skip

    def _last(self, lens: torch.Tensor) -> torch.Tensor:
        places = (lens - 1).clamp(min=0).to(DEVICE)
        return torch.where(lens.to(DEVICE) > 0, self.table[self.rows, places].long(), -1)

    def _run(self, lens: torch.Tensor, loc: torch.Tensor, batch: Any) -> None:
        """A forward pass over new tokens, at the virtual slots ``loc``."""
        begin = 0
        for i, (row, old, length) in enumerate(
            zip(self.rows.host.tolist(), self.lens, lens.tolist(), strict=True)
        ):
            self.table[row, old:length] = loc[begin : begin + length - old].int()
            begin, self.lens[i] = begin + length - old, length
        vars(batch).update(
            batch_size=2,
            req_pool_indices=self.rows,
            seq_lens=lens.to(DEVICE),
            seq_lens_cpu=lens,
            out_cache_loc=loc,
        )
        self.backend.batch_rows = [2, 1]
        Event.launched += 1
        self.backend.init_forward_metadata(batch)
        self._forward(len(loc), batch)
        self.backend.end_of_step()
        Event.seen = Event.launched - 1  # the results of the one before are processed now
        assert self.backend.forward_metadata is None and self.backend.decode_batch is None

    def _forward(self, tokens: int, batch: Any) -> None:
        decodes = batch.forward_mode.is_decode()
        attend = self.backend.forward_decode if decodes else self.backend.forward_extend
        for layer_id in range(LAYERS):
            layer = SimpleNamespace(
                layer_id=layer_id, tp_k_head_num=HEADS, tp_q_head_num=2 * HEADS,
                qk_head_dim=DIM, scaling=0.1,
            )  # fmt: skip
            qkv = torch.randn(tokens, 4 * HEADS * DIM, device=DEVICE).bfloat16()
            q, k, v = qkv.split([2 * HEADS * DIM, HEADS * DIM, HEADS * DIM], dim=1)
            out = attend(q, k, v, layer, batch)
            assert out.shape == q.shape
            assert not self._checks or bool(out.isfinite().all())


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("policy", POLICIES)
def test_serving_stays_on_the_device(policy: str) -> None:
    server = Server(policy)
    store, allocator, cache = server.store, server.allocator, server.cache
    requests = [
        running(Quality.BALANCED, step=0),
        running(Quality.LOSSLESS, step=0),
    ]
    server.backend.rows.enter([2, 1], requests)
    server.warm_up()
    server.extend([192, 70])
    server.extend([69, 57])
    for _ in range(3):
        server.decode()
    assert store.counters.sealed >= 2 and store.ledger.raw_only == 3
    # The first sequence ends, and its prefix stays in the cache.
    cache.sequences.append(server.table[2, :256].long())
    allocator.free(server.table[2, 256:264].long())
    server.backend.rows.leave([2])
    store.begin_step(decodes=True)
    assert allocator.usage(cache) > 0
    budget = allocator.create_prefill_budget(cache)
    assert budget.remaining_total > 0
    allocator.reclaim(cache, allocator.available_size())
    assert store.policy.can_demote == (store.counters.demoted > 0)
    assert pool_stats(store)["open_pages"] == store.ledger.open_pages
    assert allocator.check() == []
    allocator.clear()
    assert allocator.check() == []
