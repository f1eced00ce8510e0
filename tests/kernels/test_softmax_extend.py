# SPDX-License-Identifier: Apache-2.0
"""Soft caps, windows and sinks where a GPU prefills and scores, against float64."""

from __future__ import annotations

import math
from functools import partial
from unittest import mock

import pytest
import torch

from sglang_diffxkv.kernels import softmax as reference
from sglang_diffxkv.kernels.basis.rotation import rotate
from sglang_diffxkv.kernels.basis.sealed import from_sealed
from sglang_diffxkv.kernels.extend import naive, prefill, scratch, triton, unpacked
from sglang_diffxkv.kernels.extend.prefill import Prefill, PrefillBatch
from sglang_diffxkv.kernels.extend.scratch import make_scratch
from sglang_diffxkv.kernels.extend.traits import SealedTraits
from sglang_diffxkv.kernels.layout import FORMATS, PAGE_TOKENS, PRUNED, make_layout
from sglang_diffxkv.kernels.merge import AttentionState, add_sinks, empty_state, merge_states
from sglang_diffxkv.kernels.pack import pack
from sglang_diffxkv.kernels.pages import LayerPages, OpenPages, Queries, SealedLists
from sglang_diffxkv.kernels.score import ScoringQueries
from sglang_diffxkv.kernels.score import naive as naive_score
from sglang_diffxkv.kernels.score import triton as triton_score
from sglang_diffxkv.kernels.softmax import LOG2_E, Softmax
from tests.support.attention import assert_close, indptr, moved
from tests.support.builders import error_norm
from tests.support.device import DEVICE, as_on_gpu
from tests.support.layouts import layout_of
from tests.support.sealed import random_tiers, seal

pytestmark = pytest.mark.usefixtures("one_thread")

CAPS = [0.7, 5.0, 50.0]
"""Scores are about 1: capped hard, a little, and next to nothing."""


def sequence_pages(start: int, new: int, window_left: int) -> list[int]:
    """The pages of a window layer: from what the first new query sees to the last new token."""
    first = max(0, start - window_left) if window_left >= 0 else 0
    return list(range(first // PAGE_TOKENS, -(-(start + new) // PAGE_TOKENS)))


def window_batch(
    sequences: list[tuple[int, int]],
    softmax: Softmax,
    dtype: torch.dtype,
    dim: int,
    kv_heads: int,
    group: int,
) -> tuple[Queries, OpenPages]:
    """(tokens before, new tokens) of each sequence; what nobody sees holds NaN."""
    lists = [sequence_pages(start, new, softmax.window_left) for start, new in sequences]
    listed = [page for pages in lists for page in pages]
    k, v = torch.full((2, 2 * len(listed) + 1, PAGE_TOKENS, kv_heads, dim), math.nan).to(dtype)
    slots = torch.randperm(len(k))[: len(listed)].int()
    at = iter(slots.tolist())
    for (start, new), pages in zip(sequences, lists, strict=True):
        seen_from = max(0, start - softmax.window_left) if softmax.window_left >= 0 else 0
        for page in pages:
            slot, first = next(at), page * PAGE_TOKENS
            low, high = max(0, seen_from - first), min(PAGE_TOKENS, start + new - first)
            for raw in (k, v):
                raw[slot, low:high] = torch.randn(high - low, kv_heads, dim).to(dtype)
    q = torch.randn(sum(new for _, new in sequences), kv_heads * group, dim).to(dtype)
    queries = Queries(
        q,
        indptr(*(new for _, new in sequences)),
        torch.tensor([start for start, _ in sequences]).int(),
    )
    position = torch.tensor(listed).int()
    return queries, OpenPages(k, v, indptr(*map(len, lists)), slots, position)


def check_open(queries: Queries, opened: OpenPages, softmax: Softmax) -> None:
    part = triton.extend_open(*moved((queries, opened), DEVICE), softmax)
    nan = OpenPages(*(x.nan_to_num() for x in opened[:2]), *opened.lists)
    assert_close(part, naive.extend_open(queries, nan, softmax), 1e-3)


SEQUENCES = [(0, 130), (500, 1), (333, 70), (64, 64), (7, 0), (0, 1), (1023, 2)]


@pytest.mark.parametrize("window_left", [0, 1, 37, 64, 127, 512])
@pytest.mark.parametrize(
    ("dtype", "dim", "kv_heads", "group"),
    [(torch.float32, 64, 2, 3), (torch.bfloat16, 80, 1, 4), (torch.float16, 128, 2, 1)],
)
def test_windows(window_left: int, dtype: torch.dtype, dim: int, kv_heads: int, group: int) -> None:
    """Lists begin where the window of a sequence's first new query does."""
    torch.manual_seed(window_left + dim)
    softmax = Softmax(0.13, window_left=window_left)
    check_open(*window_batch(SEQUENCES, softmax, dtype, dim, kv_heads, group), softmax)


@pytest.mark.parametrize(("dim", "group"), [(96, 5), (256, 8), (64, 7)])
def test_windows_of_other_dimensions_with_caps(dim: int, group: int) -> None:
    torch.manual_seed(dim)
    softmax = Softmax(0.2, cap=2.5, window_left=100)
    batch = window_batch([(270, 19), (0, 0), (130, 3)], softmax, torch.bfloat16, dim, 2, group)
    check_open(*batch, softmax)


def test_pages_outside_the_window_are_skipped() -> None:
    """Whole pages that no query of a block sees may be listed, and hold anything."""
    torch.manual_seed(2)
    everything = Softmax(0.1)
    queries, opened = window_batch([(700, 3)], everything, torch.bfloat16, 64, 1, 2)
    softmax = Softmax(0.1, window_left=70)
    expected = naive.extend_open(queries, opened, softmax)
    for raw in opened[:2]:
        raw[opened.slots[:9].long()] = math.nan
    opened.slots[:9] = 1 << 30  # nor are they looked up
    part = triton.extend_open(*moved((queries, opened), DEVICE), softmax)
    assert_close(part, expected, 1e-3)


@pytest.mark.parametrize("cap", CAPS)
def test_capped_open(cap: float) -> None:
    torch.manual_seed(int(cap))
    softmax = Softmax(0.2, cap=cap)
    check_open(*window_batch([(70, 9), (0, 65)], softmax, torch.float16, 80, 2, 3), softmax)


@pytest.mark.parametrize("scale", [-400.0, 400.0])
def test_caps_of_extreme_scores(scale: float) -> None:
    """All of a row's scores end at the cap, above or below zero."""
    torch.manual_seed(3)
    softmax = Softmax(scale, cap=30.0)
    queries, opened = window_batch([(90, 5)], softmax, torch.float32, 64, 1, 2)
    check_open(queries._replace(q=queries.q.abs()), opened, softmax)


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize(
    ("dim", "high", "low", "dtype", "group"),
    [
        (256, "K8V4", "K4V2", torch.bfloat16, 2),
        (80, "raw", "K8V8", torch.float32, 1),
        (64, "K4V4", "K2V2", torch.float16, 7),
        (128, "raw", "raw", torch.bfloat16, 4),
    ],
)
def test_capped_sealed(
    cap: float,
    dim: int,
    high: str,
    low: str,
    dtype: torch.dtype,
    group: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The codes themselves, in splits, and unpacked, onto attention over other tokens."""
    torch.manual_seed(dim)
    monkeypatch.setattr(triton, "SealedTraits", partial(SealedTraits, pages=4))
    monkeypatch.setattr(triton, "SPLIT_PAGES", 2)
    monkeypatch.setattr(scratch, "MOST_TOKENS", 5 * PAGE_TOKENS)
    layout = make_layout(
        head_dim=dim,
        num_kv_heads=2,
        raw_itemsize=dtype.itemsize,
        high=FORMATS[high],
        low=FORMATS[low],
    )
    tiers = random_tiers(dim, 6, 2)
    tiers[3:5, 1] = PRUNED
    data = seal(layout, pages=6, dtype=dtype, pack=pack, tiers=tiers)
    pages = torch.tensor([5, 0, 2, 1, 2, 0, 1, 2, 3, 4]).int()
    q = torch.randn(6, 2 * group, dim).to(dtype)
    queries = Queries(q, indptr(3, 0, 2, 1), torch.zeros(4, dtype=torch.int32))
    args = queries, data.tables.listed(indptr(4, 1, 0, 5), pages), Softmax(0.2, cap=cap)
    expected = naive.extend_sealed(*args)
    uncapped = naive.extend_sealed(*args[:2], Softmax(0.2))
    assert cap == CAPS[-1] or (uncapped.out - expected.out).norm() > 0.02 * expected.out.norm()
    on_device = moved(args, DEVICE)
    assert_close(triton.extend_sealed(*on_device), expected, 1e-3)
    if dim > 128:  # slow in Triton's interpreter, and no other code
        return
    room = make_scratch(layout, dtype, DEVICE)
    for x in room:
        x.fill_(-(2**40) if x.dtype == torch.int64 else math.nan)
    before = empty_state(q.float())
    before.out[1], before.lse[1] = torch.randn(before.out[1].shape), 1.5
    expected = merge_states(before, expected)
    part = moved(before, DEVICE)
    unpacked.extend_unpacked(part, *on_device, room)
    assert_close(part, expected, 1e-2 if room.k.dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize(
    ("dim", "group", "dtype"), [(80, 3, torch.bfloat16), (64, 5, torch.float32)]
)
def test_capped_scores(cap: float, dim: int, group: int, dtype: torch.dtype) -> None:
    torch.manual_seed(dim)
    softmax = Softmax(0.2, cap=cap)
    queries, opened = window_batch([(0, 130), (0, 50)], softmax, dtype, dim, 2, group)
    values = torch.full_like(opened.values, math.nan)
    chosen = torch.tensor([0, 63, 64, 129, 137, 179])
    positions = torch.tensor([0, 63, 64, 129, 7, 49]).int()
    lse = 6 + torch.rand(len(chosen), 2 * group)
    asking = ScoringQueries(queries.q[chosen], lse, indptr(4, 2), positions)
    before = torch.rand(len(opened.keys), 2, PAGE_TOKENS)
    expected, accum = before.double(), before.to(DEVICE, copy=True)
    naive_score.score_open(asking, opened, expected, softmax)
    listed = OpenPages(opened.keys, values, *opened.lists)
    triton_score.score_open(*moved((asking, listed), DEVICE), accum, softmax)
    assert error_norm(accum.cpu() - before, expected - before.double()) <= 1e-3
    unseen = expected == before
    assert unseen.any() and torch.equal(accum.cpu()[unseen], before[unseen])


def states(t: int, heads: int, dim: int) -> AttentionState:
    """Attention of queries, some of which see nothing, and far above and below their sinks."""
    state = AttentionState(torch.randn(t, heads, dim), 40 * torch.randn(t, heads))
    state.out[::3, 1], state.lse[::3, 1] = 0, -math.inf
    return state


@pytest.mark.parametrize(("t", "heads", "dim"), [(7, 5, 80), (1, 64, 64), (33, 3, 256), (0, 2, 64)])
@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_sinks(kind: str, t: int, heads: int, dim: int) -> None:
    """As an attention over one more token, whose value is 0."""
    torch.manual_seed(t)
    sinks = 20 * torch.randn(heads)
    before = states(t, heads, dim)
    sink = AttentionState(torch.zeros_like(before.out), (sinks * LOG2_E).expand(t, heads))
    expected = merge_states(*(AttentionState(*(x.double() for x in s)) for s in (before, sink)))
    args = AttentionState(*(x.clone() for x in before)), sinks
    if kind == "cpu":
        part = add_sinks(*args)
    else:
        with as_on_gpu():
            part = add_sinks(*moved(args, DEVICE))
    assert_close(part, expected, 1e-6)
    assert_close(reference.add_sinks(before, sinks), expected, 1e-6)


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
@pytest.mark.parametrize("any_sealed", [False, True])
def test_prefill_adds_sinks_once(kind: str, any_sealed: bool) -> None:
    """Over open pages alone, and after those of sealed ones have come back from their basis."""
    torch.manual_seed(7)
    dim, group, new = 64, 3, [5, 0, 66]
    softmax = Softmax(0.1, sinks=torch.randn(2 * group) + 2)
    layout = layout_of("K8V4", "K4V2", head_dim=dim, kv_heads=2, itemsize=2)
    data = seal(layout, pages=4, dtype=torch.bfloat16, pack=pack)
    sequences = list(zip([90, 0, 10], new, strict=True))
    queries, opened = window_batch(sequences, softmax, torch.bfloat16, dim, 2, group)
    sealed = SealedLists(indptr(3, 0, 1), torch.tensor([2, 0, 1, 3]).int())
    mean = torch.randn(2, dim)
    expected = naive.extend_open(queries, opened, softmax)
    if any_sealed:
        rotated = queries._replace(q=rotate(queries.q.float()))
        part = naive.extend_sealed(rotated, data.tables.listed(*sealed), softmax)
        expected = merge_states(expected, from_sealed(part, queries.q, mean, softmax))
    expected = reference.add_sinks(expected, softmax.sinks)
    batch = PrefillBatch(
        queries.indptr,
        queries.position,
        opened.lists,
        torch.tensor([31, 1, 12]).int(),
        sealed if any_sealed else None,
        new,
        [90, 0, 10],
    )
    pages = LayerPages(data.tables, opened.keys, opened.values, mean)
    if kind == "cpu":
        part = Prefill(batch, None).attend(queries.q, pages, softmax)
    else:
        with as_on_gpu(), mock.patch.object(prefill, "on_gpu", lambda x: True):
            step = Prefill(moved(batch, DEVICE), None)
            part = step.attend(*moved((queries.q, pages, softmax), DEVICE))
    assert_close(part, expected, 1e-3 if kind == "gpu" else 3e-6)
