# SPDX-License-Identifier: Apache-2.0
"""SGLang's allocator interface over the page store, randomised, with a small prefix cache."""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, EvictResult

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.policy.registry import make_policy
from sglang_diffxkv.pool.allocator import DiffXKVAllocator
from sglang_diffxkv.pool.kv_pool import DiffXKVPool, PoolSetup
from sglang_diffxkv.pool.request_rows import RequestRows
from sglang_diffxkv.pool.sizing import plan_pool
from sglang_diffxkv.pool.store import PageStateError
from tests.support.pages import ask, running, write
from tests.support.policies import config_of

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


class Request(NamedTuple):
    """A running request: its token slots, what it asked for, how long it may get, its row."""

    slots: torch.Tensor
    quality: Quality
    longest: int
    row: int

    @property
    def raw_pages(self) -> int:
        """What it may hold for long: as `patches.quality` reckons it."""
        return -(-self.longest // PAGE_TOKENS) if self.quality is Quality.LOSSLESS else 0


class AllocatorMachine(RuleBasedStateMachine):
    """Requests prefill, decode, finish into the cache or abort, as the scheduler has it."""

    policy = "diffkv"

    def __init__(self) -> None:
        super().__init__()
        self.allocator = make_allocator(self.policy)
        self.cache = PrefixCache(self.allocator)
        self.allocator.rows = self.rows = RequestRows(8192, torch.device("cpu"))
        self.free_rows = list(range(8192))
        self.running: list[Request] = []

    def _touch(self, decodes: bool) -> None:
        """What a forward pass notes: over all running requests, or over the newest one."""
        store = self.allocator.store
        store.begin_step(decodes)
        for slots, quality, _, row in self.running if decodes else self.running[-1:]:
            start, end = len(slots) - 1 if decodes else 0, len(slots)
            full = end // PAGE_TOKENS - start // PAGE_TOKENS
            store.ledger.write(end - start, full)
            noted = self.rows.note_quality([row], [start], [len(slots)])
            opened = slots[::PAGE_TOKENS][-(-start // PAGE_TOKENS) :] // PAGE_TOKENS
            store.set_quality(opened, torch.full_like(opened, quality, dtype=torch.uint8), noted)
            pages = slots[::PAGE_TOKENS] // PAGE_TOKENS
            position = torch.arange(len(pages))
            is_open = store.directory.raw_slot[pages] >= 0
            context = torch.full((int(is_open.sum()),), len(slots))
            store.touch(pages[is_open], position[is_open], context, window=64)
            store.read(pages[~is_open])

    @rule(
        tokens=st.integers(1, 700),
        answer=st.integers(1, 300),
        quality=st.sampled_from([Quality.BALANCED, Quality.LOSSLESS]),
    )
    def prefill(self, tokens: int, answer: int, quality: Quality) -> None:
        request = Request(lens(), quality, tokens + answer, self.free_rows[-1])
        held = sum(other.raw_pages for other in self.running)
        if request.raw_pages and held + request.raw_pages > self.allocator.lossless_pages:
            return
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
        self.running.append(request._replace(slots=out))
        entry = running(quality, self.allocator.store.next_step)
        self.rows.enter([self.free_rows.pop()], [entry])
        self._touch(decodes=False)

    @precondition(lambda self: self.running)
    @rule()
    def decode(self) -> None:
        """One token for everyone; whoever does not fit is retracted, the last one first."""
        for request in [r for r in self.running if len(r.slots) >= r.longest]:
            self._end(request, cached=True)
        while self.running:
            new_pages = sum(len(r.slots) % PAGE_TOKENS == 0 for r in self.running)
            if self.allocator.check_decode_capacity(
                num_tokens=new_pages * PAGE_TOKENS, tree_cache=self.cache
            ):
                break
            assert len(self.running) > 1 or new_pages, "nothing is needed, yet refused"
            last = self.running.pop()
            assert self.running or not last.raw_pages, "a lossless request fits alone"
            self.allocator.free_segment(last.slots, start_pos=0)
            self._leave(last)
        if not self.running:
            return
        self.allocator.evict_to_free_tokens(self.cache, len(self.running) * PAGE_TOKENS)
        seq_lens = lens(*(len(r.slots) + 1 for r in self.running))
        last_slots = torch.stack([r.slots[-1] for r in self.running])
        out = self.allocator.alloc_decode(seq_lens, seq_lens, last_slots)
        assert out is not None
        self.running = [
            r._replace(slots=torch.cat([r.slots, slot[None]]))
            for r, slot in zip(self.running, out, strict=True)
        ]
        self._touch(decodes=True)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), cached=st.booleans())
    def finish(self, data: st.DataObject, cached: bool) -> None:
        self._end(self.running[data.draw(st.integers(0, len(self.running) - 1))], cached)

    def _end(self, request: Request, cached: bool) -> None:
        """The full pages of a finished request go to the cache, its tail is freed."""
        self.running = [other for other in self.running if other is not request]
        slots = request.slots
        full = len(slots) // PAGE_TOKENS * PAGE_TOKENS if cached else 0
        if full:
            self.cache.sequences.append(slots[:full])
        self.allocator.free_segment(slots[full:], start_pos=full)
        self._leave(request)

    def _leave(self, request: Request) -> None:
        self.rows.leave([request.row])
        self.free_rows.append(request.row)

    @rule()
    def flush(self) -> None:
        self.allocator.clear()
        for request in self.running:
            self._leave(request)
        self.running.clear()
        self.cache.sequences.clear()

    @invariant()
    def consistent(self) -> None:
        assert self.allocator.check() == []
        running = [r.slots for r in self.running]
        held = sum(-(-len(s) // PAGE_TOKENS) for s in [*running, *self.cache.sequences])
        free = self.allocator.available_size() // PAGE_TOKENS
        assert held + free == self.allocator.num_pages
        usage = self.allocator.usage(self.cache)
        assert 0 <= usage <= 1
        pages = torch.cat([lens(), *running]) // PAGE_TOKENS
        assert not bool(self.allocator.store.directory.demotions[pages].any()), "somebody holds it"
        if not self.running:
            assert usage < 0.02, "nobody runs"


class LosslessMachine(AllocatorMachine):
    policy = "lossless"


class UniformMachine(AllocatorMachine):
    policy = "uniform"


class SnapKVMachine(AllocatorMachine):
    policy = "snapkv"


class DiffXKVMachine(AllocatorMachine):
    policy = "diffxkv"


RUNS = settings(
    max_examples=15,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
for machine in (
    AllocatorMachine,
    DiffXKVMachine,
    LosslessMachine,
    UniformMachine,
    SnapKVMachine,
):
    machine.TestCase.settings = RUNS
TestDiffXKVAllocator = DiffXKVMachine.TestCase
TestDiffKVAllocator = AllocatorMachine.TestCase
TestLosslessAllocator = LosslessMachine.TestCase
TestUniformAllocator = UniformMachine.TestCase
TestSnapKVAllocator = SnapKVMachine.TestCase


def cached_sequence(cache: PrefixCache, pages: int, quality: Quality) -> None:
    """A sequence that ran and ended."""
    allocator = cache.allocator
    slots = allocator.alloc(pages * PAGE_TOKENS)
    assert slots is not None
    ids, context = slots[::PAGE_TOKENS] // PAGE_TOKENS, torch.full((pages,), len(slots))
    allocator.store.begin_step(decodes=True)
    write(allocator.store, ids, torch.arange(pages), context)
    if quality is not Quality.BALANCED:
        ask(allocator.store, ids, [quality] * pages)
    cache.sequences.append(slots)


def test_lossless_prefixes_are_evicted_for_raw_pages() -> None:
    allocator = make_allocator()
    cache, ledger = PrefixCache(allocator), allocator.store.ledger
    raw = ledger.raw_total
    cached_sequence(cache, 2, Quality.LOSSLESS)
    cached_sequence(cache, 2, Quality.BALANCED)
    cached_sequence(cache, raw - 6, Quality.LOSSLESS)
    cached_sequence(cache, 1, Quality.BALANCED)
    assert (ledger.raw_free, ledger.raw_only) == (1, raw - 4)
    assert allocator.reclaim(cache, 4 * PAGE_TOKENS)
    assert len(cache.sequences) == 4, "sealing the balanced ones was enough"
    assert ledger.raw_free == 4
    assert allocator.reclaim(cache, 5 * PAGE_TOKENS)
    assert [len(s) // PAGE_TOKENS for s in cache.sequences] == [2, raw - 6, 1]
    assert ledger.raw_free == 6
    assert allocator.reclaim(cache, 7 * PAGE_TOKENS)
    # the oldest goes first, sealed as it is; what is younger than the last lossless one stays
    assert [len(s) // PAGE_TOKENS for s in cache.sequences] == [1]
    assert ledger.raw_free == raw and ledger.raw_only == 0


def test_held_lossless_pages_cost_no_prefix() -> None:
    """What is held comes free by no eviction, so nothing is evicted in vain."""
    allocator = make_allocator()
    cache, ledger = PrefixCache(allocator), allocator.store.ledger
    cached_sequence(cache, 3, Quality.BALANCED)
    cached_sequence(cache, ledger.raw_total - 3, Quality.LOSSLESS)
    cache.sequences.pop()  # as if it still ran
    assert not allocator.reclaim(cache, 4 * PAGE_TOKENS)
    assert [len(s) // PAGE_TOKENS for s in cache.sequences] == [3]
    assert allocator.usage(cache) == pytest.approx(1 - 3 / ledger.raw_total)
    assert allocator.reclaim(cache, 3 * PAGE_TOKENS)


def test_pressure_is_met_once_for_many_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raw pages run out: sealing makes room beyond the page that is asked for; so does eviction."""
    monkeypatch.setattr("sglang_diffxkv.pool.store.SPARE_SHARE", 1 / 4)
    allocator = make_allocator("uniform", mib=6)
    cache, store = PrefixCache(allocator), allocator.store
    raw = store.ledger.raw_total
    cached_sequence(cache, raw, Quality.BALANCED)
    store.begin_step(decodes=True)  # so that its window is nobody's
    assert store.ledger.raw_free == 0 and allocator.reclaim(cache, PAGE_TOKENS)
    assert store.ledger.raw_free == 1 + raw // 4 and store.counters.evicted == 0
    monkeypatch.setattr("sglang_diffxkv.pool.allocator.SPARE_SHARE", 1 / 8)
    while store.ledger.frame_headroom > 0:
        cached_sequence(cache, 1, Quality.BALANCED)
        store.begin_step(decodes=True)
        store.seal_cold(store.ledger.raw_total, include_window=True)
    cache.sequences = [page for slots in cache.sequences for page in slots.split(PAGE_TOKENS)]
    assert allocator.reclaim(cache, PAGE_TOKENS)
    assert store.ledger.frame_headroom >= 1 + store.ledger.largest_sequence // 8
    reclaims = store.counters.reclaims
    for _ in range(store.ledger.largest_sequence // 8):
        assert allocator.reclaim(cache, PAGE_TOKENS)
        assert allocator.alloc(PAGE_TOKENS) is not None
    assert store.counters.reclaims == reclaims, "there was room"


def test_nobody_holds_what_the_last_step_used() -> None:
    """Where nobody runs no step follows: a prompt must not wait for one."""
    allocator = make_allocator()
    allocator.rows = RequestRows(4, torch.device("cpu"))
    cache, raw = PrefixCache(allocator), allocator.store.ledger.raw_total
    cached_sequence(cache, raw - 1, Quality.LOSSLESS)
    # nor where the only one who runs is a prompt between two chunks, whose pages stay
    own = allocator.alloc(PAGE_TOKENS)
    assert own is not None
    write(allocator.store, own[:1] // PAGE_TOKENS, torch.tensor([0]), torch.tensor([PAGE_TOKENS]))
    ask(allocator.store, own[:1] // PAGE_TOKENS, [Quality.LOSSLESS])
    allocator.rows.enter([2], [running(Quality.LOSSLESS, allocator.store.step)])
    allocator.store.expect(own[:1] // PAGE_TOKENS)
    allocator.rows.stay(2, allocator.store.next_step)
    assert allocator.reclaim(cache, 3 * PAGE_TOKENS)
    assert not cache.sequences and allocator.store.ledger.raw_only == 1
    assert not allocator.reclaim(cache, raw * PAGE_TOKENS)


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
    assert allocator.max_new_tokens_for_memory(capacity, 1, **clip) == 0
    assert allocator.longest_prompt == tokens
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
        write(allocator.store, pages, position, torch.full((len(pages),), end))
        done, last = end, out[-1:]
        assert allocator.check() == []
