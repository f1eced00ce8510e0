# SPDX-License-Identifier: Apache-2.0
"""Models with linear layers: our pool, allocator and backend inside SGLang's composite ones."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.hybrid_linear_attn_backend import HybridLinearAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.managers.scheduler_components.pool_stats_observer import SchedulerPoolStatsObserver
from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import (
    get_exec,
    get_schedule,
    publish,
    restore_context,
    snapshot_context,
)
from sglang.srt.server_args import prepare_server_args

from sglang_diffxkv.attention.backend import find_backend
from sglang_diffxkv.attention.factory import make_backend
from sglang_diffxkv.config import DiffXKVConfig
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.patches import linear_state
from sglang_diffxkv.patches.published_capacity import PhysicalPoolStats
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.kv_pool import find_pool
from tests.support.hybrid import ATTENTION, HybridScheduling, hybrid_allocator, hybrid_rows
from tests.support.hybrid_model import write_granite
from tests.support.scheduling import VOCABULARY, Requests


@pytest.fixture(scope="module", autouse=True)
def server_arguments(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Published as the scheduler process of a hybrid model has them."""
    state = snapshot_context()
    load_plugins()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SGLANG_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS"):
            patch.setenv(name, "1")  # which the CPU platform would set for good
        model = str(write_granite(tmp_path_factory.mktemp("model")))
        argv = ["--model-path", model, "--device", "cpu", "--attention-backend", "diffxkv"]
        server_args = prepare_server_args([*argv, "--diffxkv-config", '{"memory_bytes": "64MiB"}'])
        server_args.resolve_once()
        publish(server_args, role="scheduler")
        yield
    restore_context(state)


make = Requests()


def test_states_are_kept_at_the_ends_of_pages() -> None:
    assert get_exec().mamba.enable_mamba_extra_buffer


def test_our_pool_has_the_attention_layers() -> None:
    rows = hybrid_rows(4, 12)
    allocator = hybrid_allocator(rows)
    whole: Any = allocator._kvcache
    pool = find_pool(whole)
    assert pool is whole.full_kv_pool and pool.store is allocator.store
    assert pool.store_layers == {1: 0, 3: 1}
    assert whole.mem_usage == pytest.approx(pool.store.nbytes / 2**30)
    slots = allocator.alloc(PAGE_TOKENS)
    k, v = torch.randn(2, PAGE_TOKENS, 2, 64)
    whole.set_kv_buffer(SimpleNamespace(layer_id=3), slots, k, v)
    raw = pool.store.raw
    row = int(pool.store.directory.raw_slot[slots[0] // PAGE_TOKENS])
    assert torch.equal(raw.keys[1][row], k) and torch.equal(raw.values[1][row], v)
    with pytest.raises(ValueError, match="not in full attention layers"):
        whole.set_kv_buffer(SimpleNamespace(layer_id=2), slots, k, v)


def test_our_backend_is_found_in_the_one_that_wraps_it() -> None:
    rows = hybrid_rows(4, 12)
    allocator = hybrid_allocator(rows)
    runner: Any = SimpleNamespace(
        token_to_kv_pool=allocator._kvcache,
        token_to_kv_pool_allocator=allocator,
        req_to_token_pool=rows,
        model=torch.nn.Module(),
    )
    backend = make_backend(runner, DiffXKVConfig())
    linear: Any = SimpleNamespace(needs_cpu_seq_lens=False)
    wrapper = HybridLinearAttnBackend(backend, linear, ATTENTION)
    assert find_backend(wrapper) is backend and find_backend(backend) is backend
    assert find_backend(linear) is None
    assert wrapper.token_to_kv_pool is allocator._kvcache
    assert wrapper.needs_cpu_seq_lens


@pytest.mark.parametrize("cap", [0.0, 30.0])
def test_capped_layers_keep_no_means(cap: float) -> None:
    rows = hybrid_rows(4, 12)
    allocator = hybrid_allocator(rows)
    layer = RadixAttention(4, 64, 0.125, num_kv_heads=2, layer_id=1, logit_cap=cap)
    runner: Any = SimpleNamespace(
        token_to_kv_pool=allocator._kvcache,
        token_to_kv_pool_allocator=allocator,
        req_to_token_pool=rows,
        model=torch.nn.ModuleList([layer]),
    )
    allocator.store.key_means.set(torch.ones_like(allocator.store.key_means.by_layer))
    make_backend(runner, DiffXKVConfig())
    assert bool(allocator.store.key_means.by_layer.any()) == (cap == 0)


@pytest.mark.parametrize(("states", "mib"), [(24, 3.0), (60, 2.0)])
def test_prefixes_and_states_are_conserved(states: int, mib: float) -> None:
    """Requests of shared and own prompts come and go, under pressure of states, and of bytes."""
    rng = random.Random(states)
    rows = hybrid_rows(6, states)
    allocator = hybrid_allocator(rows, mib=mib)
    scheduling = HybridScheduling(allocator, rows, chunk=128)
    prefix = [rng.randrange(VOCABULARY) for _ in range(3 * PAGE_TOKENS)]
    cached = evicted_states = 0
    for step in range(60):
        shared = prefix[: rng.choice((0, 64, 128, 192))]
        own = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 200))]
        scheduling.waiting.append(make([*shared, *own], 8, Quality.BALANCED))
        for request in scheduling.prefill():
            cached += request.prefix_len
        scheduling.decode()
        if scheduling.running.reqs and (step % 2 or len(scheduling.running.reqs) == 5):
            scheduling.finish(rng.choice(scheduling.running.reqs))
        tree = scheduling.tree
        in_tree = tree.mamba_evictable_size() + tree.mamba_protected_size()
        free = rows.mamba_allocator.available_size()
        assert free + in_tree + scheduling.states_held == states
        evicted_states += free == 0
        assert allocator.check() == []
    assert cached > 500
    assert allocator.store.counters.sealed > 0


def test_published_capacity_keeps_the_states() -> None:
    """What is published of pages is physical; what is of states is SGLang's."""
    rows = hybrid_rows(4, 12)
    allocator = hybrid_allocator(rows)
    scheduling = HybridScheduling(allocator, rows)
    scheduling.waiting = [make(list(range(200)), 8, Quality.BALANCED)]
    scheduling.prefill()
    observer = SchedulerPoolStatsObserver(
        tree_cache=scheduling.tree,
        token_to_kv_pool_allocator=allocator,
        req_to_token_pool=rows,
        session_controller=None,
        hisparse_coordinator=None,
        is_hybrid_swa=False,
        is_hybrid_ssm=True,
        enable_hisparse=False,
        full_tokens_per_layer=None,
        swa_tokens_per_layer=None,
        max_total_num_tokens=allocator.size,
    )
    stats = observer.get_pool_stats()
    assert isinstance(stats, PhysicalPoolStats)
    assert stats.full_capacity == allocator.store.sizes.expected_tokens
    assert stats.mamba_num_used == scheduling.states_held + scheduling.tree.mamba_protected_size()
    shown = ", ".join(stats.get_decode_usage_msg_parts())
    assert "#full token: 256" in shown and f"mamba num: {stats.mamba_num_used}" in shown


GIB = 2**30


@pytest.fixture
def sized(monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's configurator, as much of it as sizes states of 64 KiB; its rank is alone."""
    sizes = SimpleNamespace(
        tp_size=1, dp_size=1, nnodes=1, tp_rank=0, attn_tp_group=SimpleNamespace(world_size=1)
    )
    monkeypatch.setattr("sglang.srt.runtime_context.get_parallel", lambda: sizes)
    monkeypatch.setattr(KVCacheConfigurator, "fused_entry_bytes", lambda self, kind: None)
    made: Any = object.__new__(KVCacheConfigurator)
    params = SimpleNamespace(layers=[0, 2], mamba_cache_per_req=1 << 16)
    made.mambaish_config = SimpleNamespace(mamba2_cache_params=params)
    made.hybrid_gdn_config = made.hybrid_kda_config = None
    made.spec_algorithm = SimpleNamespace(is_none=lambda: True)
    made.extra_mamba_cache_bytes_per_req = 0
    made.device, made.pp_size, made.attn_dp_size, made.is_draft_worker = "cpu", 1, 1, False
    return made


def test_states_come_out_of_memory_bytes(sized: Any, caplog: pytest.LogCaptureFixture) -> None:
    """SGLang offers its own pool 90 GiB; memory_bytes are 64 MiB, of which states get 0.9 / 1.9."""
    with caplog.at_level(logging.INFO):
        left = sized._handle_max_mamba_cache(90.0)
    states = get_schedule().max_mamba_cache_size
    assert states == int((64 * 2**20 * 0.9 / 1.9 - 65536) // 65536)
    assert left * GIB == pytest.approx(64 * 2**20 - (states + 1) * 65536)
    (line,) = (r.message for r in caplog.records if r.message.startswith("diffxkv: "))
    assert f"{states} states" in line and "64 KiB" in line


def test_the_draft_of_a_model_is_left_alone(sized: Any) -> None:
    sized.is_draft_worker = True
    assert sized._handle_max_mamba_cache(1.0) > 0.5


def test_states_that_leave_nothing_are_refused(sized: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stock(self: Any, total: float) -> float:
        return total - 0.07

    with pytest.raises(ValueError, match=r"^diffxkv: .* states .* lower --max-mamba-cache-size"):
        linear_state._set_states_aside(stock, sized, 90.0)
