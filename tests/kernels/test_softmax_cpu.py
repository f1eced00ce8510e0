# SPDX-License-Identifier: Apache-2.0
"""Soft caps, windows and sinks in the C++ kernels, against float64."""

from __future__ import annotations

import math

import pytest
import torch

from sglang_diffxkv.kernels.basis.rotation import rotate
from sglang_diffxkv.kernels.basis.sealed import from_sealed
from sglang_diffxkv.kernels.cpu.build import ISA_VARIABLE, available_isas
from sglang_diffxkv.kernels.decode import decode_open, decode_sealed
from sglang_diffxkv.kernels.decode import naive as decode_naive
from sglang_diffxkv.kernels.extend import cpu, extend_open, extend_sealed
from sglang_diffxkv.kernels.extend import naive as extend_naive
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.merge import merge_states
from sglang_diffxkv.kernels.pages import OpenPages, Queries, SealedPages
from sglang_diffxkv.kernels.score import ScoringQueries, score_open
from sglang_diffxkv.kernels.score import naive as score_naive
from sglang_diffxkv.kernels.softmax import LOG2_E, Softmax, add_sinks
from tests.support.attention import assert_close, indptr
from tests.support.builders import build_sealed, error_norm, page_lists, random_tiers
from tests.support.layouts import layout_of

KV_HEADS = 2
CAPS = [50.0, 0.7]
"""Where scores of about 1 hardly notice, and where most are near the cap."""


@pytest.fixture(params=available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(ISA_VARIABLE, request.param)
    return str(request.param)


def open_pages(
    lists: list[list[int]], dim: int, dtype: torch.dtype, gen: torch.Generator
) -> OpenPages:
    """Random pages at these positions of each sequence; no two share one, others are NaN."""
    count = sum(len(x) for x in lists)
    shape = (2 * count + 1, PAGE_TOKENS, KV_HEADS, dim)
    keys, values = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
    slots = torch.randperm(2 * count + 1, generator=gen)[:count]
    for raw in (keys, values):
        raw[slots] = torch.randn(count, *shape[1:], generator=gen).to(dtype)
    position = torch.tensor([p for x in lists for p in x], dtype=torch.int32)
    return OpenPages(keys, values, indptr(*(len(x) for x in lists)), slots.int(), position)


def hide(opened: OpenPages, begins: list[int], ends: list[int]) -> None:
    """Tokens of each sequence before one position, and from another on, become NaN."""
    for b, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        for e in range(int(opened.indptr[b]), int(opened.indptr[b + 1])):
            token = int(opened.position[e]) * PAGE_TOKENS + torch.arange(PAGE_TOKENS)
            nobody = (token < begin) | (token >= end)
            for raw in (opened.keys, opened.values):
                raw[opened.slots[e], nobody] = torch.nan


def sealed_pages(
    dim: int, formats: tuple[str, str], dtype: torch.dtype, lengths: list[int], gen: torch.Generator
) -> SealedPages:
    layout = layout_of(*formats, head_dim=dim, kv_heads=KV_HEADS, itemsize=dtype.itemsize)
    arena = build_sealed(layout, random_tiers(5, KV_HEADS, (0.3, 0.4, 0.3), gen), gen, dtype)
    return arena.tables.listed(*page_lists(lengths, 5, gen))


@pytest.mark.parametrize("cap", [30.0, 0.25])
def test_cap_is_tanh(isa: str, cap: float) -> None:
    """Of one token the LSE is its score, from the smallest to far beyond the cap."""
    sizes = torch.logspace(-30, 4, 2500, dtype=torch.float64)
    x = torch.cat([sizes, -sizes, torch.zeros(1)]).float()
    q = torch.zeros(len(x), 1, 16)
    q[:, 0, 0] = x
    key = torch.zeros(1, PAGE_TOKENS, 1, 16)
    key[0, :, 0, 0] = 1
    same = torch.zeros(len(x), dtype=torch.int32)
    opened = OpenPages(key, key, torch.arange(len(x) + 1).int(), same, same)
    lse = decode_open(q, opened, same + 1, Softmax(1.0, cap)).lse.flatten().double()
    expected = torch.tanh(x.double() / cap) * cap * LOG2_E
    assert torch.equal(lse == 0, expected.float() == 0)
    wrong = (lse - expected).abs() / expected.abs().clamp_min(1e-300)
    assert wrong[expected != 0].max() < 1e-6


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("formats", [("K8V4", "K4V2"), ("raw", "K8V8"), ("K2V2", "raw")])
@pytest.mark.parametrize(
    ("dim", "group", "dtype"),
    [
        (64, 3, torch.float32),
        (80, 1, torch.bfloat16),
        (96, 5, torch.float16),
        (128, 4, torch.bfloat16),
        (256, 2, torch.float32),
        (48, 2, torch.float32),
    ],
)
def test_capped_decode_over_sealed_pages(
    isa: str, dim: int, group: int, dtype: torch.dtype, formats: tuple[str, str], cap: float
) -> None:
    gen = torch.Generator().manual_seed(dim)
    listed = sealed_pages(dim, formats, dtype, [3, 0, 7], gen)
    q = torch.randn(3, KV_HEADS * group, dim, generator=gen).to(dtype)
    args = q, listed, Softmax(0.2, cap)
    expected = decode_naive.decode_sealed(*args)
    assert_close(decode_sealed(*args), expected, 3e-4 if isa == "avx512" else 1e-5)


@pytest.mark.parametrize("window_left", [-1, 0, 62, 63, 64, 150, 10_000])
@pytest.mark.parametrize(
    ("dim", "group", "dtype"),
    [
        (64, 3, torch.float32),
        (80, 1, torch.bfloat16),
        (96, 5, torch.float16),
        (128, 4, torch.bfloat16),
        (256, 2, torch.float32),
    ],
)
def test_decode_over_open_pages(
    isa: str, dim: int, group: int, dtype: torch.dtype, window_left: int
) -> None:
    gen = torch.Generator().manual_seed(dim + window_left)
    lists, lengths = [[0, 1, 2], [], [0, 3, 7, 8], [0]], [3 * 64, 0, 8 * 64 + 1, 17]
    opened = open_pages(lists, dim, dtype, gen)
    begins = [n - 1 - window_left if window_left >= 0 else 0 for n in lengths]
    hide(opened, begins, lengths)
    last_len = torch.tensor([(n - 1) % 64 + 1 for n in lengths]).int()
    q = torch.randn(4, KV_HEADS * group, dim, generator=gen).to(dtype)
    args = q, opened, last_len, Softmax(0.2, 0.0 if dim == 64 else 1.5, window_left)
    assert_close(decode_open(*args), decode_naive.decode_open(*args), 3e-6)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("window_left", [-1, 0, 30, 64, 200])
@pytest.mark.parametrize(
    ("dim", "group", "dtype"),
    [(64, 3, torch.float32), (80, 1, torch.bfloat16), (256, 2, torch.float16)],
)
def test_extend(
    isa: str, dim: int, group: int, dtype: torch.dtype, window_left: int, threads: int
) -> None:
    """Open pages with gaps, tiles of rows that see parts of a page, sinks, and caps."""
    gen = torch.Generator().manual_seed(dim + window_left)
    lists = [[0, 2, 3, 4, 5], [], [0, 1], [0, 1, 4, 6, 7]]
    start, new = [250, 0, 64, 7 * 64 + 60], [100, 0, 1, 4]
    opened = open_pages(lists, dim, dtype, gen)
    begins = [x - window_left if window_left >= 0 else 0 for x in start]
    hide(opened, begins, [x + n for x, n in zip(start, new, strict=True)])
    q = torch.randn(sum(new), KV_HEADS * group, dim, generator=gen).to(dtype)
    queries = Queries(q, indptr(*new), torch.tensor(start, dtype=torch.int32))
    sinks = torch.linspace(-2, 3, KV_HEADS * group)
    softmax = Softmax(0.2, 1.5 if threads == 1 else 0.0, window_left, sinks)
    expected = extend_naive.extend_open(queries, opened, softmax)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_close(extend_open(queries, opened, softmax), expected, 3e-6)
        whole = cpu.extend(queries, opened, None, None, softmax)
    finally:
        torch.set_num_threads(before)
    assert_close(whole, add_sinks(expected, sinks), 3e-6)


def test_extend_by_splits_of_a_window(isa: str) -> None:
    """Threads share the few pages that one query's window has of many; sinks count once."""
    gen = torch.Generator().manual_seed(1)
    opened = open_pages([list(range(60))], 64, torch.float32, gen)
    hide(opened, [60 * 64 - 2 - 1500], [60 * 64])
    q = torch.randn(2, KV_HEADS, 64, generator=gen)
    queries = Queries(q, indptr(2), torch.tensor([60 * 64 - 2], dtype=torch.int32))
    softmax = Softmax(0.2, 0.0, 1500, torch.tensor([5.0, -1.0]))
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        part = cpu.extend(queries, opened, None, None, softmax)
    finally:
        torch.set_num_threads(before)
    expected = extend_naive.extend_open(queries, opened, softmax)
    assert_close(part, add_sinks(expected, softmax.sinks), 3e-6)


@pytest.mark.parametrize("cap", [0.0, *CAPS])
@pytest.mark.parametrize("formats", [("K8V4", "K4V2"), ("raw", "K8V8")])
@pytest.mark.parametrize(("dim", "group"), [(64, 3), (96, 2), (128, 4)])
def test_extend_over_all_pages(
    isa: str, dim: int, group: int, formats: tuple[str, str], cap: float
) -> None:
    """Where scores are capped the keys lack no mean."""
    gen = torch.Generator().manual_seed(dim)
    listed = sealed_pages(dim, formats, torch.float32, [3, 0, 7], gen)
    opened = open_pages([[5], [0], [9, 10]], dim, torch.float32, gen)
    new = [5, 33, 2]
    q = torch.randn(sum(new), KV_HEADS * group, dim, generator=gen)
    queries = Queries(q, indptr(*new), torch.tensor([330, 0, 702], dtype=torch.int32))
    softmax = Softmax(0.2, cap, -1, torch.linspace(-2, 3, KV_HEADS * group))
    mean = torch.randn(KV_HEADS, dim, generator=gen) * (cap == 0)
    expected = extend_naive.extend_sealed(queries, listed, softmax)
    assert_close(extend_sealed(queries, listed, softmax), expected, 3e-6)
    if listed.layout.rotates:
        rotated = queries._replace(q=rotate(q.double()).float())
        expected = extend_naive.extend_sealed(rotated, listed, softmax)
        expected = from_sealed(expected, q, mean, softmax)
    expected = merge_states(expected, extend_naive.extend_open(queries, opened, softmax))
    part = cpu.extend(queries, opened, listed, mean if listed.layout.rotates else None, softmax)
    assert_close(part, add_sinks(expected, softmax.sinks), 3e-6)


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize(("dim", "group"), [(64, 3), (80, 1), (256, 2)])
def test_capped_scores(isa: str, dim: int, group: int, cap: float) -> None:
    gen = torch.Generator().manual_seed(dim)
    opened = open_pages([[0, 1], [], [2, 5]], dim, torch.float32, gen)
    asked = [3, 2, 9]
    q = torch.randn(sum(asked), KV_HEADS * group, dim, generator=gen)
    position = torch.randint(400, (len(q),), generator=gen).sort().values.int()
    lse = torch.rand(len(q), KV_HEADS * group, generator=gen) + math.log2(50)
    queries = ScoringQueries(q, lse, indptr(*asked), position)
    shape = len(opened.keys), KV_HEADS, PAGE_TOKENS
    actual = torch.rand(shape, generator=gen)
    expected = actual.double()
    before = actual.clone()
    softmax = Softmax(0.2, cap)
    score_naive.score_open(queries, opened, expected, softmax)
    score_open(queries, opened, actual, softmax)
    assert error_norm(actual - before, expected - before) < 1e-5
