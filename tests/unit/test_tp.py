# SPDX-License-Identifier: Apache-2.0
"""Two tensor-parallel ranks in one process: other heads, other importances, the same decisions."""

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch

from sglang_diffxkv.config import ConfigError, DiffXKVConfig
from sglang_diffxkv.kernels.layout import FORMATS, PAGE_TOKENS, make_layout
from sglang_diffxkv.patches import pool_setup
from sglang_diffxkv.policy.budgeting.plan import solve_plan
from sglang_diffxkv.policy.budgeting.sketch import ImportanceSketch
from sglang_diffxkv.policy.importance.features import Rotary
from sglang_diffxkv.policy.importance.file import load_importance, save_importance
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.demotion import demote_cold
from sglang_diffxkv.pool.integrity import check_integrity
from sglang_diffxkv.pool.offload import load_back, offload_cold, replace
from sglang_diffxkv.pool.payload import adopt, read_payload
from sglang_diffxkv.pool.ranks import Agree, alone
from sglang_diffxkv.pool.reclaim import seal_cold
from sglang_diffxkv.pool.sealing import seal
from sglang_diffxkv.pool.store import PageStore
from tests.support.importance import random_importance
from tests.support.machines import AllocatorMachine
from tests.support.pages import EVERY_SLOT, write
from tests.support.policies import Shape
from tests.support.stores import make_store

T = TypeVar("T")
SHARED_TABLES = (
    "raw_slot",
    "sealed",
    "on_host",
    "num_frames",
    "position",
    "context",
    "filled",
    "quality",
    "demotions",
    "last_used",
    "window_step",
)
"""Of the directory: what the host decides by. The others are a rank's own."""


class Ranks:
    """Runs the same on both ranks at once, each in a thread, and lets them agree."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(2)
        self._barrier = threading.Barrier(2)
        self._values: list[torch.Tensor] = [torch.empty(0)] * 2
        self.agreements = 0

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown()

    def run(self, work: Callable[[int], T]) -> list[T]:
        return list(self._pool.map(work, (0, 1)))

    def agree(self, rank: int) -> Agree:
        def agree(values: torch.Tensor) -> torch.Tensor:
            self._values[rank] = values
            self._barrier.wait(timeout=60)
            ours, theirs = self._values
            assert ours.shape == theirs.shape, "not the same call on both ranks"
            most = torch.maximum(ours, theirs)
            self._barrier.wait(timeout=60)
            self.agreements += rank == 0
            return most

        return agree


def fill(store: PageStore, rank: int, pages: torch.Tensor, generator: torch.Generator) -> None:
    """Random tokens, of which each page has more that matter on one rank than on the other."""
    slots = store.directory.raw_slot[pages].long()
    for raw in (*store.raw.keys, *store.raw.values):
        raw[slots] = torch.randn(raw[slots].shape, generator=generator)
    scores = store.raw.scores[:, slots]
    scores = 10 ** (3 * torch.rand(scores.shape, generator=generator) - 1)
    # The first rank has most of the even pages, the second of the odd ones.
    scores[:, pages % 2 != rank] *= 0.1
    store.raw.scores[:, slots] = scores
    store.raw.counts[slots] = 2


def assert_alike(first: PageStore, second: PageStore) -> None:
    assert first.ledger == second.ledger
    assert first.counters == second.counters
    for name in SHARED_TABLES:
        tables = [getattr(store.directory, name) for store in (first, second)]
        assert torch.equal(*tables), name
    assert torch.equal(first.raw.page, second.raw.page)
    d = first.directory
    has_frames = (d.sealed | d.on_host).nonzero().flatten()
    owned = [store.directory.owned(has_frames) for store in (first, second)]
    assert torch.equal(torch.maximum(*owned), d.num_frames[has_frames])
    for store in (first, second):
        assert check_integrity(store) == []


@pytest.mark.parametrize("policy", ["diffkv", "diffxkv"])
def test_stores_stay_alike(policy: str) -> None:
    """Opened, sealed, demoted, moved to the host and back, adopted there and freed at random:
    charges are the maximum of what ranks take, wherever pages lie."""
    rng = random.Random(7)
    differed = [False, False]
    with Ranks() as ranks:
        stores = [make_store(policy, 6 << 20, host_bytes=1 << 20) for _ in range(2)]
        generators = [torch.Generator().manual_seed(rank) for rank in range(2)]
        for rank, store in enumerate(stores):
            store.agree = ranks.agree(rank)
        held: set[int] = set()
        free = set(range(1, stores[0].sizes.virtual_pages + 1))

        def on_both(work: Callable[[PageStore], object]) -> None:
            ranks.run(lambda rank: work(stores[rank]))

        def open_some() -> None:
            room = min(stores[0].ledger.headroom, len(free), 6)
            pages = torch.tensor(rng.sample(sorted(free), rng.randint(0, room)), dtype=torch.int64)
            free.difference_update(pages.tolist())
            held.update(pages.tolist())

            def work(rank: int) -> None:
                store, number = stores[rank], len(pages)
                store.begin_step(decodes=True)
                store.open(pages)
                fill(store, rank, pages, generators[rank])
                # Pages of two sequences at each position.
                context = torch.full((number,), number * PAGE_TOKENS + 70)
                write(store, pages, torch.arange(number) // 2, context)

            ranks.run(work)

        def release_some() -> None:
            number = rng.randint(0, len(held) // 4)
            pages = torch.tensor(rng.sample(sorted(held), number), dtype=torch.int64)
            on_both(lambda store: store.release(pages))
            held.difference_update(pages.tolist())
            free.update(pages.tolist())

        def seal_some() -> None:
            pages = stores[0].recency.sealable(EVERY_SLOT, include_window=True)[: rng.randint(0, 9)]
            sequence = torch.arange(len(pages)) // 5
            on_both(lambda store: seal(store, pages, sequence))

        def demote_some() -> None:
            more = rng.randint(1, 3)

            def work(store: PageStore) -> None:
                demote_cold(store, store.recency.step + 1, store.ledger.frame_headroom + more)

            on_both(work)

        def seal_coldest() -> None:
            more = rng.randint(1, 6)
            on_both(lambda s: seal_cold(s, s.ledger.headroom + more, include_window=True))

        def offload_some() -> None:
            more, held_since = rng.randint(1, 30), stores[0].recency.step + rng.randint(-2, 1)
            on_both(lambda s: offload_cold(s, held_since, s.ledger.frame_headroom + more))

        def some_on_host() -> torch.Tensor:
            away = stores[0].directory.on_host.nonzero().flatten()
            return away[torch.randperm(len(away))[: rng.randint(0, 8)]]

        def load_some_back() -> None:
            pages = some_on_host()
            if stores[0].share(pages).frames <= stores[0].ledger.frames_free:
                on_both(lambda store: load_back(store, pages))

        def adopt_some() -> None:
            pages = some_on_host()
            if stores[0].share(pages).frames <= stores[0].ledger.host_free:
                copies = torch.tensor(sorted(free)[: len(pages)])
                free.difference_update(copies.tolist())
                held.update(copies.tolist())
                on_both(lambda store: adopt(store, copies, read_payload(store, pages)))

        def replace_some() -> None:
            pages, computed = some_on_host(), stores[0].directory.raw_slot.gt(0).nonzero().flatten()
            number = min(len(pages), len(computed))
            on_both(lambda store: replace(store, pages[:number], computed[:number]))

        seal_or_free = [open_some, open_some, seal_some, seal_coldest, demote_some, release_some]
        move = [offload_some, offload_some, load_some_back, adopt_some, replace_some]
        for _ in range(300):
            rng.choice([*seal_or_free, *move])()
            assert_alike(*stores)
            for rank, store in enumerate(stores):
                sealed = store.directory.sealed.nonzero().flatten()
                short = store.directory.owned(sealed) < store.directory.num_frames[sealed]
                differed[rank] |= bool(short.any())
        counters = stores[0].counters
    assert min(counters.sealed, counters.demoted, counters.released) > 20
    assert min(counters.offloaded, counters.loaded_back, counters.prefetched) > 20
    assert all(differed), "each rank takes fewer than are allocated, at times"


class RankMachine(AllocatorMachine):
    """One rank's allocator under the load of `AllocatorMachine`, with importances of its own."""

    rank = 0

    def _touch(self, decodes: bool, start: int = 0) -> None:
        super()._touch(decodes, start)
        store = self.allocator.store
        pages = store.raw.page[1:].long()
        pages = pages[pages > 0]
        generator = torch.Generator().manual_seed(2 * store.recency.step + self.rank)
        fill(store, self.rank, pages, generator)


def test_allocators_decide_alike() -> None:
    """Requests over memory: who is admitted, what is sealed, demoted and evicted."""
    rng = random.Random(11)
    first = SimpleNamespace(draw=lambda _: 0)
    with Ranks() as ranks:
        machines = [RankMachine(), RankMachine()]
        for rank, machine in enumerate(machines):
            machine.rank = rank
            machine.allocator.store.agree = ranks.agree(rank)

        def on_both(work: Callable[[RankMachine], object]) -> None:
            ranks.run(lambda rank: work(machines[rank]))
            assert_alike(*(machine.allocator.store for machine in machines))
            ours, theirs = machines
            assert torch.equal(ours.allocator.free_pages, theirs.allocator.free_pages)
            assert len(ours.running) == len(theirs.running)
            for one, other in zip(ours.running, theirs.running, strict=True):
                assert torch.equal(one.slots, other.slots)
            assert ours.allocator.capacity.usage(ours.cache) == theirs.allocator.capacity.usage(
                theirs.cache
            )

        for _ in range(50):
            tokens, answer = rng.randint(100, 700), rng.randint(1, 200)
            quality = rng.choices([Quality.BALANCED, Quality.LOSSLESS], [5, 1])[0]
            on_both(lambda m: m.prefill(tokens=tokens, answer=answer, quality=quality))  # noqa: B023
            if machines[0].cache.sequences:
                more = rng.randint(1, 200)
                on_both(lambda m: m.prefill_behind_a_prefix(data=first, tokens=more))  # noqa: B023
            for _ in range(rng.randint(0, 15)):
                on_both(lambda m: m.decode())
            while len(machines[0].running) > 2:
                on_both(lambda m: m.finish(data=first, cached=True))
            on_both(lambda m: m.consistent())
        counters = machines[0].allocator.store.counters
    assert min(counters.sealed, counters.demoted, counters.evicted, counters.offloaded) > 20
    assert counters.loaded_back > 0
    assert ranks.agreements > 20


def test_sizes_follow_from_what_ranks_agree_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Ranks that have other plans, and other memory left, get pools of the same size."""
    layout = make_layout(
        head_dim=64, num_kv_heads=1, raw_itemsize=2, high=FORMATS["K8V4"], low=FORMATS["K4V2"]
    )
    for rank in (0, 1):
        sketch = ImportanceSketch.empty(3, 1, "cpu")
        importance = torch.rand(40, 3, 1, 64) ** (1 + 9 * rank)
        sketch.update(importance, torch.ones(40, 64, dtype=torch.bool))
        model, path = Shape(layers=3, heads=1), tmp_path / f"{rank}.safetensors"
        save_importance(random_importance(Rotary(64), model, hidden=3 + 400 * rank), path)
        found = load_importance(path, layout, 3)
        plan = solve_plan(1, 0.95, sketch, layout, importance=found.sha256)
        plan.save(tmp_path / f"plan-{rank}.json")
    plans, importance = (
        str(tmp_path / name) for name in ("plan-{rank}.json", "{rank}.safetensors")
    )
    config = DiffXKVConfig(target=0.95, plan=plans, importance=importance)
    configurator = SimpleNamespace(
        model_config=SimpleNamespace(
            head_dim=64, dtype=torch.bfloat16, get_num_kv_heads=lambda ranks: 2 // ranks
        ),
        layer_info=SimpleNamespace(
            num_effective_layers=3, full_attention_layer_ids=None, swa_attention_layer_ids=None
        ),
        mambaish_config=None,
        spec_aux_config=SimpleNamespace(draft_kv_num_layers=None),
        kv_cache_dtype=torch.bfloat16,
        device="cpu",
    )
    current = threading.local()
    monkeypatch.setattr("sglang.srt.runtime_context.get_parallel", lambda: current.parallel)
    monkeypatch.setattr(pool_setup, "_check_chunk", lambda *sizes: None)
    monkeypatch.setattr(pool_setup, "make_agreement", lambda group: group)
    with Ranks() as ranks:

        def setup_of(rank: int, size: int, agree: Agree) -> Any:
            current.parallel = SimpleNamespace(
                attn_tp_rank=rank, attn_tp_size=size, attn_tp_group=agree
            )
            budget = (9 + rank) << 20
            return pool_setup.make_setup(config, configurator, budget, None)

        first, second = ranks.run(lambda rank: setup_of(rank, 2, ranks.agree(rank)))
    assert first.sizes == second.sizes
    assert first.policy.nbytes < second.policy.nbytes
    assert first.policy.expected_fill != second.policy.expected_fill
    assert first.policy.config.plan == str(tmp_path / "plan-0.json")


def test_a_rank_alone_agrees_with_itself() -> None:
    values = torch.tensor([3, 1])
    assert pool_setup.make_agreement(SimpleNamespace(world_size=1)) is alone
    assert torch.equal(alone(values), values)


def test_plans_of_ranks_have_files_of_their_own() -> None:
    config = DiffXKVConfig(plan="a-{rank}.json", save_plan="b.json")
    assert config.of_rank(0, 1) == DiffXKVConfig(plan="a-0.json", save_plan="b.json")
    with pytest.raises(ConfigError, match=r"save_plan = .* with 2 ranks"):
        config.of_rank(1, 2)
    assert DiffXKVConfig().of_rank(1, 2) == DiffXKVConfig()
