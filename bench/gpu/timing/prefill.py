# SPDX-License-Identifier: Apache-2.0
"""What a prefill chunk costs beside its own attention: the sealed prefix, scores, packing."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch

from bench.gpu.device import kernels
from bench.gpu.inputs import Layers, draw_tiers, shuffled_frames
from bench.gpu.shapes import LLAMA_8B, TINY, USUAL, Load, Model, draw
from bench.gpu.timing import baselines
from bench.gpu.timing.timer import Candidate, Deadline, interleaved
from sglang_diffxkv.kernels.extend import flashinfer
from sglang_diffxkv.kernels.extend.prefill import OpenPrefill
from sglang_diffxkv.kernels.extend.scratch import make_scratch
from sglang_diffxkv.kernels.layout import PAGE_TOKENS, measure
from sglang_diffxkv.kernels.merge import empty_state, merge_states
from sglang_diffxkv.kernels.pack import Grades, RawTokens, TokenRows
from sglang_diffxkv.kernels.pages import OpenPages, Queries, SealedTables
from sglang_diffxkv.kernels.score import ScoringQueries
from sglang_diffxkv.kernels.softmax import Softmax

SCORE_QUERIES = 64
COPIES = 2


class Chunk(NamedTuple):
    """New tokens of one sequence, after a sealed prefix."""

    model: Model
    tokens: int
    prefix: int

    @property
    def name(self) -> str:
        return f"{self.model.name} {self.tokens} after {self.prefix}"


CHUNKS = tuple(Chunk(LLAMA_8B, t, p) for t in (8192, 2048) for p in (32768, 8192))
TINY_CHUNKS = (Chunk(TINY, 128, 192),)
NEW_TOKENS = (64, 16, 256, 2048)
"""Around `extend.prefill.UNPACK_FROM`."""


def prefill(chunk: Chunk, tokens: int, ready: Collection[str], device: torch.device) -> Candidate:
    """Causal attention of the chunk as the last of ``tokens`` raw tokens."""
    model = chunk.model
    shape = (chunk.tokens, tokens, model.heads, model.kv_heads, model.dim, device)
    maker = baselines.flashinfer_prefill if "prefill" in ready else baselines.sdpa_prefill
    return maker(*shape)


def products(chunk: Chunk, device: torch.device) -> Candidate:
    """The matrix products of a layer around its attention."""
    model = chunk.model
    query, kv = model.heads * model.dim, model.kv_heads * model.dim
    sizes = (
        (model.hidden, query + 2 * kv), (query, model.hidden), (model.hidden, 2 * model.inner),
        (model.inner, model.hidden),
    )  # fmt: skip
    weights = [torch.randn(size, device=device).to(torch.bfloat16) for size in sizes]
    inputs = [torch.randn(chunk.tokens, n, device=device).to(torch.bfloat16) for n, _ in sizes]

    def run(_: int) -> None:
        for x, weight in zip(inputs, weights, strict=True):
            torch.matmul(x, weight)

    return run


class Ours:
    """Inputs of our operations on a chunk; each candidate takes the number of a copy."""

    def __init__(self, chunk: Chunk, device: torch.device) -> None:
        model = chunk.model
        self.chunk, self.device, self.softmax = chunk, device, Softmax(model.dim**-0.5)
        self.prefix: Layers = draw(Load(model, 1, chunk.prefix, USUAL), COPIES, device)
        # The chunk's own pages: raw, and sealed with the tiers of another draw.
        self.pages = chunk.tokens // PAGE_TOKENS
        shape = (self.pages, PAGE_TOKENS, model.kv_heads, model.dim)
        self.k_raw, self.v_raw = (
            torch.randn(shape, device=device).to(torch.bfloat16) for _ in range(2)
        )
        q = torch.randn(chunk.tokens, model.heads, model.dim, device=device)
        self.q = q.to(torch.bfloat16)

    def ints(self, *values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def queries(self, position: int) -> Queries:
        """Of the chunk, whose first token has this position."""
        return Queries(self.q, self.ints(0, self.chunk.tokens), self.ints(position))

    def opened(self) -> OpenPages:
        """The chunk's own pages."""
        slots = torch.arange(self.pages, dtype=torch.int32, device=self.device)
        return OpenPages(self.k_raw, self.v_raw, self.ints(0, self.pages), slots, slots)

    def extend_sealed(self) -> Candidate:
        run, queries = kernels("extend").extend_sealed, self.queries(self.chunk.prefix)

        def extend(i: int) -> None:
            run(queries, self.prefix.sealed(i), self.softmax)

        return extend

    def extend_open(self) -> Candidate:
        run, queries, opened = kernels("extend").extend_open, self.queries(0), self.opened()

        def extend(_: int) -> None:
            run(queries, opened, self.softmax)

        return extend

    def open_prefill(self) -> Candidate:
        """What the server runs for the chunk's own pages where FlashInfer is installed."""
        model = self.chunk.model
        flashinfer.make_ready(
            flashinfer.Shape(self.device, self.q.dtype, model.heads, model.kv_heads, model.dim),
            [self.softmax],
        )
        step = OpenPrefill(self.ints(PAGE_TOKENS))
        queries, opened = self.queries(0), self.opened()

        def prefill(_: int) -> None:
            step.attend(queries, opened, self.softmax)

        return prefill

    def score(self) -> Candidate:
        run = kernels("score").score_open
        model, tokens = self.chunk.model, self.chunk.tokens
        position = torch.linspace(tokens // SCORE_QUERIES, tokens - 1, SCORE_QUERIES)
        position = position.int().to(self.device)
        q = self.q[position.long()].contiguous()
        lse = torch.full((len(q), model.heads), 14.0, device=self.device)
        accum = torch.zeros(self.pages, model.kv_heads, PAGE_TOKENS, device=self.device)
        queries = ScoringQueries(q, lse, self.ints(0, len(q)), position)
        opened = self.opened()

        def score(_: int) -> None:
            run(queries, opened, accum, self.softmax)

        return score

    def pack(self) -> Candidate:
        layout = self.prefix.layout
        tiers = draw_tiers(USUAL, self.pages, layout.num_kv_heads, self.device)
        words, nbytes = measure(tiers, layout)
        frames, total = shuffled_frames(-(-nbytes // layout.frame_bytes), layout.max_frames)
        shape = (total, layout.frame_bytes)
        arena = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        slots = torch.arange(self.pages, dtype=torch.int32, device=self.device)
        run = kernels("pack").pack
        raw, grades = RawTokens(self.k_raw, self.v_raw, slots), Grades(tiers, tiers)
        tables = SealedTables(arena, frames, words, layout)

        def pack(_: int) -> None:
            run(raw, grades, tables)

        return pack


def measure_crossover(
    model: Model, prefix: int, tokens: Collection[int], device: torch.device
) -> Iterator[dict[str, Any]]:
    """Both ways over a sealed prefix, for some numbers of new tokens, and unpacking by itself."""
    from sglang_diffxkv.kernels.extend import unpacked  # needs Triton

    layers: Layers = draw(Load(model, 1, prefix, USUAL), COPIES, device)
    scratch = make_scratch(layers.layout, torch.bfloat16, device)
    run_fused, softmax = kernels("extend").extend_sealed, Softmax(model.dim**-0.5)
    for count in tokens:
        q = torch.randn(count, model.heads, model.dim, device=device)
        bounds = torch.tensor([0, count, prefix], dtype=torch.int32, device=device)
        new, part = Queries(q, bounds[:2], bounds[2:]), empty_state(q)

        def fused(i: int, new: Queries = new, part: Any = part) -> None:
            merge_states(part, run_fused(new, layers.sealed(i), softmax))

        def dense(i: int, new: Queries = new, part: Any = part) -> None:
            unpacked.extend_unpacked(part, new, layers.sealed(i), softmax, scratch)

        def unpack(i: int) -> None:
            tables = layers.tables(i)
            mine = layers.sealed_pages[: scratch.pages]
            starts = scratch.starts[: len(mine) + 1]
            unpacked.count_rows(tables.heads, mine, starts, scratch.pages * PAGE_TOKENS)
            rows = TokenRows(scratch.k, scratch.v, starts[:-1])
            unpacked.unpack_into(tables, mine, rows, scratch.k.dtype)

        candidates: dict[str, Candidate] = {"fused": fused, "unpacked": dense, "unpack": unpack}
        timed = interleaved(candidates, COPIES, device, seconds=0.5)
        yield {
            "crossover": Chunk(model, count, prefix).name,
            "tokens": count,
            "prefix": prefix,
            "times": {name: t._asdict() for name, t in timed.items()},
        }


def crossovers(device: torch.device) -> Iterator[dict[str, Any]]:
    """Both prefixes on a GPU."""
    if device.type != "cuda":
        yield from measure_crossover(TINY, 192, (16,), device)
        return
    for prefix in (32768, 8192):
        try:
            yield from measure_crossover(LLAMA_8B, prefix, NEW_TOKENS, device)
        except Exception as error:
            traceback.print_exc()
            message = f"{type(error).__name__}: {error}"[-300:]
            yield {"failed": f"crossover after {prefix}", "message": message}


def measure_chunk(
    chunk: Chunk, ready: Collection[str], red: Collection[str], device: torch.device
) -> dict[str, Any]:
    """One record; operations that failed their checks are left out."""
    ours = Ours(chunk, device)
    candidates: dict[str, Candidate] = {
        "prefill of the chunk": prefill(chunk, chunk.tokens, ready, device),
        "prefill over all": prefill(chunk, chunk.prefix + chunk.tokens, ready, device),
        "products of the layer": products(chunk, device),
    }
    makers: dict[str, Callable[[], Candidate]] = {
        "extend_sealed": ours.extend_sealed,
        "extend_open": ours.extend_open,
        "score_open": ours.score,
        "pack": ours.pack,
    }
    if "open_prefill" in ready:
        makers["open_prefill"] = ours.open_prefill
    candidates |= {name: make() for name, make in makers.items() if name not in red}
    timed = interleaved(candidates, COPIES, device, seconds=1.0)
    return {
        "chunk": chunk.name,
        "tokens": chunk.tokens,
        "prefix": chunk.prefix,
        "baseline": "flashinfer" if "prefill" in ready else "sdpa",
        "raw_bytes": chunk.tokens * ours.prefix.raw_token_bytes(),
        "times": {name: t._asdict() for name, t in timed.items()},
    }


def run(
    device: torch.device, deadline: Deadline, ready: Collection[str], red: Collection[str]
) -> Iterator[dict[str, Any]]:
    """Chunks in order, for as long as there is time."""
    if "pack" in red:
        yield {"skipped": "pack, which makes the inputs, crashed or gave NaN"}
        return
    if "extend_unpacked" not in red:
        yield from crossovers(device)
    for chunk in CHUNKS if device.type == "cuda" else TINY_CHUNKS:
        if deadline.left() < 10:
            yield {"skipped": f"no time left from {chunk.name} on"}
            return
        try:
            yield measure_chunk(chunk, ready, red, device)
        except Exception as error:  # of FlashInfer, say, on this shape alone
            traceback.print_exc()
            yield {"failed": chunk.name, "message": f"{type(error).__name__}: {error}"[-300:]}
        if device.type == "cuda":
            torch.cuda.empty_cache()
