# SPDX-License-Identifier: Apache-2.0
"""Speed of decode attention over sealed pages, against uncompressed bf16 on the same CPU.

One layer of 32/8 heads, head_dim 128, 4,096 tokens to a sequence, tiers 25/50/25 (K8V4, K4V2,
pruned). The contestants run in turn, so that whatever else the machine does hits all alike, and
each run takes the next of several layers, so that nothing stays in the L3 cache. A turn repeats
short runs for a tenth of a second or more, since a shared machine's scheduler would otherwise
decide the result. Results are verified first: sealed attention against float64, uncompressed
contestants against each other.

    python bench/kernels/decode.py [--rounds 15]     # writes bench/results/decode_cpu.{md,json}
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import sglang
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from sglang_diffxkv.kernels.cpu.build import ISA_VARIABLE, available_isas
from sglang_diffxkv.kernels.cpu.function import CFunction
from sglang_diffxkv.kernels.decode import cpu, decode_open, decode_sealed, naive
from sglang_diffxkv.kernels.layout import (
    HIGH,
    LOW,
    PAGE_TOKENS,
    PRUNED,
    measure,
)
from sglang_diffxkv.kernels.pack import Grades, RawTokens, pack
from sglang_diffxkv.kernels.pages import OpenPages, SealedTables
from sglang_diffxkv.kernels.softmax import Softmax
from tests.support.layouts import layout_of

HQ, H, D, TOKENS = 32, 8, 128, 4096
PAGES = TOKENS // PAGE_TOKENS
SOFTMAX = Softmax(D**-0.5)
SEALED_BYTES = 100e6  # to rotate through: about twice a large L3 cache
TURN_SECONDS = 0.15
RESULTS = Path(__file__).parents[1] / "results"
LAYOUT = layout_of(head_dim=D, kv_heads=H, itemsize=2)


class Case(NamedTuple):
    """``batch`` sequences; ragged: the shares of the tiers vary from head to head."""

    batch: int
    ragged: bool

    @property
    def title(self) -> str:
        return f"batch {self.batch}, {'ragged' if self.ragged else 'equal'}"


CASES = [Case(batch, ragged) for batch in (8, 1) for ragged in (True, False)]


class Layer(NamedTuple):
    """One layer's uncompressed pages, the same tokens sealed, and queries [B, HQ, D]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sealed: SealedTables


class Tables(NamedTuple):
    """Who owns which page; the same for all layers."""

    indptr: torch.Tensor
    pages: torch.Tensor
    position: torch.Tensor
    last_len: torch.Tensor
    req_to_token: torch.Tensor


def make_tables(batch: int) -> Tables:
    pages = torch.randperm(batch * PAGES).to(torch.int32)
    tokens = pages.long().unsqueeze(1) * PAGE_TOKENS + torch.arange(PAGE_TOKENS)
    return Tables(
        torch.arange(0, batch * PAGES + 1, PAGES, dtype=torch.int32),
        pages,
        torch.arange(PAGES, dtype=torch.int32).repeat(batch),
        torch.full((batch,), PAGE_TOKENS, dtype=torch.int32),
        tokens.view(batch, TOKENS),
    )


def make_tiers(case: Case, pages: torch.Tensor) -> torch.Tensor:
    """Tier maps uint8 [pages, H, 64] with 25/50/25 on average."""
    if case.ragged:
        shares = torch.tensor([0.25, 0.5, 0.25]) * (0.1 + 1.8 * torch.rand(case.batch, H, 3))
        owner = torch.empty(len(pages), dtype=torch.int64)
        owner[pages.long()] = torch.arange(case.batch).repeat_interleave(PAGES)
        draws = torch.multinomial(shares[owner].view(-1, 3), PAGE_TOKENS, replacement=True)
    else:
        counts = torch.tensor([PAGE_TOKENS // 4, PAGE_TOKENS // 2, PAGE_TOKENS // 4])
        one = torch.arange(3).repeat_interleave(counts)
        draws = one[torch.rand(len(pages) * H, PAGE_TOKENS).argsort(1)]
    return torch.tensor([HIGH, LOW, PRUNED], dtype=torch.uint8)[draws].view(-1, H, PAGE_TOKENS)


def make_layer(case: Case, pages: torch.Tensor) -> Layer:
    k, v = torch.randn(2, len(pages), PAGE_TOKENS, H, D).bfloat16()
    tiers = make_tiers(case, pages)
    measured = measure(tiers, LAYOUT)
    counts = -(-measured.nbytes // LAYOUT.frame_bytes)
    order = torch.randperm(int(counts.sum())).to(torch.int32)
    frames = torch.zeros(len(pages), LAYOUT.max_frames, dtype=torch.int32)
    frames[torch.arange(LAYOUT.max_frames) < counts.unsqueeze(1)] = order
    arena = torch.empty(len(order), LAYOUT.frame_bytes, dtype=torch.uint8)
    tables = SealedTables(arena, frames, measured.heads, LAYOUT)
    pack(RawTokens(k, v, torch.arange(len(pages))), Grades(tiers, torch.zeros_like(tiers)), tables)
    q = torch.randn(case.batch, HQ, D).bfloat16()
    return Layer(q, k, v, tables)


def torch_native(layer: Layer, tables: Tables) -> torch.Tensor:
    """SGLang's own method, on the same memory."""
    backend, batch = TorchNativeAttnBackend.__new__(TorchNativeAttnBackend), len(layer.q)
    keys, values = layer.k.view(-1, H, D), layer.v.view(-1, H, D)
    which = torch.arange(batch), torch.full((batch,), TOKENS)
    args = layer.q, torch.empty_like(layer.q), keys, values, tables.req_to_token, *which
    return backend._run_sdpa_forward_decode(*args, scaling=SOFTMAX.scale, enable_gqa=True)


def folded(layer: Layer, tables: Tables) -> torch.Tensor:
    """The same with the GQA group as query length, so that no KV head is expanded."""
    out = torch.empty_like(layer.q)
    for b, tokens in enumerate(tables.req_to_token):
        key = layer.k.view(-1, H, D)[tokens].transpose(0, 1)
        value = layer.v.view(-1, H, D)[tokens].transpose(0, 1)
        query = layer.q[b].view(1, H, HQ // H, D)
        result = torch.nn.functional.scaled_dot_product_attention(
            query, key.unsqueeze(0), value.unsqueeze(0), scale=SOFTMAX.scale
        )
        out[b] = result.view(HQ, D)
    return out


def uncompressed(layer: Layer, tables: Tables) -> torch.Tensor:
    """Our kernel on bf16 pages."""
    opened = OpenPages(layer.k, layer.v, tables.indptr, tables.pages, tables.position)
    return decode_open(layer.q, opened, tables.last_len, SOFTMAX).out


def sealed(layer: Layer, tables: Tables) -> torch.Tensor:
    """Our kernel on sealed pages."""
    listed = layer.sealed.listed(tables.indptr, tables.pages)
    return decode_sealed(layer.q, listed, SOFTMAX).out


def sealed_with(isa: str) -> Callable[[Layer, Tables], torch.Tensor]:
    """``sealed``, compiled for this instruction set."""
    compiled = CFunction("decode", "diffxkv_decode_sealed")

    def run(layer: Layer, tables: Tables) -> torch.Tensor:
        with (
            mock.patch.dict(os.environ, {ISA_VARIABLE: isa}),  # asked at the first call
            mock.patch.object(cpu, "_sealed_function", compiled),
        ):
            return sealed(layer, tables)

    return run


def contestants() -> dict[str, Callable[[Layer, Tables], torch.Tensor]]:
    runs = {
        "sealed": sealed,
        "torch_native": torch_native,
        "torch_native, GQA folded": folded,
        "our kernel, bf16": uncompressed,
    }
    return runs | {f"sealed, {isa}": sealed_with(isa) for isa in available_isas()[1:]}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def verify(layer: Layer, tables: Tables) -> float:
    """Check all contestants on the data that is timed; returns the error of sealed attention."""
    expected = torch_native(layer, tables)
    for run in (folded, uncompressed):
        assert relative_error(run(layer, tables), expected) < 1e-2
    # The reference is slow: a few pages of one sequence.
    pages = tables.pages[:4]
    listed = layer.sealed.listed(torch.tensor([0, len(pages)], dtype=torch.int32), pages)
    exact = naive.decode_sealed(layer.q[:1], listed, SOFTMAX)
    ours = decode_sealed(layer.q[:1], listed, SOFTMAX)
    error = relative_error(ours.out, exact.out)
    assert error < 1e-3 and (ours.lse - exact.lse).abs().max() < 1e-3
    return error


def spread(values: list[float]) -> dict[str, float]:
    summary = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 3) for name, value in summary.items()}


def measure_case(case: Case, rounds: int) -> dict[str, object]:
    torch.manual_seed(case.batch)
    tables = make_tables(case.batch)
    layers = [make_layer(case, tables.pages)]
    while sum(layer.sealed.arena.nbytes for layer in layers) < SEALED_BYTES:
        layers.append(make_layer(case, tables.pages))
    error = verify(layers[0], tables)
    runs = contestants()
    repeats = dict.fromkeys(runs, 1)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            for j in range(repeats[name]):
                run(layers[(i + j) % len(layers)], tables)
            seconds = (time.perf_counter() - start) / repeats[name]
            if i:
                times[name].append(seconds * 1e3)
            else:  # the first round warms up
                repeats[name] = max(1, round(TURN_SECONDS / seconds))
    base = times["sealed"]
    ratios = {
        name: spread([t / s for t, s in zip(values, base, strict=True)])
        for name, values in times.items()
        if values is not base
    }
    return {
        "case": case.title,
        "layers": len(layers),
        "bf16_mb": round(2 * layers[0].k.nbytes / 1e6, 1),
        "sealed_mb": round(layers[0].sealed.arena.nbytes / 1e6, 1),
        "error": error,
        "ms": {name: spread(values) for name, values in times.items()},
        "times_slower_than_sealed": ratios,
    }


def cpu_model() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else "unknown"


def to_markdown(report: dict[str, object], cases: list[dict[str, object]]) -> str:
    lines = [
        "# Decode attention on the CPU\n",
        f"`{report['command']}` on {report['cpu']}, {report['threads']} threads, instruction set "
        f"{report['isa']}; {report['versions']}; load average {report['load']} at the start.\n",
        f"One layer, {HQ}/{H} heads, head_dim {D}, {TOKENS} tokens to a sequence, tiers 25/50/25 "
        "(K8V4, K4V2, pruned). Ragged: the shares vary from head to head. Runs are interleaved, "
        f"{report['rounds']} rounds; every run takes another layer than the one before. Times: "
        "mean of the runs of a turn (0.15 s or one run). Times slower: of one round, against "
        "sealed attention in the same round.",
    ]
    for case in cases:
        lines += [
            f"\n## {str(case['case']).capitalize()}\n",
            f"Per layer {case['bf16_mb']} MB of bf16 KV, {case['sealed_mb']} MB sealed; "
            f"{case['layers']} layers; error of sealed attention against float64 over the same "
            f"codes {case['error']:.1e}.\n",
            "| | ms: median (min – max) | times slower: median (min – max) |",
            "|---|---|---|",
        ]
        ratios = case["times_slower_than_sealed"]
        for name, t in case["ms"].items():  # type: ignore[attr-defined]
            cells = [f"{t['median']:.2f} ({t['min']:.2f} – {t['max']:.2f})", "1"]
            if name in ratios:  # type: ignore[operator]
                r = ratios[name]  # type: ignore[index]
                cells[1] = f"**{r['median']:.1f}** ({r['min']:.1f} – {r['max']:.1f})"
            lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    output = RESULTS / "decode_cpu"
    report: dict[str, object] = {
        "command": f"python bench/kernels/decode.py --rounds {args.rounds}",
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "isa": available_isas()[0],
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"SGLang {sglang.__version__}",
        "load": round(os.getloadavg()[0], 1),
        "rounds": args.rounds,
    }
    cases = [measure_case(case, args.rounds) for case in CASES]
    output.with_suffix(".json").write_text(json.dumps(report | {"cases": cases}, indent=1))
    text = to_markdown(report, cases)
    output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
