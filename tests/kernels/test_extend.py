# SPDX-License-Identifier: Apache-2.0
"""Extend attention against the naive float64 reference, over sealed and over open pages."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch

from sglang_diffxkv.kernels import extend as ops
from sglang_diffxkv.kernels.basis.rotation import rotate
from sglang_diffxkv.kernels.basis.sealed import from_sealed
from sglang_diffxkv.kernels.cpu.build import ISA_VARIABLE, available_isas
from sglang_diffxkv.kernels.extend import naive, triton
from sglang_diffxkv.kernels.extend.prefill import Prefill, PrefillBatch
from sglang_diffxkv.kernels.extend.traits import SealedTraits
from sglang_diffxkv.kernels.gpu.device import assumed_capability
from sglang_diffxkv.kernels.layout import FORMATS, HIGH, PAGE_TOKENS, PRUNED, make_layout
from sglang_diffxkv.kernels.merge import AttentionState, empty_state, merge_states
from sglang_diffxkv.kernels.pack import pack
from sglang_diffxkv.kernels.pages import (
    LayerPages,
    OpenLists,
    OpenPages,
    Queries,
    SealedLists,
)
from sglang_diffxkv.kernels.softmax import Softmax
from tests.support.attention import assert_close, indptr, moved
from tests.support.device import DEVICE
from tests.support.pairs import in_turn
from tests.support.sealed import random_tiers, seal

pytestmark = pytest.mark.usefixtures("one_thread")

IMPLEMENTATIONS = [*available_isas(), "triton"]
"""Each compiled variant, and the GPU's."""


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if request.param == "triton":
        return triton
    monkeypatch.setenv(ISA_VARIABLE, request.param)
    return ops


def on_device(implementation: ModuleType, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments where the implementation wants its tensors."""
    return moved(args, DEVICE) if implementation is triton else args


def few_pages_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 4 pages."""
    monkeypatch.setattr(triton, "SealedTraits", partial(SealedTraits, pages=4))


def starts_at_0(q: torch.Tensor, queries: torch.Tensor) -> Queries:
    """Queries of which sealed pages do not ask the positions."""
    return Queries(q, queries, torch.zeros(len(queries) - 1, dtype=torch.int32))


BITS = ("K4V8", "K2V2", torch.float32, 5)
RAW = [
    ("raw", "K8V8", torch.float32, 1),
    ("raw", "raw", torch.float16, 2),
    ("raw", "K4V2", torch.bfloat16, 8),
]
USUAL = [("K8V4", "K4V2", torch.bfloat16, 4), ("K4V4", "K8V4", torch.bfloat16, 7)]


@pytest.mark.parametrize(
    ("head_dim", "high", "low", "dtype", "group"),
    [*in_turn([64, 80, 96, 128, 256], [BITS], RAW), *in_turn([64, 80, 96, 128, 256], [], USUAL)],
)
def test_sealed(
    implementation: ModuleType,
    head_dim: int,
    high: str,
    low: str,
    dtype: torch.dtype,
    group: int,
) -> None:
    """Ragged heads, sequences without pages or queries, pages shared by two sequences.

    Keys and values of all bits with every head_dim.
    """
    torch.manual_seed(head_dim + group)
    layout = make_layout(
        head_dim=head_dim,
        num_kv_heads=2,
        raw_itemsize=dtype.itemsize,
        high=FORMATS[high],
        low=FORMATS[low],
    )
    tiers = random_tiers(head_dim, 6, 2)
    tiers[3:5, 1] = PRUNED
    data = seal(layout, pages=6, dtype=dtype, pack=pack, tiers=tiers)
    queries, listed = indptr(3, 0, 5, 1, 2), indptr(4, 1, 0, 5, 2)
    pages = torch.tensor([5, 0, 2, 1, 2, 0, 1, 2, 3, 4, 3, 4], dtype=torch.int32)
    q = torch.randn(11, 2 * group, head_dim).to(dtype)
    args = (starts_at_0(q, queries), data.tables.listed(listed, pages), Softmax(0.11))
    expected = naive.extend_sealed(*args)
    assert (expected.lse == -torch.inf).any()
    part = implementation.extend_sealed(*on_device(implementation, args))
    assert_close(part, expected, 1e-3 if implementation is triton else 3e-6)


@pytest.mark.parametrize("capability", [80, 90])
def test_sealed_in_many_blocks_and_groups(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than a block has, more pages than a group has; queries strided as in a QKV row."""
    few_pages_at_a_time(monkeypatch)
    torch.manual_seed(4)
    layout = make_layout(
        head_dim=80, num_kv_heads=2, raw_itemsize=2, high=FORMATS["K8V4"], low=FORMATS["K4V2"]
    )
    data = seal(layout, pages=6, dtype=torch.bfloat16, pack=pack)
    q = torch.randn(50, 3 * 10 * 80)[:, 800:1600].view(50, 10, 80)
    pages = torch.arange(9, dtype=torch.int32) % 6
    listed = data.tables.listed(indptr(2, 0, 6, 1), pages)
    args = (starts_at_0(q, indptr(1, 0, 44, 5)), listed, Softmax(0.1))
    with assumed_capability(capability):
        part = triton.extend_sealed(*on_device(triton, args))
    assert_close(part, naive.extend_sealed(*args), 1e-3)


def test_sealed_with_scores_far_below_zero_and_constant_values() -> None:
    """Nothing that fills up a tile may count as a score of 0; scales of equal values are 0."""
    torch.manual_seed(6)
    layout = make_layout(
        head_dim=64, num_kv_heads=1, raw_itemsize=2, high=FORMATS["K8V4"], low=FORMATS["K4V2"]
    )
    k = 3 + torch.rand(3, PAGE_TOKENS, 1, 64)
    v = torch.randn(3, PAGE_TOKENS, 1, 64)
    v[:, ::2] = 0.75
    data = seal(layout, pages=3, dtype=torch.bfloat16, pack=pack, k=k, v=v)
    q = (-30 + torch.randn(5, 3, 64)).to(torch.bfloat16)
    listed = data.tables.listed(indptr(3), torch.arange(3).int())
    args = (starts_at_0(q, indptr(5)), listed, Softmax(0.1))
    expected = naive.extend_sealed(*args)
    assert (expected.lse < -100).all()
    part = triton.extend_sealed(*on_device(triton, args))
    # Exponents of hundreds leave the weights fewer exact bits.
    assert_close(part, expected, 5e-2)


@pytest.mark.parametrize("multiprocessors", [1, 9, 30])
@pytest.mark.parametrize(("dim", "tiers"), [(64, ("K8V4", "K4V2")), (80, ("raw", "K8V8"))])
def test_sealed_in_splits(
    multiprocessors: int, dim: int, tiers: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many pages for few queries: as many programs as there is room for, some without pages."""
    monkeypatch.setattr(triton, "multiprocessors", lambda device: multiprocessors)
    few_pages_at_a_time(monkeypatch)
    monkeypatch.setattr(triton, "SPLIT_PAGES", 1)
    torch.manual_seed(multiprocessors)
    layout = make_layout(
        head_dim=dim, num_kv_heads=2, raw_itemsize=2, high=FORMATS[tiers[0]], low=FORMATS[tiers[1]]
    )
    data = seal(layout, pages=7, dtype=torch.bfloat16, pack=pack)
    q = torch.randn(5, 6, dim).to(torch.bfloat16)
    pages = torch.randint(0, 7, (23,), dtype=torch.int32)
    listed = data.tables.listed(indptr(19, 1, 3, 0), pages)
    args = (starts_at_0(q, indptr(1, 0, 3, 1)), listed, Softmax(0.1))
    part = triton.extend_sealed(*on_device(triton, args))
    assert_close(part, naive.extend_sealed(*args), 1e-3)


def test_splits_fill_the_gpu_once() -> None:
    cases = [(8, 264, 512), (8, 264, 40), (300, 264, 512), (8, 264, 0), (0, 264, 512)]
    assert [triton.count_splits(*case) for case in cases] == [32, 2, 1, 1, 32]


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("raw", 2e-6),
        ("K8V8", 0.015),
        ("K8V4", 0.13),
        ("K4V8", 0.16),
        ("K4V4", 0.2),
        ("K4V2", 0.65),
        ("K2V2", 1.0),
    ],
)
def test_quality_of_formats(name: str, bound: float) -> None:
    """Error of attention over sealed Gaussian tokens against float64 over the tokens themselves."""
    torch.manual_seed(8)
    layout = make_layout(
        head_dim=128, num_kv_heads=2, raw_itemsize=4, high=FORMATS[name], low=FORMATS[name]
    )
    k, v = torch.randn(2, 8, PAGE_TOKENS, 2, 128)
    data = seal(layout, pages=8, dtype=torch.float32, pack=pack, tiers=HIGH, k=k, v=v)
    q = torch.randn(20, 4, 128)
    pages = torch.arange(8).int()
    listed = data.tables.listed(indptr(8), pages)
    part = ops.extend_sealed(starts_at_0(q, indptr(20)), listed, Softmax(128**-0.5))
    keys, values = (x.double().flatten(0, 1).repeat_interleave(2, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,lhd->hql", q.double(), keys) * 128**-0.5
    exact = torch.einsum("hql,lhd->qhd", scores.softmax(-1), values)
    assert (part.out - exact).norm() <= bound * exact.norm()


OPEN_CASES = {
    "no prefix": [(0, 130, [0, 1, 2])],
    "one token": [(0, 1, [0]), (63, 1, [0]), (64, 1, [0, 1]), (200, 1, [1, 3])],
    "aligned prefix": [(128, 70, [0, 1, 2, 3])],
    "prefix inside a page": [(70, 9, [0, 1]), (130, 100, [0, 1, 2, 3])],
    "gaps": [(330, 80, [0, 2, 5, 6]), (64, 3, [1]), (65, 3, [1])],
    "pages allocated ahead": [(10, 5, [0, 1, 2]), (0, 64, [0, 1])],
    "sequences without queries": [(5, 0, [0]), (0, 3, [0]), (7, 0, [])],
}


@pytest.mark.parametrize("case", OPEN_CASES)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "heads", "group"),
    [(torch.float32, 64, 2, 3), (torch.bfloat16, 80, 1, 4), (torch.float16, 128, 2, 1)],
)
def test_open(
    implementation: ModuleType,
    case: str,
    dtype: torch.dtype,
    head_dim: int,
    heads: int,
    group: int,
) -> None:
    torch.manual_seed(head_dim)
    check_open(implementation, OPEN_CASES[case], dtype, head_dim, heads, group)


@pytest.mark.parametrize(("head_dim", "group"), [(96, 5), (256, 8), (64, 7)])
def test_open_of_other_dimensions(implementation: ModuleType, head_dim: int, group: int) -> None:
    torch.manual_seed(head_dim)
    check_open(
        implementation,
        [(70, 19, [0, 1]), (0, 0, []), (130, 3, [1, 2])],
        torch.bfloat16,
        head_dim,
        2,
        group,
    )


def check_open(
    implementation: ModuleType,
    sequences: list[tuple[int, int, list[int]]],
    dtype: torch.dtype,
    head_dim: int,
    heads: int,
    group: int,
) -> None:
    """Slots that no query may see, in listed pages as in others, hold NaN."""
    listed = [page for _, _, pages in sequences for page in pages]
    k, v = torch.full((2, 2 * len(listed), PAGE_TOKENS, heads, head_dim), torch.nan).to(dtype)
    slots = torch.randperm(len(k))[: len(listed)].int()
    i = 0
    for start, new, pages in sequences:
        for page in pages:
            written = min(PAGE_TOKENS, start + new - page * PAGE_TOKENS)
            for raw in (k, v):
                if written > 0:
                    raw[slots[i], :written] = torch.randn(written, heads, head_dim).to(dtype)
            i += 1
    queries = indptr(*(new for _, new, _ in sequences))
    q = torch.randn(int(queries[-1]), heads * group, head_dim).to(dtype)
    starts = torch.tensor([start for start, _, _ in sequences]).int()
    counts = indptr(*(len(pages) for _, _, pages in sequences))
    opened = OpenPages(k, v, counts, slots, torch.tensor(listed).int())
    args = (Queries(q, queries, starts), opened, Softmax(0.13))
    part = implementation.extend_open(*on_device(implementation, args))
    assert part.out.isfinite().all() and part.lse.isfinite().all()
    tolerance = 1e-3 if implementation is triton else 3e-6
    assert_close(part, naive.extend_open(*args), tolerance)


def test_open_refuses_missing_pages() -> None:
    k = torch.zeros(4, PAGE_TOKENS, 1, 64)
    q = torch.zeros(100, 1, 64)
    for listed in ([0, 1], [1, 3], [2], []):
        slots = torch.arange(len(listed)).int()
        opened = OpenPages(k, k, indptr(len(listed)), slots, torch.tensor(listed).int())
        queries = Queries(q, indptr(100), torch.tensor([64]).int())
        with pytest.raises(ValueError, match="lack new tokens"):
            ops.extend_open(queries, opened, Softmax(1.0))


def test_lists_of_other_integers_are_refused() -> None:
    k, queries = torch.zeros(1, PAGE_TOKENS, 1, 64), torch.zeros(3, 1, 64)
    opened = OpenPages(k, k, indptr(1), torch.tensor([0]), torch.tensor([0]).int())
    with pytest.raises(ValueError, match="int64"):
        ops.extend_open(Queries(queries, indptr(3), torch.tensor([0]).int()), opened, Softmax(1.0))


def test_merge_of_parts_equals_the_whole() -> None:
    torch.manual_seed(5)
    q, k, v = torch.randn(7, 2, 64), torch.randn(90, 64), torch.randn(90, 64)
    ends = [0, 1, 1, 40, 90]
    parts = [part_over(q, k[a:b], v[a:b]) for a, b in pairwise(ends)]
    merged = empty_state(q)
    for part in parts:
        merged = merge_states(merged, part)
    assert_close(merged, part_over(q, k, v), 1e-6)
    nothing = merge_states(empty_state(q), empty_state(q))
    assert (nothing.lse == -torch.inf).all() and (nothing.out == 0).all()


def part_over(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> AttentionState:
    part = empty_state(q)
    for t in range(len(q)):
        for h in range(q.shape[1]):
            part.out[t, h], part.lse[t, h] = naive.attend_one(q[t, h], k, v, Softmax(0.2))
    return part


@pytest.fixture(params=available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(ISA_VARIABLE, request.param)
    return request.param


@pytest.mark.parametrize(
    ("threads", "new", "tiers", "head_dim", "group"),
    [
        (1, [150, 0, 1, 20], "K8V4", 64, 3),
        (2, [40, 0, 1, 5], "raw", 96, 4),
        (5, [2, 0, 1, 5], "K2V2", 80, 7),
    ],
)
def test_one_pass_over_sealed_and_open_pages(
    isa: str, threads: int, new: list[int], tiers: str, head_dim: int, group: int
) -> None:
    """Tiles of several blocks, or split over their pages; queries that are strided, and rotated."""
    torch.manual_seed(head_dim)
    layout = make_layout(
        head_dim=head_dim, num_kv_heads=2, raw_itemsize=4, high=FORMATS[tiers], low=FORMATS["K4V2"]
    )
    data = seal(layout, pages=18, dtype=torch.float32, pack=pack, tiers=random_tiers(1, 18, 2))
    sealed_pages, open_pages = (17, 3, 16, 0), ([17, 18, 19], [], [16], [0])
    position = torch.tensor([17 * 64 + 5, 0, 16 * 64 + 63, 40]).int()
    k, v = torch.full((2, 8, PAGE_TOKENS, 2, head_dim), torch.nan)
    slots = torch.tensor([6, 1, 3, 0, 5]).int()
    for slot, written in zip(slots.tolist(), (64, 64, 27, 64, 60), strict=True):
        k[slot, :written], v[slot, :written] = torch.randn(2, written, 2, head_dim)
    queries = indptr(*new)
    q = torch.randn(sum(new), 3, 2 * group, head_dim)[:, 1]
    opened = OpenLists(
        indptr(*map(len, open_pages)),
        slots,
        torch.tensor([page for pages in open_pages for page in pages]).int(),
    )
    sealed = SealedLists(indptr(*sealed_pages), torch.arange(36).int() % 18)
    batch = PrefillBatch(queries, position, opened, torch.ones(4), sealed, new, [1] * 4)
    mean = torch.randn(2, head_dim)
    pages = LayerPages(data.tables, k, v, mean if layout.rotates else None)
    step = Prefill(batch, None)
    torch.set_num_threads(threads)
    part = step.attend(q, pages, Softmax(0.1))
    torch.set_num_threads(1)  # the reference
    rotated = rotate(q.double()).float() if layout.rotates else q
    asked = Queries(q.contiguous(), queries, position)
    listed = data.tables.listed(*sealed)
    expected = naive.extend_sealed(asked._replace(q=rotated), listed, Softmax(0.1))
    if layout.rotates:
        expected = from_sealed(expected, asked.q, mean, Softmax(0.1))
    expected = merge_states(expected, naive.extend_open(asked, opened.of(k, v), Softmax(0.1)))
    assert_close(part, expected, 3e-6)
    assert_close(step.attend(q, pages, Softmax(0.1)), part, 1e-6)
