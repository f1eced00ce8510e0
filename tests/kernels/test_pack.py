# SPDX-License-Identifier: Apache-2.0
"""Sealing bytes: sizes, packing, unpacking; every implementation against the naive one."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from sglang_diffxkv.kernels import pack as ops
from sglang_diffxkv.kernels.cpu.build import ISA_VARIABLE, available_isas
from sglang_diffxkv.kernels.layout import (
    FORMATS,
    HIGH,
    LOW,
    PAGE_TOKENS,
    PRUNED,
    PageLayout,
    decode_importance,
    encode_importance,
    head_counts,
    measure,
)
from sglang_diffxkv.kernels.pack import Grades, RawTokens, TokenRows, cpu, naive, triton
from sglang_diffxkv.kernels.pages import SealedTables
from tests.support import builders, layouts, torch_pack
from tests.support.device import DEVICE
from tests.support.pairs import in_turn
from tests.support.sealed import Sealed, random_tiers, seal
from tests.support.torch_pack import dequantize_rows, quantize_rows

CPP = [f"cpp {isa}" for isa in available_isas()]
PAIRS = [("K8V4", "K4V2"), ("raw", "K8V8"), ("K4V4", "K2V2"), ("K4V8", "K8V4"), ("raw", "raw")]


def layout_of(
    head_dim: int, heads: int, high: str, low: str, dtype: torch.dtype = torch.bfloat16
) -> PageLayout:
    return layouts.layout_of(high, low, head_dim=head_dim, kv_heads=heads, itemsize=dtype.itemsize)


@pytest.fixture(params=["torch", "triton", *CPP])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The bench's reference, Triton's, and C++'s for every instruction set of this machine."""
    if request.param == "torch":
        return torch_pack
    if request.param == "triton":
        if DEVICE.type == "cpu":  # fewer, larger tiles cost the interpreter less
            monkeypatch.setattr(triton, "TILE", 2 * triton.TILE)
        return triton
    monkeypatch.setenv(ISA_VARIABLE, request.param.removeprefix("cpp "))
    return cpu


def device_of(implementation: ModuleType) -> torch.device:
    return DEVICE if implementation is triton else torch.device("cpu")


@pytest.mark.parametrize("high", FORMATS)
@pytest.mark.parametrize("low", FORMATS)
def test_measure_agrees_with_layout(high: str, low: str) -> None:
    layout = layout_of(80, 3, high, low)
    tiers = random_tiers(3, 5, 3)
    heads, nbytes = measure(tiers[:, None], layout)
    assert heads.shape == (5, 1, 3, 2) and nbytes.shape == (5, 1)
    assert heads.dtype == nbytes.dtype == torch.int32
    for page in range(5):
        cursor = 0
        for head in range(3):
            n_high = int((tiers[page, head] == HIGH).sum())
            n_low = int((tiers[page, head] == LOW).sum())
            assert int(heads[page, 0, head, 0]) == cursor
            assert [int(n) for n in head_counts(heads[page, 0, head])] == [n_high, n_low]
            cursor += layout.sections(n_high, n_low).total
        assert nbytes[page, 0] == cursor


SHAPES = [
    (64, torch.float32),
    (80, torch.bfloat16),
    (96, torch.float16),
    (128, torch.bfloat16),
    (256, torch.float32),
]
ALL_BITS = [("raw", "K8V8"), ("K4V4", "K2V2")]


@pytest.mark.parametrize(
    ("shape", "high", "low"),
    in_turn(SHAPES, ALL_BITS, [pair for pair in PAIRS if pair not in ALL_BITS]),
)
def test_implementations_agree(
    implementation: ModuleType, shape: tuple[int, torch.dtype], high: str, low: str
) -> None:
    """Same bytes in the arena, nothing written elsewhere, and the same values read back."""
    head_dim, dtype = shape
    case = reference(head_dim, high, low, dtype)
    sealed = case.sealed
    assert torch.equal(packed_again(implementation, sealed), sealed.arena)
    for out_dtype in (torch.float32, torch.bfloat16, torch.float16):
        # The interpreter is slow; it also truncates to bf16.
        if implementation is triton and out_dtype != dtype and DEVICE.type == "cpu":
            continue
        step = 2.0**-7 if implementation is triton and out_dtype == torch.bfloat16 else 0
        got = read(implementation, sealed, case.pages, case.first, out_dtype)
        for a, b in zip(got, case.values, strict=True):
            torch.testing.assert_close(a, b.to(a.dtype), rtol=step, atol=0, equal_nan=True)


def packed_again(implementation: ModuleType, sealed: Sealed) -> torch.Tensor:
    """The arena, poisoned, after the implementation has packed the same into it."""
    moved = sealed.to(device_of(implementation))
    arena = torch.full_like(moved.arena, 0xFF)
    implementation.pack(moved.raw, moved.grades, moved.tables._replace(arena=arena))
    return arena.cpu()


class Reference(NamedTuple):
    """Pages sealed by the naive implementation, and what it reads back of some of them."""

    sealed: Sealed
    pages: torch.Tensor
    first: torch.Tensor
    values: tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@cache
def reference(head_dim: int, high: str, low: str, dtype: torch.dtype) -> Reference:
    sealed = seal(layout_of(head_dim, 2, high, low, dtype), pages=2, dtype=dtype, pack=naive.pack)
    pages = torch.tensor([1, 0, 1])
    first = torch.randperm(6).view(3, 2) * PAGE_TOKENS
    return Reference(sealed, pages, first, read(naive, sealed, pages, first, torch.float32))


@pytest.mark.parametrize(("high", "low"), PAIRS)
def test_copied_rows_are_the_old_bytes(implementation: ModuleType, high: str, low: str) -> None:
    """Rows of tokens that keep their tier, from elsewhere; all other bytes are left alone."""
    layout = layout_of(80, 3, high, low)
    before, after = (
        seal(layout, pages=3, dtype=torch.bfloat16, pack=naive.pack, tiers=tiers)
        for tiers in random_tiers(7, 6, 3).split(3)
    )
    arenas = []
    for module in (naive, implementation):
        old, new = (x.to(device_of(module)) for x in (before, after))
        source, target = (x.tables._replace(arena=x.arena.clone()) for x in (old, new))
        module.copy_rows(source, old.tiers, target, new.tiers)
        assert torch.equal(source.arena.cpu(), before.arena)
        arenas.append(target.arena.cpu())
    assert torch.equal(arenas[1], arenas[0])

    # The same, from a mixture of both sources.
    same = (before.tiers == after.tiers).transpose(1, 2)[..., None]
    slots = torch.arange(3)
    mixed = [
        torch.where(same, a[before.slots.long()], b[after.slots.long()])
        for a, b in ((before.k_raw, after.k_raw), (before.v_raw, after.v_raw))
    ]
    expected = torch.full_like(after.arena, 0xFF)
    tables = after.tables._replace(arena=expected)
    naive.pack(RawTokens(*mixed, slots), after.grades, tables)
    assert bool(same.any()) and torch.equal(arenas[0], expected)


def read(
    module: ModuleType, sealed: Sealed, pages: torch.Tensor, first: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values and token metadata of `unpack_into`, over poisoned outputs."""
    device, rows = device_of(module), first.numel() * PAGE_TOKENS
    moved = sealed.to(device)
    k = torch.full((rows, sealed.layout.head_dim), torch.nan, dtype=dtype, device=device)
    metadata = torch.full((rows, 2), 0xFF, dtype=torch.uint8, device=device)
    out = TokenRows(k, k.clone(), first.to(device), metadata)
    module.unpack_into(moved.tables, pages.to(device), out, sealed.k_raw.dtype)
    return out.keys.cpu(), out.values.cpu(), metadata.cpu()


@pytest.mark.parametrize(("high", "low"), PAIRS)
def test_reads_what_an_independent_packer_wrote(
    implementation: ModuleType, high: str, low: str
) -> None:
    gen = torch.Generator().manual_seed(11)
    layout = layout_of(80, 2, high, low, torch.float32)
    tiers = builders.random_tiers(3, 2, (0.3, 0.4, 0.3), gen)
    built = builders.build_sealed(layout, tiers, gen)
    device = device_of(implementation)
    k, v = torch.full((2, 6 * PAGE_TOKENS, 80), torch.nan, device=device)
    first = torch.arange(6).view(3, 2) * PAGE_TOKENS
    tables = SealedTables(*(x.to(device) for x in (built.arena, built.frames, built.heads)), layout)
    rows = TokenRows(k, v, first.to(device))
    implementation.unpack_into(tables, torch.arange(3).to(device), rows, torch.float32)
    for got, source in ((k.cpu(), built.keys), (v.cpu(), built.values)):
        for page, head in product(range(3), range(2)):
            tier = tiers[page, :, head]
            order = torch.cat([(tier == code).nonzero().flatten() for code in (HIGH, LOW)])
            rows = got.view(3, 2, PAGE_TOKENS, 80)[page, head]
            torch.testing.assert_close(rows[: len(order)], source[page, order, head].float())
            assert rows[len(order) :].isnan().all()


@pytest.mark.parametrize(("high", "low"), PAIRS)
def test_round_trip(high: str, low: str) -> None:
    """Rows come back in tier order with their metadata, raw ones exact, others as near as codes."""
    layout = layout_of(128, 3, high, low)
    sealed = seal(layout, pages=4, dtype=torch.bfloat16, pack=ops.pack)
    pages = torch.tensor([3, 1, 0], dtype=torch.int32)
    out = ops.unpack(sealed.tables, pages, torch.float32, torch.bfloat16)
    assert out.k.shape == (3, 3, PAGE_TOKENS, 128) and out.k.dtype == torch.float32
    for n, page in enumerate(pages.tolist()):
        for head in range(3):
            tiers = sealed.tiers[page, head]
            order = [*(tiers == HIGH).nonzero()[:, 0], *(tiers == LOW).nonzero()[:, 0]]
            order = torch.tensor(order, dtype=torch.long)
            m = len(order)
            assert out.kept[n, head].tolist() == [True] * m + [False] * (PAGE_TOKENS - m)
            assert torch.equal(out.position[n, head, :m].long(), order)
            assert torch.equal(out.importance[n, head, :m], sealed.importance[page, head, order])
            n_high = int((tiers == HIGH).sum())
            for got, raw, side in (
                (out.k, sealed.k_raw, "key_bits"),
                (out.v, sealed.v_raw, "value_bits"),
            ):
                assert (got[n, head, m:] == 0).all()
                want = raw[sealed.slots[page].long(), order, head].float()
                for rows, tier in (
                    (slice(0, n_high), layout.high),
                    (slice(n_high, m), layout.low),
                ):
                    error = (got[n, head, :m][rows] - want[rows]).abs().amax(-1)
                    bits = getattr(tier, side)
                    spread = want[rows].amax(-1) - want[rows].amin(-1)
                    bound = spread * builders.error_bound(bits) + 2e-3 if bits else 0 * error
                    assert (error <= bound).all()


def test_clipping_lowers_the_error_of_usual_rows() -> None:
    bits, least = 2, 0.15
    rows = torch.randn(2000, 128, generator=torch.Generator().manual_seed(5))
    levels = 2**bits - 1
    low, high = rows.aminmax(dim=1, keepdim=True)
    step = (high - low) / levels
    unclipped = ((rows - low) / step).round() * step + low
    packed, meta = quantize_rows(rows, bits)
    clipped = dequantize_rows(packed, meta, bits)
    assert (clipped - rows).norm() < (1 - least) * (unclipped - rows).norm()


def test_all_pruned_and_empty_batches() -> None:
    layout = layout_of(64, 2, "K8V4", "K4V2")
    sealed = seal(layout, pages=2, dtype=torch.bfloat16, pack=ops.pack, tiers=PRUNED)
    assert (sealed.arena == 0xFF).all()
    none = torch.empty(0, dtype=torch.int32)
    for pages in (torch.tensor([0, 1]), none):
        out = ops.unpack(sealed.tables, pages, torch.float32, torch.bfloat16)
        assert not out.kept.any() and not out.k.any() and len(out.k) == len(pages)
    tables = sealed.tables._replace(frames=sealed.frames[:0], heads=sealed.heads[:0])
    grades = Grades(sealed.tiers[:0], sealed.importance[:0])
    ops.pack(sealed.raw._replace(slots=sealed.slots[:0]), grades, tables)


def test_rows_that_are_not_contiguous_are_refused() -> None:
    sealed = seal(layout_of(64, 2, "K8V4", "K4V2"), pages=1, dtype=torch.bfloat16, pack=naive.pack)
    keys = sealed.k_raw.transpose(1, 3)
    with pytest.raises(ValueError, match="strides of raw pages"):
        ops.pack(sealed.raw._replace(keys=keys), sealed.grades, sealed.tables)
    frames = torch.stack([sealed.frames, sealed.frames], dim=-1)[..., 0]
    with pytest.raises(ValueError, match="strides of frames"):
        ops.pack(sealed.raw, sealed.grades, sealed.tables._replace(frames=frames))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_constant_and_huge_rows(bits: int) -> None:
    rows = extreme_rows()
    packed, meta = quantize_rows(rows, bits)
    back = dequantize_rows(packed, meta, bits)
    assert meta.isfinite().all() and back.isfinite().all()
    assert torch.equal(back[:2], rows[:2])
    assert (back[2] == -65504).all()
    assert (back[5] - rows[5]).abs().max() <= 2**-23


def extreme_rows() -> torch.Tensor:
    """fp32 [64, 64]: constant, huge and nearly constant rows, and scales down to subnormal ones."""
    rows = torch.zeros(64, 64)
    rows[1] = 3.3125
    rows[2] = -1e30
    rows[3, ::2] = 1e38
    rows[3, 1::2] = -1e38
    rows[4, 0] = 60000.0
    rows[5] = 1.0
    rows[5, 7] += 2**-23
    rows[6:] = torch.randn(58, 64) * torch.logspace(-9, 6, 58)[:, None]
    return rows


@pytest.mark.parametrize(("high", "low"), [("K8V4", "K4V2"), ("K4V4", "K2V2")])
def test_extreme_rows_agree(implementation: ModuleType, high: str, low: str) -> None:
    layout = layout_of(64, 1, high, low, torch.float32)
    rows = extreme_rows().view(1, PAGE_TOKENS, 1, 64)
    tiers = random_tiers(1, 3, 1)[1:2]
    sealed = seal(
        layout, pages=1, dtype=torch.float32, pack=naive.pack, tiers=tiers, k=rows, v=-rows
    )
    assert torch.equal(packed_again(implementation, sealed), sealed.arena)


def test_strided_tables_and_raw_pages(implementation: ModuleType) -> None:
    """One layer's share of tables and raw pages that hold several layers."""
    layout = layout_of(96, 2, "K8V4", "K4V2")
    sealed = seal(layout, pages=3, dtype=torch.bfloat16, pack=naive.pack)
    moved = sealed.to(device_of(implementation))
    k, v, frames, heads = (
        torch.stack([x, torch.zeros_like(x)], dim=1)[:, 0]
        for x in (moved.k_raw, moved.v_raw, moved.frames, moved.heads)
    )
    strided = replace(moved, k_raw=k, v_raw=v, frames=frames, heads=heads)
    assert torch.equal(packed_again(implementation, strided), sealed.arena)
    pages, first = torch.arange(3), torch.arange(6).view(3, 2) * PAGE_TOKENS
    expected = read(naive, sealed, pages, first, torch.float32)
    got = read(implementation, strided, pages, first, torch.float32)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_importance_codes() -> None:
    x = torch.tensor([1.0, 0.5, 2.0**-31.875, 2.0**-40, 0.0, torch.nan, -1.0, 7.0, torch.inf])
    assert encode_importance(x).tolist() == [255, 247, 0, 0, 0, 0, 0, 255, 255]
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(encode_importance(decode_importance(codes)), codes)
    y = torch.rand(1000).clamp(min=1e-3) ** 3
    ratio = decode_importance(encode_importance(y)) / y
    assert ratio.log2().abs().max() <= 1 / 16 + 1e-3
