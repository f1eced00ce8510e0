# SPDX-License-Identifier: Apache-2.0
"""Speed of extend attention against SGLang's `torch_native`, and of packing and unpacking.

One layer of 32/8 heads, head_dim 128. The contestants of a case run in turn, so that whatever else
the machine does hits all alike; minimum and median over the rounds.

    python bench/kernels/extend.py [--rounds 7]     # writes bench/results/extend.{md,json}
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from sglang_diffxkv.kernels.attention_part import merge
from sglang_diffxkv.kernels.extend import extend_open, extend_sealed
from sglang_diffxkv.kernels.layout import FORMATS, HIGH, LOW, PAGE_TOKENS, PRUNED, make_layout
from sglang_diffxkv.kernels.pack import cpu, measure, pack, torch_ops

HQ, H, D = 32, 8, 128
SCALE = D**-0.5
RESULTS = Path(__file__).parents[1] / "results"


class Case(NamedTuple):
    """``batch`` sequences, each with ``prefix`` old (a multiple of 64) and ``new`` tokens."""

    batch: int
    prefix: int
    new: int
    sealed: bool
    dtype: torch.dtype

    @property
    def title(self) -> str:
        kind = "sealed" if self.sealed else "open"
        prefix = f" after {self.prefix} {kind}" if self.prefix else ""
        return f"{self.batch} × {self.new} new{prefix}, {str(self.dtype).removeprefix('torch.')}"


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
]


class Prepared(NamedTuple):
    """Raw pages of all tokens, and the prefix pages sealed with tiers 25/50/25."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    per_sequence: int
    seal_args: tuple[torch.Tensor, ...]
    arena: torch.Tensor


LAYOUT = make_layout(
    head_dim=D, num_kv_heads=H, raw_itemsize=2, high=FORMATS["K8V4"], low=FORMATS["K4V2"]
)


def prepare(case: Case) -> Prepared:
    per_sequence = -(-(case.prefix + case.new) // PAGE_TOKENS)
    pages = case.batch * per_sequence
    k, v = torch.randn(2, pages, PAGE_TOKENS, H, D).to(case.dtype)
    q = torch.randn(case.batch * case.new, HQ, D).to(case.dtype)
    choice = torch.multinomial(torch.tensor([0.25, 0.5, 0.25]), pages * H * PAGE_TOKENS, True)
    tiers = torch.tensor([HIGH, LOW, PRUNED], dtype=torch.uint8)[choice].view(pages, H, -1)
    heads, _ = measure(tiers, LAYOUT)
    frames = torch.randperm(pages * LAYOUT.max_frames).int().view(pages, -1)
    arena = torch.zeros(frames.numel(), LAYOUT.frame_bytes, dtype=torch.uint8)
    args = (k, v, torch.arange(pages), tiers, torch.zeros_like(tiers), frames, heads)
    pack(*args, arena, LAYOUT)
    return Prepared(q, k, v, per_sequence, args, arena)


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
        scaling=SCALE, enable_gqa=True, causal=True,
    )  # fmt: skip


def ours(case: Case, data: Prepared) -> Callable[[], torch.Tensor]:
    """Sealed prefix (where the case says so) and open pages, merged."""
    pages = torch.arange(case.batch * data.per_sequence).int().view(case.batch, -1)
    queries = torch.arange(case.batch + 1).int() * case.new
    old = case.prefix // PAGE_TOKENS if case.sealed else 0
    positions = torch.arange(old, data.per_sequence).int().repeat(case.batch)
    starts = torch.full((case.batch,), case.prefix).int()
    *_, frames, heads = data.seal_args
    counts = torch.arange(case.batch + 1).int()
    sealed_pages, open_pages = pages[:, :old].reshape(-1), pages[:, old:].reshape(-1)

    def run() -> torch.Tensor:
        part = extend_open(
            data.q, queries, starts, data.k, data.v, counts * (data.per_sequence - old),
            open_pages, positions, SCALE,
        )  # fmt: skip
        if old:
            more = extend_sealed(
                data.q, queries, data.arena, frames, heads, counts * old, sealed_pages, LAYOUT,
                SCALE,
            )  # fmt: skip
            part = merge(part, more)
        return part.out.to(data.q.dtype)

    return run


def packing() -> dict[str, Callable[[], None]]:
    """Packing and unpacking 32 pages of one layer, C++ and torch."""
    data = prepare(Case(1, 31 * PAGE_TOKENS, 1, True, torch.bfloat16))
    *_, frames, heads = data.seal_args
    n = len(frames)
    k, v = torch.zeros(2, n * H * PAGE_TOKENS, D)
    first = torch.arange(n * H).view(n, H) * PAGE_TOKENS
    reading = (data.arena, frames, heads, torch.arange(n), first, LAYOUT, torch.bfloat16, k, v)
    return {
        "pack 32 pages, C++": lambda: cpu.pack(*data.seal_args, data.arena, LAYOUT),
        "pack 32 pages, torch": lambda: torch_ops.pack(*data.seal_args, data.arena, LAYOUT),
        "unpack 32 pages, C++": lambda: cpu.unpack_into(*reading),
        "unpack 32 pages, torch": lambda: torch_ops.unpack_into(*reading),
    }


def timed(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Minimum and median milliseconds of each, interleaved, after one warm-up round."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_:
                samples[name].append(1e3 * (time.perf_counter() - start))
    return {
        name: {"min_ms": round(min(x), 2), "median_ms": round(sorted(x)[len(x) // 2], 2)}
        for name, x in samples.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    lines = [
        "# Extend attention on the CPU",
        "",
        f"`python bench/kernels/extend.py --rounds {rounds}`, {torch.get_num_threads()} threads, "
        f"load average {os.getloadavg()[0]:.1f} at the start. "
        f"One layer, {HQ}/{H} heads, head_dim {D}; sealed prefixes K8V4/K4V2, tiers 25/50/25. "
        "Milliseconds, minimum / median, runs interleaved.",
        "",
        "| case | torch_native | ours | times faster (min) |",
        "|---|---|---|---|",
    ]
    results: dict[str, object] = {}
    for case in CASES:
        data = prepare(case)
        times = timed({"stock": stock(case, data), "ours": ours(case, data)}, rounds)
        results[case.title] = times
        cells = [f"{x['min_ms']} / {x['median_ms']}" for x in times.values()]
        ratio = times["stock"]["min_ms"] / times["ours"]["min_ms"]
        lines.append(f"| {case.title} | {cells[0]} | {cells[1]} | {ratio:.2f} |")
    lines += ["", "| operation | ms, minimum / median |", "|---|---|"]
    for name, x in timed(packing(), rounds).items():
        results[name] = x
        lines.append(f"| {name} | {x['min_ms']} / {x['median_ms']} |")
    text = "\n".join(lines) + "\n"
    print(text)
    (RESULTS / "extend.md").write_text(text)
    (RESULTS / "extend.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
