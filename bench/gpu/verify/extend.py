# SPDX-License-Identifier: Apache-2.0
"""Checks of extend: many queries over sealed pages, and causally over open ones."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from bench.gpu.device import kernels, to
from bench.gpu.verify import decode
from bench.gpu.verify.check import TOLERANCE, Check, Found, compare, is_timed
from bench.gpu.verify.reference import attend, sealed_tokens
from sglang_diffxkv.kernels.extend import naive
from sglang_diffxkv.kernels.extend.scratch import PrefixScratch, make_scratch
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.merge import AttentionState, empty_state
from sglang_diffxkv.kernels.pages import OpenPages, Queries, SealedPages
from sglang_diffxkv.kernels.softmax import Softmax

CPU = torch.device("cpu")


class Sealed(NamedTuple):
    """New queries of each sequence over sealed pages drawn as for decode."""

    case: decode.Case
    queries: tuple[int, ...]
    cap: float = 0.0

    @property
    def softmax(self) -> Softmax:
        return Softmax(self.case.dim**-0.5, self.cap)


SMALL = (
    Sealed(decode.Case(open_pages=0, drops=(0, 5, 4)), (5, 3, 7)),
    Sealed(decode.Case("raw", "K4V2", open_pages=0, drops=(3, 4), dim=80, group=1), (9, 1)),
    Sealed(decode.Case("raw", "K8V4", open_pages=0, drops=(4, 0)), (2, 3), cap=2.0),
)
LARGE = (
    Sealed(decode.Case(open_pages=0, kv_heads=8, tokens=8192, drops=(5,)), (517,)),
    Sealed(decode.Case(open_pages=0, kv_heads=4, group=7, tokens=1024, drops=(0, 9)), (64, 301)),
    Sealed(
        decode.Case("K8V8", "K4V4", open_pages=0, dim=256, tokens=512, drops=(0, 3)),
        (33, 200),
    ),
)


UNPACKED_TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 2e-2}
"""By the dtype that is unpacked to: that of models with raw tiers has 8 bits."""
SLICE_PAGES = 7
"""Pages that the scratch of these checks holds: fewer than most cases list."""


class Open(NamedTuple):
    """Sequences as (position of the first query, queries, positions of the listed pages)."""

    dim: int
    kv_heads: int
    group: int
    dtype: torch.dtype
    sequences: tuple[tuple[int, int, tuple[int, ...]], ...]
    cap: float = 0.0
    window_left: int = -1

    @property
    def softmax(self) -> Softmax:
        return Softmax(self.dim**-0.5, self.cap, self.window_left)


OPEN_SMALL = (
    Open(128, 2, 3, torch.bfloat16, ((70, 9, (0, 1)), (0, 3, (0,)), (330, 20, (0, 2, 5)))),
    Open(80, 1, 4, torch.float16, ((63, 1, (0,)), (5, 0, (0,)), (64, 11, (1,)))),
    Open(64, 1, 8, torch.bfloat16, ((300, 40, (3, 4, 5)), (0, 9, (0,))), window_left=70),
    Open(128, 1, 2, torch.bfloat16, ((130, 66, (1, 2, 3)),), cap=2.0, window_left=50),
)
OPEN_LARGE = (
    Open(128, 2, 4, torch.bfloat16, ((130, 100, (0, 1, 2, 3)), (0, 333, tuple(range(6))))),
    Open(256, 1, 2, torch.bfloat16, ((0, 130, (0, 1, 2)),)),
)


def describe(softmax: Softmax) -> str:
    """What it has beside a scale."""
    cap = f", cap {softmax.cap:g}" if softmax.cap else ""
    return cap + (f", window {softmax.window_left}" if softmax.window_left >= 0 else "")


def indptr(counts: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *counts], device=device).cumsum(0).int()


def check_sealed(sealed: Sealed, device: torch.device, *, large: bool) -> Found:
    case = sealed.case
    layers = decode.draw(case, device)
    q_shape = sum(sealed.queries), case.kv_heads * case.group, case.dim
    q = torch.randn(q_shape, device=device).to(case.dtype)
    queries = indptr(sealed.queries, device)
    args = (Queries(q, queries, 0 * queries[1:]), layers.sealed(1), sealed.softmax)
    part = kernels("extend").extend_sealed(*args)
    expected = reference(*args) if large else naive.extend_sealed(*to(CPU, *args))
    return compare(part, expected)


def poisoned_scratch(layers: Any, dtype: torch.dtype, device: torch.device) -> PrefixScratch:
    """Room for `SLICE_PAGES` pages, full of NaN."""
    made = make_scratch(layers.layout, dtype, device)
    rows = layers.layout.num_kv_heads * SLICE_PAGES * PAGE_TOKENS
    for x in (made.k, made.v):
        x.fill_(torch.nan)
    return PrefixScratch(made.k[:rows], made.v[:rows], made.starts[: SLICE_PAGES + 1])


def check_unpacked(sealed: Sealed, device: torch.device, *, large: bool) -> Found:
    """Unpacked in slices, with nothing else to add to; queries in fp32, as rotated ones are."""
    from sglang_diffxkv.kernels.extend.unpacked import extend_unpacked  # needs Triton

    case = sealed.case
    layers = decode.draw(case, device)
    q = torch.randn(sum(sealed.queries), case.kv_heads * case.group, case.dim, device=device)
    q = q.float() if layers.layout.rotates else q.to(case.dtype)
    queries = indptr(sealed.queries, device)
    args = (Queries(q, queries, 0 * queries[1:]), layers.sealed(1), sealed.softmax)
    part = empty_state(q)
    extend_unpacked(part, *args, poisoned_scratch(layers, case.dtype, device))
    expected = reference(*args) if large else naive.extend_sealed(*to(CPU, *args))
    return compare(part, expected)


def reference(queries: Queries, sealed: SealedPages, softmax: Softmax) -> AttentionState:
    """`extend_sealed` in float64, on the device."""
    q, bounds, listed = queries.q, queries.indptr.tolist(), sealed.indptr.tolist()
    parts = []
    for b in range(len(bounds) - 1):
        tokens = sealed_tokens(sealed.tables, sealed.pages[listed[b] : listed[b + 1]], q.dtype)
        parts.append(attend(q[bounds[b] : bounds[b + 1]], tokens, softmax))
    return AttentionState(torch.cat([x.out for x in parts]), torch.cat([x.lse for x in parts]))


def draw_open(case: Open, device: torch.device) -> tuple[Queries, OpenPages, Softmax]:
    """Arguments of `extend_open`.

    Slots after a sequence's last query hold NaN, as do raw pages that nobody lists.
    """
    pages = [page for _, _, listed in case.sequences for page in listed]
    shape = (2, 2 * len(pages), PAGE_TOKENS, case.kv_heads, case.dim)
    raw = torch.full(shape, torch.nan, dtype=case.dtype, device=device)
    slots = torch.randperm(2 * len(pages), device=device)[: len(pages)].int()
    ends = [start + new for start, new, listed in case.sequences for _ in listed]
    for slot, page, end in zip(slots.tolist(), pages, ends, strict=True):
        written = min(PAGE_TOKENS, end - page * PAGE_TOKENS)
        rows = torch.randn(2, max(0, written), *shape[3:], device=device)
        raw[:, slot, : max(0, written)] = rows.to(case.dtype)
    starts, new, listed = zip(*case.sequences, strict=True)
    q = torch.randn(sum(new), case.kv_heads * case.group, case.dim, device=device)
    position = torch.tensor(starts, dtype=torch.int32, device=device)
    queries = Queries(q.to(case.dtype), indptr(new, device), position)
    counts = indptr(tuple(len(x) for x in listed), device)
    positions = torch.tensor(pages, dtype=torch.int32, device=device)
    return queries, OpenPages(*raw, counts, slots, positions), case.softmax


def check_open(case: Open, device: torch.device) -> Found:
    args = draw_open(case, device)
    return compare(kernels("extend").extend_open(*args), naive.extend_open(*to(CPU, *args)))


def checks(large: bool) -> Iterator[Check]:
    for sealed in (*SMALL, *LARGE) if large else SMALL:
        name = f"{sealed.case.name}, queries {sealed.queries}".replace("decode", "extend_sealed")
        name += describe(sealed.softmax)
        run = partial(check_sealed, sealed, large=sealed in LARGE)
        yield Check(name, "extend_sealed", TOLERANCE, run, sealed.case.timed)
        raw = "raw" in (sealed.case.high, sealed.case.low)
        tolerance = UNPACKED_TOLERANCE[sealed.case.dtype if raw else torch.float16]
        name = name.replace("extend_sealed", "extend_unpacked")
        run = partial(check_unpacked, sealed, large=sealed in LARGE)
        yield Check(name, "extend_unpacked", tolerance, run, sealed.case.timed)
    for case in (*OPEN_SMALL, *OPEN_LARGE) if large else OPEN_SMALL:
        dtype = str(case.dtype).removeprefix("torch.")
        name = f"extend_open D={case.dim} G={case.group} {dtype}, {len(case.sequences)} sequences"
        name += describe(case.softmax)
        run = partial(check_open, case)
        yield Check(name, "extend_open", TOLERANCE, run, is_timed(case.dim, case.dtype))
