# SPDX-License-Identifier: Apache-2.0
"""Speed of extend attention against SGLang's `torch_native`; of scoring, packing and unpacking.

One layer. The contestants of a case run in turn, so that whatever else the machine does hits all
alike: times are minimum and median over the rounds, ratios are of each round.

    python bench/kernels/extend.py [--rounds 7] [--threads 1 2]   # bench/results/extend.{md,json}
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from sglang_diffxkv.kernels.extend.prefill import Prefill, PrefillBatch
from sglang_diffxkv.kernels.layout import (
    HIGH,
    LOW,
    PAGE_TOKENS,
    PRUNED,
    PageLayout,
    measure,
)
from sglang_diffxkv.kernels.pack import Grades, RawTokens, TokenRows, pack, unpack_into
from sglang_diffxkv.kernels.pages import LayerPages, OpenLists, OpenPages, SealedLists, SealedTables
from sglang_diffxkv.kernels.score import ScoringQueries, score_open
from sglang_diffxkv.kernels.softmax import Softmax
from tests.support import torch_pack
from tests.support.layouts import layout_of

RESULTS = Path(__file__).parents[1] / "results"


class Shape(NamedTuple):
    """Heads of queries and of keys, and elements of one."""

    heads: int
    kv_heads: int
    dim: int

    @property
    def layout(self) -> PageLayout:
        return layout_of(head_dim=self.dim, kv_heads=self.kv_heads, itemsize=2)


LLAMA_8B, SMOLLM2_135M = Shape(32, 8, 128), Shape(9, 3, 64)


class Case(NamedTuple):
    """``batch`` sequences, each with ``prefix`` old (a multiple of 64) and ``new`` tokens."""

    batch: int
    prefix: int
    new: int
    sealed: bool
    dtype: torch.dtype
    shape: Shape = LLAMA_8B

    @property
    def title(self) -> str:
        kind = "sealed" if self.sealed else "open"
        prefix = f" after {self.prefix} {kind}" if self.prefix else ""
        dtype = str(self.dtype).removeprefix("torch.")
        heads, kv_heads, dim = self.shape
        shape = "" if self.shape == LLAMA_8B else f", {heads}/{kv_heads} heads of {dim}"
        return f"{self.batch} × {self.new} new{prefix}, {dtype}{shape}"


CASES = [
    Case(batch, prefix, new, sealed, dtype)
    for dtype in (torch.bfloat16, torch.float32)
    for batch, prefix, new, sealed in (
        (1, 0, 1024, False),
        (8, 0, 128, False),
        (1, 2048, 256, False),
        (1, 2048, 256, True),
        (8, 1024, 1, True),
    )
] + [Case(16, 0, 512, False, dtype, SMOLLM2_135M) for dtype in (torch.bfloat16, torch.float32)]


class Prepared(NamedTuple):
    """Raw pages of all tokens, and the prefix pages sealed with tiers 25/50/25."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    per_sequence: int
    grades: Grades
    tables: SealedTables


def prepare(case: Case) -> Prepared:
    per_sequence = -(-(case.prefix + case.new) // PAGE_TOKENS)
    pages, (hq, h, d), layout = case.batch * per_sequence, case.shape, case.shape.layout
    k, v = torch.randn(2, pages, PAGE_TOKENS, h, d).to(case.dtype)
    q = torch.randn(case.batch * case.new, hq, d).to(case.dtype)
    choice = torch.multinomial(torch.tensor([0.25, 0.5, 0.25]), pages * h * PAGE_TOKENS, True)
    tiers = torch.tensor([HIGH, LOW, PRUNED], dtype=torch.uint8)[choice].view(pages, h, -1)
    heads, _ = measure(tiers, layout)
    frames = torch.randperm(pages * layout.max_frames).int().view(pages, -1)
    arena = torch.zeros(frames.numel(), layout.frame_bytes, dtype=torch.uint8)
    grades = Grades(tiers, torch.zeros_like(tiers))
    tables = SealedTables(arena, frames, heads, layout)
    pack(RawTokens(k, v, torch.arange(pages)), grades, tables)
    return Prepared(q, k, v, per_sequence, grades, tables)


def stock(case: Case, data: Prepared) -> Callable[[], torch.Tensor]:
    """SGLang's own loop over sequences, reading raw tokens."""
    backend = object.__new__(TorchNativeAttnBackend)
    capacity = data.per_sequence * PAGE_TOKENS
    table = torch.arange(case.batch * capacity).view(case.batch, capacity)
    prefix = torch.full((case.batch,), case.prefix)
    new = torch.full((case.batch,), case.new)
    caches = data.k.flatten(0, 1), data.v.flatten(0, 1)
    rows = torch.arange(case.batch)
    return lambda: backend._run_sdpa_forward_extend(
        data.q, torch.empty_like(data.q), *caches, table, rows, prefix + new, prefix, new,
        scaling=case.shape.dim**-0.5, enable_gqa=True, causal=True,
    )  # fmt: skip


def ours(case: Case, data: Prepared) -> Callable[[], torch.Tensor]:
    """Sealed prefix (where the case says so) and open pages, as the backend attends to them."""
    pages = torch.arange(case.batch * data.per_sequence).int().view(case.batch, -1)
    counts = torch.arange(case.batch + 1).int()
    old = case.prefix // PAGE_TOKENS if case.sealed else 0
    opened = OpenLists(
        counts * (data.per_sequence - old),
        pages[:, old:].flatten().contiguous(),
        torch.arange(old, data.per_sequence).int().repeat(case.batch),
    )
    batch = PrefillBatch(
        indptr=counts * case.new,
        position=torch.full((case.batch,), case.prefix, dtype=torch.int32),
        opened=opened,
        last_len=torch.full((case.batch,), (case.prefix + case.new - 1) % PAGE_TOKENS + 1),
        sealed=SealedLists(counts * old, pages[:, :old].flatten().contiguous()) if old else None,
        new=[case.new] * case.batch,
        prefix=[case.prefix] * case.batch,
    )
    step = Prefill(batch, None)
    mean = torch.zeros(data.k.shape[2:]) if data.tables.layout.rotates else None
    layer = LayerPages(data.tables, data.k, data.v, mean)

    def run() -> torch.Tensor:
        return step.attend(data.q, layer, Softmax(case.shape.dim**-0.5)).out.to(data.q.dtype)

    return run


def packing() -> dict[str, Callable[[], None]]:
    """Packing and unpacking 32 pages of one layer, in C++ and in vectorised torch."""
    case = Case(1, 31 * PAGE_TOKENS, 1, True, torch.bfloat16)
    data, (_, h, d) = prepare(case), case.shape
    n = len(data.tables.frames)
    raw = RawTokens(data.k, data.v, torch.arange(n))
    first = torch.arange(n * h).view(n, h) * PAGE_TOKENS
    rows = TokenRows(*torch.zeros(2, n * h * PAGE_TOKENS, d), first)
    reading = data.tables, torch.arange(n), rows, torch.bfloat16
    return {
        "pack 32 pages, C++": lambda: pack(raw, data.grades, data.tables),
        "pack 32 pages, torch": lambda: torch_pack.pack(raw, data.grades, data.tables),
        "unpack 32 pages, C++": lambda: unpack_into(*reading),
        "unpack 32 pages, torch": lambda: torch_pack.unpack_into(*reading),
    }


def scoring(queries: int = 64, tokens: int = 1024) -> dict[str, Callable[[], None]]:
    """Scores of one sequence's open pages, half of its queries from the end as `diffxkv` has it."""
    pages, (hq, h, d) = tokens // PAGE_TOKENS, LLAMA_8B
    strided = torch.arange(queries // 2) * (tokens // queries)
    position = torch.cat([strided, torch.arange(tokens - queries // 2, tokens)]).int()
    q = torch.randn(queries, hq, d).bfloat16()
    key = torch.randn(pages, PAGE_TOKENS, h, d).bfloat16()
    lse = 8 + torch.rand(queries, hq)
    ends, slots = (torch.tensor([0, n]).int() for n in (queries, pages)), torch.arange(pages).int()
    q_indptr, indptr = ends
    args = ScoringQueries(q, lse, q_indptr, position), OpenPages(key, key, indptr, slots, slots)
    accum = torch.zeros(pages, h, PAGE_TOKENS)
    title = f"score {queries} queries of 1 × {tokens}, {hq}/{h} heads of {d}"
    return {title: lambda: score_open(*args, accum, d**-0.5)}


def timed(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each in every round, interleaved, after one warm-up round."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_:
                samples[name].append(round(1e3 * (time.perf_counter() - start), 3))
    return samples


def cell(samples: list[float]) -> str:
    return f"{min(samples):.2f} / {median(samples):.2f}"


def attention(rounds: int) -> tuple[list[str], dict[str, object]]:
    """Rows of the table, and all samples."""
    lines = [
        "| case | torch_native | ours | times faster: by minima | per round: median (range) |",
        "|---|---|---|---|---|",
    ]
    results: dict[str, object] = {}
    for case in CASES:
        data = prepare(case)
        times = timed({"stock": stock(case, data), "ours": ours(case, data)}, rounds)
        results[case.title] = times
        stocks, mine = times.values()
        ratios = [a / b for a, b in zip(stocks, mine, strict=True)]
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        minima = min(stocks) / min(mine)
        lines.append(f"| {case.title} | {cell(stocks)} | {cell(mine)} | {minima:.2f} | {spread} |")
    return lines, results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    args = parser.parse_args()
    torch.manual_seed(0)
    threads = " ".join(map(str, args.threads))
    lines = [
        "# Extend attention on the CPU",
        "",
        f"`python bench/kernels/extend.py --rounds {args.rounds} --threads {threads}`, "
        f"load average {os.getloadavg()[0]:.1f} at the start. One layer, 32/8 heads of 128 if not "
        "said otherwise; sealed prefixes K8V4/K4V2, tiers 25/50/25. Milliseconds, minimum / "
        "median, runs interleaved.",
    ]
    results: dict[str, object] = {}
    for number in args.threads:
        torch.set_num_threads(number)
        rows, samples = attention(args.rounds)
        lines += ["", f"## {number} thread{'s' * (number > 1)}", "", *rows]
        lines += ["", "| operation | ms, minimum / median |", "|---|---|"]
        for name, x in timed(scoring() | packing(), args.rounds).items():
            samples[name] = x
            lines.append(f"| {name} | {cell(x)} |")
        results[f"{number} threads"] = samples
    text = "\n".join(lines) + "\n"
    print(text)
    (RESULTS / "extend.md").write_text(text)
    (RESULTS / "extend.json").write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
