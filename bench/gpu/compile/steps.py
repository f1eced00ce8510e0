# SPDX-License-Identifier: Apache-2.0
"""Predicted times of whole steps, put together from the bounds of `predict`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from bench.gpu.compile.built import Built
from bench.gpu.compile.predict import BANDWIDTH, Prediction
from bench.gpu.compile.predict import predictions as of_kernel
from bench.gpu.compile.report import markdown_table

PREFILL_FLOPS = 600e12
"""What a good prefill reaches on an H200, in bf16 flops per second; assumed."""

BATCH, LENGTH, CHUNK, WINDOW = 64, 8192, 8192, 96
"""Sequences and tokens of the decode step, new tokens of the prefill, open tokens per sequence."""

MIXES = ((0.75, 0.25), (0.5, 0.4), (0.25, 0.5), (0.2, 0.4))
"""Shares of high and low tokens; the rest is pruned."""


class Shape(NamedTuple):
    """A model on one rank; parameters are those that a token is multiplied with."""

    name: str
    kv_heads: int
    layers: int
    parameters: float

    @property
    def case(self) -> str:
        return f"{self.name} K8V4/K4V2 bfloat16"


SHAPES = (
    Shape("Llama-3.1-8B", 8, 32, 8.0e9),
    Shape("Qwen2.5-7B", 4, 28, 7.6e9),
    Shape("Llama-3.1-70B TP8", 1, 80, 70.6e9 / 8),
)

INTRODUCTION = f"""
## Steps

Attention of one decode step, all layers, {BATCH} sequences of {LENGTH:,} tokens, in milliseconds,
without the model's weights: {WINDOW} tokens of a sequence are open, the others sealed in K8V4/K4V2
with the shares given. "Floor" counts bytes only, "predicted" all bounds, and the loop around. The
baselines are what bf16 and fp8 caches of the same tokens take to be read at the bandwidth of a
copy, which no kernel beats.

"""

PREFILL = f"""

Scoring (64 queries) and packing of a chunk of {CHUNK:,} new tokens, all layers, in
milliseconds, against its products with the weights at {PREFILL_FLOPS / 1e12:.0f} TFLOP/s, attention
left out:

"""


def predictions(results: Iterable[Built], kernel: str, case: str) -> dict[str, Prediction]:
    """By tile, of one kernel in one case on sm_90."""
    return {
        tile.name: prediction
        for built in results
        if built.arch == "sm_90" and built.kernel == kernel and case in built.cases
        for tile, _, prediction in of_kernel(built)
    }


def decode_rows(results: Sequence[Built]) -> Iterator[list[Any]]:
    """One row per model and mix, of one compiler."""
    for shape in SHAPES:
        tiles = predictions(results, "decode.attend_work_tile", f"decode {shape.case}")
        if not tiles:
            continue
        per_token = BATCH * shape.kv_heads * shape.layers * 1e-12
        bf16 = per_token * LENGTH * 512 / BANDWIDTH * 1e12
        for high, low in MIXES:
            times = []
            for of in (lambda p: p.bytes, lambda p: max(p.time, p.paged)):
                token = {name: of(p) for name, p in tiles.items()}
                sealed = high * token["K8V4"] + low * token["K4V2"]
                times.append(per_token * ((LENGTH - WINDOW) * sealed + WINDOW * token["open"]))
            mix = f"{high:.0%} / {low:.0%} / {1 - high - low:.0%}"
            ms = [f"{1e3 * t:.2f}" for t in (bf16, bf16 / 2, *times)]
            yield [results[0].triton, shape.name, mix, *ms, f"{bf16 / 2 / times[1]:.1f}"]


def prefill_rows(results: Sequence[Built]) -> Iterator[list[Any]]:
    """One row per model, of one compiler."""
    for shape in SHAPES:
        score = predictions(results, "score.open_kernel", f"score_open {shape.case}")
        pack = predictions(results, "pack.pack_kernel", f"pack {shape.case}")
        if not score or not pack:
            continue
        tokens = CHUNK * shape.kv_heads * shape.layers * 1e-12
        score_s, pack_s = (tokens * max(p.time for p in x.values()) for x in (score, pack))
        whole = 2 * shape.parameters * CHUNK / PREFILL_FLOPS
        yield [
            results[0].triton, shape.name, f"{1e3 * score_s:.2f}", f"{1e3 * pack_s:.2f}",
            f"{1e3 * whole:.0f}", f"{(score_s + pack_s) / whole:.2%}",
        ]  # fmt: skip


def report(results: Sequence[Built]) -> str:
    """The tables, as Markdown."""
    versions = dict.fromkeys(r.triton for r in results)
    each = [[r for r in results if r.triton == version] for version in versions]
    columns = "Triton", "model", "high / low / pruned", "bf16", "fp8", "floor", "predicted"
    decode = markdown_table(
        (*columns, "fp8 / predicted"), (row for x in each for row in decode_rows(x))
    )
    prefill = markdown_table(
        ("Triton", "model", "score", "pack", "products", "share"),
        (row for x in each for row in prefill_rows(x)),
    )
    return INTRODUCTION + decode + PREFILL + prefill
