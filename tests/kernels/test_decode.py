# SPDX-License-Identifier: Apache-2.0
"""Decode attention: every implementation against float64 over the dequantized tokens."""

from __future__ import annotations

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import triton.language as tl

from sglang_diffxkv.kernels import decode
from sglang_diffxkv.kernels.cpu.build import ISA_VARIABLE, available_isas
from sglang_diffxkv.kernels.decode import naive
from sglang_diffxkv.kernels.layout import PAGE_TOKENS, PRUNED
from sglang_diffxkv.kernels.merge import AttentionState, merge_states
from sglang_diffxkv.kernels.merge import triton as merge_triton
from sglang_diffxkv.kernels.pages import OpenPages
from sglang_diffxkv.kernels.softmax import Softmax
from tests.support.attention import moved
from tests.support.builders import (
    SealedArena,
    build_sealed,
    error_norm,
    page_lists,
    random_tiers,
)
from tests.support.device import DEVICE
from tests.support.layouts import layout_of
from tests.support.pairs import in_turn

IMPLEMENTATIONS = ["naive", *available_isas(), "triton"]
"""naive.py, each compiled variant, and the GPU's."""

# Integer products and the GPU's round queries and weights to 16 bits; all else is fp32 throughout.
TOLERANCE = {"avx512": 3e-4, "triton": 1e-3}
SHARES = (0.25, 0.5, 0.25)
LENGTHS = [3, 0, 14, 1]


@pytest.fixture(params=IMPLEMENTATIONS)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of the implementation under test, selected for the public functions."""
    if request.param not in ("naive", "triton"):
        monkeypatch.setenv(ISA_VARIABLE, request.param)
    return request.param


@functools.cache
def sealed(
    high: str = "K8V4",
    low: str = "K4V2",
    *,
    pages: int = 3,
    head_dim: int = 128,
    kv_heads: int = 2,
    shares: tuple[float, float, float] = SHARES,
    dtype: torch.dtype = torch.float32,
) -> SealedArena:
    """A random arena, made once for all implementations."""
    gen = torch.Generator().manual_seed(head_dim)
    layout = layout_of(high, low, head_dim=head_dim, kv_heads=kv_heads, itemsize=dtype.itemsize)
    return build_sealed(layout, random_tiers(pages, kv_heads, shares, gen), gen, dtype)


def implementation(name: str) -> Any:
    if name == "triton":
        from sglang_diffxkv.kernels.decode import triton

        return triton
    return naive if name == "naive" else decode


def run(name: str, function: str, case: Case) -> AttentionState:
    """Call a decode function where its implementation runs."""
    device = DEVICE if name == "triton" else torch.device("cpu")
    part = getattr(implementation(name), function)(*moved(case.args, device))
    return AttentionState(part.out.cpu(), part.lse.cpu())


def dense_reference(
    q: torch.Tensor, kv: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], softmax: Softmax
) -> AttentionState:
    """Attention of q [B, Hq, D] over kv[b] = keys, values [T, H, D] and a mask [T, H]."""
    parts = []
    for b, (keys, values, kept) in enumerate(kv):
        group = q.shape[1] // keys.shape[1]
        keys, values = (x.double().nan_to_num().repeat_interleave(group, 1) for x in (keys, values))
        scores = torch.einsum("hd,thd->ht", q[b].double(), keys) * softmax.scale
        mask = kept.repeat_interleave(group, 1).T
        scores = scores.masked_fill(~mask, -math.inf)
        lse = torch.logsumexp(scores, 1) if len(keys) else torch.full((q.shape[1],), -math.inf)
        weights = torch.where(mask, torch.exp(scores - lse.unsqueeze(1)), 0)
        parts.append((torch.einsum("ht,thd->hd", weights, values), lse * math.log2(math.e)))
    return AttentionState(torch.stack([o for o, _ in parts]), torch.stack([x for _, x in parts]))


def check(actual: AttentionState, expected: AttentionState, tolerance: float) -> None:
    empty = torch.isinf(expected.lse)
    assert actual.out.dtype == actual.lse.dtype == torch.float32
    assert torch.equal(torch.isneginf(actual.lse), empty)
    assert not actual.out[empty].any()
    assert error_norm(actual.out, expected.out) <= tolerance
    if not empty.all():
        assert (actual.lse - expected.lse)[~empty].abs().max() <= max(tolerance, 1e-5)


class Case(NamedTuple):
    """Positional arguments of a decode function and what it must return."""

    args: tuple[Any, ...]
    expected: AttentionState


@functools.cache
def sealed_case(
    arena: SealedArena, lengths: tuple[int, ...], group: int, dtype: torch.dtype
) -> Case:
    layout, softmax = arena.layout, Softmax(arena.layout.head_dim**-0.5)
    gen = torch.Generator().manual_seed(group)
    indptr, pages = page_lists(list(lengths), len(arena.frames), gen)
    q = torch.randn(len(lengths), layout.num_kv_heads * group, layout.head_dim, generator=gen)
    q = q.to(dtype)
    kv = []
    for b in range(len(lengths)):
        listed = pages[indptr[b] : indptr[b + 1]].long()
        kept = arena.tiers[listed].flatten(0, 1) != PRUNED
        kv.append((arena.keys[listed].flatten(0, 1), arena.values[listed].flatten(0, 1), kept))
    args = (q, arena.tables.listed(indptr, pages), softmax)
    return Case(args, dense_reference(q, kv, softmax))


def check_sealed(
    name: str,
    arena: SealedArena,
    lengths: list[int],
    group: int,
    dtype: torch.dtype = torch.float32,
) -> None:
    if name in ("naive", "triton") and arena.layout.head_dim > 16:  # a few pages tell as much
        lengths = [min(n, 3) for n in lengths]
    case = sealed_case(arena, tuple(lengths), group, dtype)
    check(run(name, "decode_sealed", case), case.expected, TOLERANCE.get(name, 1e-5))


@pytest.mark.parametrize(
    ("head_dim", "tiers"),
    in_turn(
        [64, 80, 96, 128, 256],
        [("K8V8/K2V2",), ("raw/K4V2",)],
        [("K8V4/K4V2",), ("K4V8/K4V4",), ("K8V4/raw",)],
    ),
)
def test_formats_and_head_dims(name: str, head_dim: int, tiers: str) -> None:
    """Keys and values of all bits with every head_dim."""
    high, low = tiers.split("/")
    check_sealed(name, sealed(high, low, head_dim=head_dim), LENGTHS, 4)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 7, 8, 16, 17])
def test_groups(name: str, group: int) -> None:
    check_sealed(name, sealed(head_dim=64), LENGTHS, group)


@pytest.mark.parametrize("head_dim", [16, 48, 112])
def test_unusual_head_dims(name: str, head_dim: int) -> None:
    check_sealed(name, sealed("K8V4", "K2V2", head_dim=head_dim, kv_heads=3), LENGTHS, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_model_dtypes(name: str, dtype: torch.dtype) -> None:
    check_sealed(name, sealed("raw", "K4V2", dtype=dtype), LENGTHS, 4, dtype)


@pytest.mark.parametrize("shares", [(1, 0, 0), (0, 1, 0), (0.02, 0.02, 0.96)])
def test_lopsided_tiers(name: str, shares: tuple[float, float, float]) -> None:
    check_sealed(name, sealed(shares=shares, pages=4, kv_heads=5), [4, 1, 9], 4)


@pytest.mark.parametrize("kv_heads", [1, 32])
def test_payload_spans_frames(name: str, kv_heads: int) -> None:
    """Of full pages, whose last head ends in the last frame: one head has all frames, 32 share."""
    gen = torch.Generator().manual_seed(5)
    layout = layout_of("K8V4", "K8V4", head_dim=64, kv_heads=kv_heads)
    tiers = random_tiers(3, kv_heads, (0.5, 0.5, 0), gen).clamp(min=1)
    arena = build_sealed(layout, tiers, gen)
    if kv_heads == 1:
        assert (arena.frames >= 0).sum(1).min() > 20
    check_sealed(name, arena, [3] if kv_heads == 1 else [1], 1)


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_small_and_large_values(name: str, size: float) -> None:
    """What 16-bit weights have to bear: fp16 ends at 65,504 and is coarse below 6e-5."""
    gen = torch.Generator().manual_seed(4)
    tiers = random_tiers(3, 2, SHARES, gen)
    check_sealed(name, build_sealed(layout_of(), tiers, gen, value_size=size), [3, 2], 4)


def test_everything_pruned(name: str) -> None:
    gen = torch.Generator().manual_seed(3)
    tiers = torch.full((2, PAGE_TOKENS, 2), PRUNED, dtype=torch.uint8)
    check_sealed(name, build_sealed(layout_of(), tiers, gen), [2, 0], 4)


def test_many_pages_split_over_kv(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More pages than one work tile takes, for a single sequence and for ragged ones."""
    if name == "triton":  # and more tiles than are merged at a time
        from sglang_diffxkv.kernels.merge import tile_kernels

        monkeypatch.setattr(tile_kernels, "ELEMENTS", tl.constexpr(4 * 16))
    arena = sealed("K4V4", "K2V2", head_dim=16, kv_heads=1)
    check_sealed(name, arena, [61], 2)
    check_sealed(name, arena, [40, 3, 0, 17], 2)


def test_strided_tables(name: str) -> None:
    """Directory tables of one layer, cut out of tables [V, layers, ...]."""
    arena = sealed()
    frames = torch.stack((torch.full_like(arena.frames, -1), arena.frames), 1)[:, 1]
    heads = torch.stack((torch.full_like(arena.heads, -1), arena.heads), 1)[:, 1]
    check_sealed(name, replace(arena, frames=frames, heads=heads), LENGTHS, 4)


@functools.cache
def open_case(dtype: torch.dtype, head_dim: int, group: int) -> Case:
    """Ragged open pages, one sequence without any; NaN where nothing is written."""
    gen = torch.Generator().manual_seed(group)
    k_raw, v_raw = torch.randn(2, 9, 2, PAGE_TOKENS, 3, head_dim, generator=gen).to(dtype)[:, :, 1]
    indptr = torch.tensor([0, 3, 3, 4, 8], dtype=torch.int32)
    slots = torch.randperm(9, generator=gen)[:8].to(torch.int32)
    last_len = torch.tensor([17, 0, 64, 1], dtype=torch.int32)
    for b in (0, 3):
        k_raw[slots[indptr[b + 1] - 1].long(), last_len[b] :] = math.nan
        v_raw[slots[indptr[b + 1] - 1].long(), last_len[b] :] = math.nan
    q = torch.randn(4, 3 * group, head_dim, generator=gen).to(dtype)
    kv = []
    for b in range(4):
        listed = slots[indptr[b] : indptr[b + 1]].long()
        keys, values = k_raw[listed].flatten(0, 1), v_raw[listed].flatten(0, 1)
        length = len(keys) - PAGE_TOKENS + int(last_len[b])
        kept = (torch.arange(len(keys)) < length).unsqueeze(1).expand(-1, 3)
        kv.append((keys, values, kept))
    position = torch.arange(8, dtype=torch.int32)
    opened = OpenPages(k_raw, v_raw, indptr, slots, position)
    softmax = Softmax(head_dim**-0.5)
    args = (q, opened, last_len, softmax)
    return Case(args, dense_reference(q, kv, softmax))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_dim", "group"), [(64, 1), (80, 6), (128, 4), (16, 3)])
def test_open(name: str, dtype: torch.dtype, head_dim: int, group: int) -> None:
    case = open_case(dtype, head_dim, group)
    tolerance = 1e-3 if name == "triton" else 1e-6
    check(run(name, "decode_open", case), case.expected, tolerance)


def test_concurrent_callers_share_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    case = sealed_case(sealed(), (14, 9), 4, torch.float32)
    with ThreadPoolExecutor(4) as callers:
        parts = list(callers.map(lambda _: decode.decode_sealed(*case.args), range(40)))
    for part in parts:
        check(part, case.expected, TOLERANCE["avx512"])


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_merge_matches_attention_over_all(name: str) -> None:
    merge = merge_triton.merge_states if name == "triton" else merge_states
    gen = torch.Generator().manual_seed(6)
    device = DEVICE if name == "triton" else torch.device("cpu")
    q = torch.randn(3, 4, 64, generator=gen)
    keys, values = torch.randn(2, 100, 2, 64, generator=gen)
    first = (torch.arange(100) < 37).unsqueeze(1).expand(-1, 2)
    whole, none = torch.ones_like(first), torch.zeros_like(first)

    def part(*masks: torch.Tensor) -> AttentionState:
        parts = dense_reference(q, [(keys, values, mask) for mask in masks], Softmax(0.125))
        return AttentionState(parts.out.float().to(device), parts.lse.float().to(device))

    merged = merge(part(first, whole, none), part(~first, none, whole))
    check(merged, part(whole, whole, whole), 1e-6)
    nothing = merge(part(none, none, none), part(none, none, none))
    check(nothing, part(none, none, none), 1e-6)


def test_rows_of_large_arenas() -> None:
    """Numbers of rows beyond 2 ** 31, which the arena of no test has."""
    from tests.support.rows import arena_rows

    frames = torch.tensor([[40_000_000, 70_000_000, 3]], dtype=torch.int32)
    for row_bytes in (8, 16, 32, 64, 128):
        per_frame = 3328 // row_bytes
        virtual = torch.tensor([0, per_frame - 1, per_frame, 3 * per_frame - 1], dtype=torch.int32)
        expected = frames[0].long()[virtual // per_frame] * per_frame + virtual % per_frame
        found = arena_rows(frames.to(DEVICE), virtual.to(DEVICE), 3328, row_bytes)
        assert torch.equal(found.cpu(), expected)


def test_mismatches_are_refused() -> None:
    gen = torch.Generator().manual_seed(7)
    arena = sealed()
    indptr, pages = page_lists([1], 1, gen)
    listed = arena.tables.listed(indptr, pages)
    for shape in ((1, 4, 64), (1, 3, 128)):
        with pytest.raises(ValueError, match="against"):
            decode.decode_sealed(torch.zeros(shape), listed, 1.0)
    raw = torch.zeros(1, PAGE_TOKENS, 128, 2).transpose(2, 3)
    with pytest.raises(ValueError, match="strides"):
        opened = OpenPages(raw, raw, indptr, pages, pages)
        decode.decode_open(torch.zeros(1, 4, 128), opened, indptr, 1.0)
