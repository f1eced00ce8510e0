# SPDX-License-Identifier: Apache-2.0
"""Checks of pack: the same bytes as vectorised torch on a CPU, which is held against `naive`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch

from bench.gpu.device import kernels, to
from bench.gpu.inputs import Mix, draw_tiers, shuffled_frames
from bench.gpu.verify.check import Check, Found, differing, is_timed, worst
from sglang_diffxkv.kernels.gpu.launch import is_interpreted
from sglang_diffxkv.kernels.layout import (
    PAGE_TOKENS,
    PageLayout,
    measure,
)
from sglang_diffxkv.kernels.pack import Grades, RawTokens, TokenRows
from sglang_diffxkv.kernels.pages import SealedTables
from tests.support import torch_pack
from tests.support.layouts import layout_of

CPU = torch.device("cpu")


class Case(NamedTuple):
    """Random pages in slots of a pool of raw pages twice as large, where all else is NaN."""

    high: str
    low: str
    dim: int
    kv_heads: int
    dtype: torch.dtype
    pages: int

    @property
    def layout(self) -> PageLayout:
        return layout_of(
            self.high, self.low, head_dim=self.dim, kv_heads=self.kv_heads,
            itemsize=self.dtype.itemsize,
        )  # fmt: skip

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"D={self.dim} H={self.kv_heads}, {self.pages} pages"
        return f"{self.high}/{self.low} {shape} {dtype}"


SMALL = (
    Case("K8V4", "K4V2", 128, 2, torch.bfloat16, 3),
    Case("raw", "K2V2", 80, 1, torch.float32, 2),
)
LARGE = (
    Case("K8V4", "K4V2", 128, 8, torch.bfloat16, 200),
    Case("K8V8", "K4V4", 96, 4, torch.bfloat16, 77),
    Case("K4V8", "raw", 256, 3, torch.bfloat16, 33),
)


class Drawn(NamedTuple):
    """Arguments of `pack` on a CPU; nothing is packed yet."""

    raw: RawTokens
    grades: Grades
    tables: SealedTables

    def to(self, device: torch.device) -> Drawn:
        return Drawn(
            RawTokens(*to(device, *self.raw)),
            Grades(*to(device, *self.grades)),
            SealedTables(*to(device, *self.tables)),
        )


def draw(case: Case, mix: Mix) -> Drawn:
    shape = (2, 2 * case.pages, PAGE_TOKENS, case.kv_heads, case.dim)
    raw = torch.full(shape, torch.nan, dtype=case.dtype)
    slots = torch.randperm(shape[1])[: case.pages].int()
    raw[:, slots.long()] = torch.randn(2, case.pages, *shape[2:]).to(case.dtype)
    raw[0, slots[0].long(), 5] = 0.25  # a constant row
    tiers = draw_tiers(mix, case.pages, case.kv_heads, CPU)
    words, nbytes = measure(tiers, case.layout)
    counts = -(-nbytes // case.layout.frame_bytes)
    frames, total = shuffled_frames(counts, case.layout.max_frames)
    arena = torch.full((total, case.layout.frame_bytes), 0xFF, dtype=torch.uint8)
    importance = torch.randint(0, 256, tiers.shape, dtype=torch.uint8)
    tables = SealedTables(arena, frames, words, case.layout)
    return Drawn(RawTokens(raw[0], raw[1], slots), Grades(tiers, importance), tables)


def check_pack(case: Case, device: torch.device) -> Found:
    drawn = draw(case, Mix(25, 50, 25))
    moved = drawn.to(device)
    arena = drawn.tables.arena.to(device, copy=True)
    torch_pack.pack(*drawn)
    kernels("pack").pack(*moved[:2], moved.tables._replace(arena=arena))
    return differing(arena, drawn.tables.arena)


def check_unpack(case: Case, device: torch.device) -> Found:
    """Into rows of fp32 and of the model's dtype that hold NaN before.

    Triton's interpreter cuts fp32 off at bf16 instead of rounding: there, fp32 alone.
    """
    truncates = is_interpreted() and case.dtype == torch.bfloat16
    drawn = draw(case, Mix(25, 50, 25))
    torch_pack.pack(*drawn)
    rows = case.pages * case.kv_heads * PAGE_TOKENS
    first = torch.arange(0, rows, PAGE_TOKENS).view(case.pages, case.kv_heads)
    pages = torch.randperm(case.pages)
    found = []
    for dtype in (torch.float32,) if truncates else (torch.float32, case.dtype):
        results = []
        for run, where in ((torch_pack, CPU), (kernels("pack"), device)):
            k, v = torch.full((2, rows, case.dim), torch.nan, dtype=dtype, device=where)
            metadata = torch.full((rows, 2), 0xFF, dtype=torch.uint8, device=where)
            out = TokenRows(k, v, first.to(where), metadata)
            run.unpack_into(drawn.to(where).tables, pages.to(where), out, case.dtype)
            results.append((k, v, metadata))
        found += [differing(ours, true) for true, ours in zip(*results, strict=True)]
    return worst(found)


def check_copy(case: Case, device: torch.device) -> Found:
    old, new = draw(case, Mix(40, 40, 20)), draw(case, Mix(20, 40, 40))
    torch_pack.pack(*old)
    arena = new.tables.arena.to(device, copy=True)
    source, target = old.to(device), new.to(device)
    torch_pack.copy_rows(old.tables, old.grades.tiers, new.tables, new.grades.tiers)
    kernels("pack").copy_rows(
        source.tables, source.grades.tiers, target.tables._replace(arena=arena), target.grades.tiers
    )
    return differing(arena, new.tables.arena)


def checks(large: bool) -> Iterator[Check]:
    operations = {"pack": check_pack, "unpack": check_unpack, "copy_rows": check_copy}
    for name, run in operations.items():
        for case in (*SMALL, *LARGE) if large else SMALL:
            timed = is_timed(case.dim, case.dtype, (case.high, case.low))
            yield Check(f"{name} {case.name}", name, 0, partial(run, case), timed)
