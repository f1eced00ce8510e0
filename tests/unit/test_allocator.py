# SPDX-License-Identifier: Apache-2.0
"""SGLang's allocator interface over the page store, randomised, with a small prefix cache."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, EvictResult

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.policy.registry import make_policy
from sglang_diffxkv.pool.allocator import DiffXKVAllocator
from sglang_diffxkv.pool.kv_pool import DiffXKVPool, PoolSetup
from sglang_diffxkv.pool.sizing import plan_pool
from sglang_diffxkv.pool.store import PageStateError
from tests.unit.policies import config_of

LAYERS, HEADS, DIM = 2, 2, 64


def make_allocator(policy: str = "diffkv", mib: float = 3, **fields: Any) -> DiffXKVAllocator:
    config = config_of(policy, **fields)
    graded = make_policy(
        config, head_dim=DIM, num_kv_heads=HEADS, raw_itemsize=4, num_layers=LAYERS
    )
    plan = plan_pool(
        int(mib * 2**20), graded.layout, LAYERS, graded.caps, graded.expected_fill, 0.4
    )
    pool = DiffXKVPool.with_setup(PoolSetup(config, graded.layout, graded, plan))(
        plan.virtual_tokens,
        page_size=PAGE_TOKENS,
        dtype=torch.float32,
        head_num=HEADS,
        head_dim=DIM,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )
    return DiffXKVAllocator(
        plan.virtual_tokens,
        page_size=PAGE_TOKENS,
        dtype=torch.float32,
        device="cpu",
        kvcache=pool,
        need_sort=False,
    )


class PrefixCache:
    """Stands in for the radix tree: whole sequences of full pages, the oldest evicted first."""

    def __init__(self, allocator: DiffXKVAllocator) -> None:
        self.allocator = allocator
        self.sequences: list[torch.Tensor] = []

    @property
    def tree_core(self) -> "PrefixCache":
        return self

    def walk_for_kv_canary(self, unlocked_only: bool, swa_resident_only: bool) -> Any:
        assert unlocked_only and not swa_resident_only
        return SimpleNamespace(slot_indices=torch.cat([lens(), *self.sequences]))

    def supports_prefix_sharing(self) -> bool:
        return True

    def supports_mamba(self) -> bool:
        return False

    def evictable_size(self) -> int:
        return sum(len(slots) for slots in self.sequences)

    def evict_for_alloc(
        self, params: EvictParams, *, allocation_reclaim_satisfied: Any = None
    ) -> EvictResult:
        evicted = 0
        while self.sequences and evicted < params.num_tokens:
            if allocation_reclaim_satisfied is not None and allocation_reclaim_satisfied():
                break
            slots = self.sequences.pop(0)
            self.allocator.free_segment(slots, start_pos=0)
            evicted += len(slots)
        return EvictResult(num_tokens_evicted=evicted)


def lens(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


class AllocatorMachine(RuleBasedStateMachine):
    """Requests prefill, decode, finish into the cache or abort, as the scheduler has it."""

    policy = "diffkv"

    def __init__(self) -> None:
        super().__init__()
        self.allocator = make_allocator(self.policy)
        self.cache = PrefixCache(self.allocator)
        self.running: list[torch.Tensor] = []

    def _touch(self, decodes: bool) -> None:
        """What a forward pass over all running requests notes."""
        store = self.allocator.store
        store.begin_step(decodes)
        for slots in self.running:
            pages = slots[::PAGE_TOKENS] // PAGE_TOKENS
            position = torch.arange(len(pages))
            is_open = store.directory.raw_slot[pages] >= 0
            context = torch.full((int(is_open.sum()),), len(slots))
            store.touch(pages[is_open], position[is_open], context, window=64)
            store.read(pages[~is_open])

    @rule(tokens=st.integers(1, 700))
    def prefill(self, tokens: int) -> None:
        budget = self.allocator.create_prefill_budget(self.cache)
        fits, limit = budget.check_prefill(
            extend_input_len=tokens,
            total_tokens=tokens + 64,
            max_new_tokens=0,
            input_tokens=tokens,
            swa_host_hit_length=0,
            chunk_limit=512,
        )
        if not fits or not limit:
            assert self.running, "an idle pool must admit what it can hold"
            return
        # what is admitted must be allocated: to fail here would end SGLang's scheduler
        tokens = min(tokens, limit)
        self.allocator.evict_to_free_tokens(self.cache, tokens)
        out = self.allocator.alloc_extend(
            lens(0), lens(0), lens(tokens), lens(tokens), lens(-1), tokens
        )
        assert out is not None and len(torch.unique(out)) == tokens
        self.running.append(out)
        self._touch(decodes=False)

    @precondition(lambda self: self.running)
    @rule()
    def decode(self) -> None:
        """One token for everyone; whoever does not fit is retracted, the last one first."""
        while self.running:
            new_pages = sum(len(slots) % PAGE_TOKENS == 0 for slots in self.running)
            if self.allocator.check_decode_capacity(
                num_tokens=new_pages * PAGE_TOKENS, tree_cache=self.cache
            ):
                break
            assert len(self.running) > 1 or new_pages, "nothing is needed, yet refused"
            self.allocator.free_segment(self.running.pop(), start_pos=0)
        if not self.running:
            return
        self.allocator.evict_to_free_tokens(self.cache, len(self.running) * PAGE_TOKENS)
        seq_lens = lens(*(len(slots) + 1 for slots in self.running))
        last = torch.stack([slots[-1] for slots in self.running])
        out = self.allocator.alloc_decode(seq_lens, seq_lens, last)
        assert out is not None
        self.running = [
            torch.cat([slots, slot[None]]) for slots, slot in zip(self.running, out, strict=True)
        ]
        self._touch(decodes=True)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), cached=st.booleans())
    def finish(self, data: st.DataObject, cached: bool) -> None:
        """The full pages of a finished request go to the cache, its tail is freed."""
        slots = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        full = len(slots) // PAGE_TOKENS * PAGE_TOKENS if cached else 0
        if full:
            self.cache.sequences.append(slots[:full])
        self.allocator.free_segment(slots[full:], start_pos=full)

    @rule()
    def flush(self) -> None:
        self.allocator.clear()
        self.running.clear()
        self.cache.sequences.clear()

    @invariant()
    def consistent(self) -> None:
        assert self.allocator.verify_byte_accounting() == []
        held = sum(-(-len(s) // PAGE_TOKENS) for s in [*self.running, *self.cache.sequences])
        free = self.allocator.available_size() // PAGE_TOKENS
        assert held + free == self.allocator.num_pages
        usage = self.allocator.usage(self.cache.evictable_size())
        assert 0 <= usage <= 1
        pages = torch.cat([lens(), *self.running]) // PAGE_TOKENS
        assert not bool(self.allocator.store.directory.demotions[pages].any()), "somebody holds it"
        if not self.running:
            assert usage < 0.02, "nobody runs"


class LosslessMachine(AllocatorMachine):
    policy = "lossless"


class UniformMachine(AllocatorMachine):
    policy = "uniform"


class SnapKVMachine(AllocatorMachine):
    policy = "snapkv"


RUNS = settings(
    max_examples=15,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
for machine in (AllocatorMachine, LosslessMachine, UniformMachine, SnapKVMachine):
    machine.TestCase.settings = RUNS
TestDiffKVAllocator = AllocatorMachine.TestCase
TestLosslessAllocator = LosslessMachine.TestCase
TestUniformAllocator = UniformMachine.TestCase
TestSnapKVAllocator = SnapKVMachine.TestCase


def test_double_free_raises() -> None:
    allocator = make_allocator()
    slots = allocator.alloc(2 * PAGE_TOKENS)
    assert slots is not None
    allocator.free(slots)
    with pytest.raises(PageStateError, match="already free"):
        allocator.free(slots)


def test_reading_by_slot_raises() -> None:
    pool = make_allocator().get_kvcache()
    with pytest.raises(RuntimeError, match="only be read through the diffxkv backend"):
        pool.get_key_buffer(0)


@pytest.mark.parametrize("policy", ["diffkv", "lossless", "snapkv"])
def test_longest_request_is_admitted_alone(policy: str) -> None:
    """What `max_new_tokens_for_memory` lets in goes all the way, chunk by chunk, at its worst."""
    allocator = make_allocator(policy)
    cache = PrefixCache(allocator)
    capacity = allocator.store.ledger.largest_sequence * PAGE_TOKENS
    tokens = capacity - 2 * PAGE_TOKENS
    clip = {"token_capacity": allocator.size, "sliding_window_size": None, "chunk_size": 512}
    assert allocator.max_new_tokens_for_memory(tokens, 10**6, **clip) == PAGE_TOKENS - 1
    assert allocator.max_new_tokens_for_memory(capacity, 1, **clip) is None
    done, last = 0, lens(-1)
    while done < tokens:
        budget = allocator.create_prefill_budget(cache)
        chunk = budget.available_chunk_tokens(512) if done else 512
        assert chunk, "a request alone in the pool must go on"
        if not done:
            fits, chunk = budget.check_prefill(
                extend_input_len=tokens,
                total_tokens=tokens + PAGE_TOKENS,
                max_new_tokens=0,
                input_tokens=tokens,
                swa_host_hit_length=0,
                chunk_limit=512,
            )
            assert fits and chunk
        end = min(tokens, done + chunk)
        out = allocator.alloc_extend(lens(done), lens(done), lens(end), lens(end), last, end - done)
        assert out is not None
        pages = torch.unique(out // PAGE_TOKENS)
        allocator.store.begin_step(decodes=False)
        position = torch.arange(done // PAGE_TOKENS, -(-end // PAGE_TOKENS))
        allocator.store.touch(pages, position, torch.full((len(pages),), end), window=64)
        done, last = end, out[-1:]
        assert allocator.verify_byte_accounting() == []
