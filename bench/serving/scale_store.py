# SPDX-License-Identifier: Apache-2.0
"""What the host does for a pool of Llama-3.1-8B's shape, from 22 GB to 2.2 TB, by number of pages.

The pools are reserved, not touched, so they need not fit the machine. Each holds the same content,
and each operation is timed on all of them in turn. `bench.serving.scale` has whole servers.

    python -m bench.serving.scale_store [--rounds 30]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.peak import peak_bytes
from bench.serving.common import MIB, PAGE_TOKENS, table, write_results
from sglang_diffxkv.attention.batch_pages import gather_pages, note_use, page_table
from sglang_diffxkv.attention.ready_pages import pages_to_seal
from sglang_diffxkv.config import DiffXKVConfig
from sglang_diffxkv.metrics import pool_gauges, pool_stats
from sglang_diffxkv.pool.clock import ClockHand
from sglang_diffxkv.pool.recency import RAW_WINDOW, SEALED_WINDOW
from sglang_diffxkv.pool.sealing import seal
from sglang_diffxkv.pool.sizing import DEMOTION_SLACK
from tests.support.policies import Shape
from tests.support.stores import PrefixCache, allocator_of

SHAPE = Shape(layers=32, heads=8, dim=128, dtype=torch.bfloat16)
GB = 10**9
SIZES = {"22 GB": 22 * GB, "100 GB": 100 * GB, "1 TB": 1000 * GB, "2.2 TB": 2200 * GB}
CACHED, RUNNING, LENGTH, NEW = 192, 16, 1000, 8
PEAK_PAGES, PEAK_BUDGET = 2400, 120 * GB


class Pool:
    """A pool with `CACHED` pages in its cache and `RUNNING` sequences of `LENGTH` tokens."""

    def __init__(self, budget: int) -> None:
        share = DiffXKVConfig().raw_share
        self.allocator = allocator_of(DiffXKVConfig(), budget, SHAPE, share, DEMOTION_SLACK)
        self.store = self.allocator.store
        self.sizes = self.store.sizes
        self.cache = PrefixCache(self.allocator)

    def fill(self) -> None:
        self.cached = self.sequence(CACHED * PAGE_TOKENS)
        self.seal(self.cached)
        self.table = torch.zeros(RUNNING, 2048, dtype=torch.int32)
        for row in range(RUNNING):
            slots = self.sequence(LENGTH)
            self.table[row, :LENGTH] = slots.int()
            self.seal(slots[: LENGTH // PAGE_TOKENS * PAGE_TOKENS - PAGE_TOKENS])
        self.lens = torch.full((RUNNING,), LENGTH)
        self.store.begin_step(decodes=True)

    def sequence(self, tokens: int) -> torch.Tensor:
        """Slots of a sequence that has been prefilled."""
        zero, end = torch.tensor([0]), torch.tensor([tokens])
        slots = self.allocator.alloc_extend(zero, zero, end, end, zero - 1, tokens)
        assert slots is not None
        pages = slots[::PAGE_TOKENS] // PAGE_TOKENS
        raw = self.store.directory.raw_slot[pages].long()
        scores = torch.rand(SHAPE.layers, len(pages), SHAPE.heads, PAGE_TOKENS)
        self.store.raw.scores[:, raw] = 8 * scores**8
        self.store.raw.counts[raw] = 8
        self.store.begin_step(decodes=False)
        where = torch.arange(len(pages))
        self.store.ledger.commit(tokens, tokens // PAGE_TOKENS)
        self.store.recency.touch(pages, where, torch.full((len(pages),), tokens), window=64)
        return slots

    def seal(self, slots: torch.Tensor) -> None:
        pages = slots[::PAGE_TOKENS] // PAGE_TOKENS
        seal(self.store, pages, torch.zeros_like(pages))

    # -- what is timed --

    def idle_check(self) -> None:
        assert self.allocator.verify_byte_accounting() == []

    def statistics(self) -> None:
        pool_stats(self.store)

    def load_and_gauges(self) -> None:
        self.allocator.capacity.usage(self.cache)
        pool_gauges(self.store)

    def admission(self) -> None:
        budget = self.allocator.create_prefill_budget(self.cache)
        assert budget.has_capacity() and budget.remaining_current > 0
        fits, _ = budget.check_prefill(
            extend_input_len=640, total_tokens=768, max_new_tokens=64, input_tokens=640,
            swa_host_hit_length=0, chunk_limit=2048,
        )  # fmt: skip
        assert fits

    def decode_step(self) -> None:
        """All that the host does for one, attention aside; nothing is sealed."""
        assert self.allocator.check_decode_capacity(num_tokens=0, tree_cache=self.cache)
        store, rows = self.store, torch.arange(RUNNING)
        store.begin_step(decodes=True)
        pages = gather_pages(store, page_table(self.table, rows, LENGTH), self.lens)
        note_use(store, pages, self.lens, 64)
        pages_to_seal(store, pages, self.lens - 1)

    def open_and_free(self) -> None:
        """A prompt of some pages comes and goes."""
        slots = self.allocator.alloc(NEW * PAGE_TOKENS)
        assert slots is not None
        self.allocator.free_segment(slots, start_pos=0)

    def reclaim_by_sealing(self) -> None:
        """No raw page is free: the pages of a request that has ended are sealed."""
        slots = self.sequence(NEW * PAGE_TOKENS)
        self.store.begin_step(decodes=True)
        self.store.begin_step(decodes=True)
        # Where raw pages are short, all of them are in use, and the next window has cold ones.
        self.store.recency.raw_hand = ClockHand(self.sizes.raw_pages, RAW_WINDOW)
        with self.only(raw_total=self.store.ledger.open_pages):
            begin = time.perf_counter()
            assert self.allocator.reclaimer.reclaim(self.cache, NEW * PAGE_TOKENS)
            self.seconds = time.perf_counter() - begin
        self.allocator.free_segment(slots, start_pos=0)

    def reclaim_by_demotion(self) -> None:
        """No frame is free: cold pages lose tiers."""
        ledger = self.store.ledger
        demoted, needed = self.store.counters.demoted, ledger.frame_headroom
        self.store.recency.sealed_hand = ClockHand(self.sizes.virtual_pages, SEALED_WINDOW)
        with self.only(frames_total=ledger.frames_total - needed * ledger.worst_frames):
            begin = time.perf_counter()
            self.allocator.reclaimer.reclaim(self.cache, PAGE_TOKENS)
            self.seconds = time.perf_counter() - begin
        assert self.store.counters.demoted > demoted

    def reclaim_by_eviction(self) -> None:
        """No frame is free, and all that is cold has been demoted: a prefix is evicted."""
        ledger = self.store.ledger
        slots = self.sequence(NEW * PAGE_TOKENS)
        self.seal(slots)
        self.store.directory.demotions[slots[::PAGE_TOKENS] // PAGE_TOKENS] = 0
        self.cache.sequences.append(slots)
        needed = ledger.frame_headroom
        with self.only(frames_total=ledger.frames_total - needed * ledger.worst_frames):
            begin = time.perf_counter()
            self.allocator.reclaimer.evict_until(self.cache, lambda: ledger.frame_headroom >= 1)
            self.seconds = time.perf_counter() - begin
        assert not self.cache.sequences

    def only(self, **totals: int) -> Any:
        return _Shrunk(self.store.ledger, totals)


class _Shrunk:
    """A ledger that has less, for a while."""

    def __init__(self, ledger: Any, totals: dict[str, int]) -> None:
        self._ledger, self._totals = ledger, totals

    def __enter__(self) -> None:
        self._before = {name: getattr(self._ledger, name) for name in self._totals}
        self._set(self._totals)

    def __exit__(self, *exc: object) -> None:
        self._set(self._before)

    def _set(self, totals: dict[str, int]) -> None:
        for name, value in totals.items():
            setattr(self._ledger, name, value)


OPERATIONS: dict[str, tuple[Callable[[Pool], None], int]] = {
    "idle check": (Pool.idle_check, 20),
    "`/diffxkv/stats`": (Pool.statistics, 20),
    "usage and gauges": (Pool.load_and_gauges, 20),
    "admission of a prompt": (Pool.admission, 20),
    f"decode step of {RUNNING}, host side": (Pool.decode_step, 10),
    f"{NEW} pages opened and freed": (Pool.open_and_free, 10),
    f"reclaim: {NEW} pages sealed": (Pool.reclaim_by_sealing, 1),
    "reclaim: cold pages demoted": (Pool.reclaim_by_demotion, 1),
    "reclaim: a prefix evicted": (Pool.reclaim_by_eviction, 1),
}
"""With how many runs make a sample."""


def sample(pool: Pool, operation: Callable[[Pool], None], runs: int) -> float:
    """Microseconds of one run; of its own stopwatch where it has one."""
    pool.seconds = 0.0
    begin = time.perf_counter()
    for _ in range(runs):
        operation(pool)
    whole = time.perf_counter() - begin
    return 1e6 * (pool.seconds or whole / runs)


def measure(pools: Sequence[Pool], name: str, rounds: int) -> list[list[float]]:
    """Microseconds [round][pool], in an order that turns."""
    operation, runs = OPERATIONS[name]
    order = list(range(len(pools)))
    found = []
    if operation is Pool.reclaim_by_demotion:
        rounds = min(rounds, 10)  # so many pages can be demoted
    for number in range(rounds + 1):
        row = [0.0] * len(pools)
        for i in order[:: 1 if number % 2 else -1]:
            row[i] = sample(pools[i], operation, runs)
        found.append(row)
    return found[1:]  # the first one warms up


def resident() -> int:
    """Bytes of anonymous memory that this process has."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon"))


def built(budget: int) -> tuple[Pool, dict[str, float]]:
    before, begin = resident(), time.perf_counter()
    pool = Pool(budget)
    cost = {"seconds": time.perf_counter() - begin, "resident": resident() - before}
    pool.fill()
    return pool, cost


def sealing_peak() -> dict[str, Any]:
    """Memory beside the pool while thousands of pages of many prompts are sealed at once."""
    pool = Pool(PEAK_BUDGET)
    slots = [pool.sequence(32 * PAGE_TOKENS) for _ in range(PEAK_PAGES // 32)]
    pages = torch.cat(slots)[::PAGE_TOKENS] // PAGE_TOKENS
    sequence = torch.arange(len(pages)) // 32
    begin = time.perf_counter()
    peak = peak_bytes(lambda: seal(pool.store, pages, sequence))
    return {
        "pages": len(pages),
        "peak_bytes": peak,
        "workspace_bytes": pool.sizes.workspace.nbytes,
        "seconds": time.perf_counter() - begin,
    }


def report(result: dict[str, Any]) -> str:
    names = list(result["pools"])
    rows: list[list[object]] = [["", *names]]
    rows.append(["virtual pages", *(f"{x['virtual_pages']:,}" for x in result["pools"].values())])
    for key, scale, unit in (("seconds", 1e3, "ms"), ("resident", 1 / MIB, "MiB")):
        cells = [f"{x['made'][key] * scale:.0f}" for x in result["pools"].values()]
        rows.append([f"making it: {key}, {unit}", *cells])
    for name, found in result["microseconds"].items():
        cells = []
        for i in range(len(names)):
            ratios = [row[i] / row[0] for row in found]
            cells.append(
                f"{median(row[i] for row in found):.0f} ({median(ratios):.2f}; "
                f"{min(ratios):.2f}–{max(ratios):.2f})"
            )
        rows.append([f"{name}, µs", *cells])
    peak = result["sealing"]
    return (
        f"Llama-3.1-8B's shape, bfloat16, the default policy, on a CPU: pools that are reserved "
        f"and not touched, but for the same {CACHED} cached pages and {RUNNING} sequences of "
        f"{LENGTH} tokens in each. Medians; in brackets those of the ratio to the smallest pool "
        f"within a round, the least and the most.\n\n{table(rows)}\n\n"
        f"Sealing {peak['pages']:,} pages at once took at most {peak['peak_bytes'] / MIB:.1f} MiB "
        f"beside the pool; {peak['workspace_bytes'] / MIB:.1f} MiB of its budget are set aside "
        f"for that."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    torch.set_num_threads(1)
    made = {name: built(budget) for name, budget in SIZES.items()}
    pools = [pool for pool, _ in made.values()]
    result: dict[str, Any] = {
        "pools": {
            name: {"virtual_pages": pool.sizes.virtual_pages, "made": cost}
            for name, (pool, cost) in made.items()
        },
        "microseconds": {name: measure(pools, name, rounds) for name in OPERATIONS},
    }
    for pool in pools:
        assert pool.store.problems() == [], pool.store.problems()
    del made, pools, pool
    result["sealing"] = sealing_peak()
    write_results("scale_store", "The host's work by the size of the pool", result, report(result))


if __name__ == "__main__":
    main()
