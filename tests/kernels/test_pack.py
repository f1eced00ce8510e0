# SPDX-License-Identifier: Apache-2.0
"""Sealing bytes: sizes, packing, unpacking; every implementation against the naive one."""

from __future__ import annotations

import pytest
import torch

from sglang_diffxkv.kernels import pack as ops
from sglang_diffxkv.kernels.layout import (
    FORMATS,
    HIGH,
    LOW,
    PAGE_TOKENS,
    PRUNED,
    PageLayout,
    make_layout,
)
from sglang_diffxkv.kernels.pack import naive, torch_ops
from sglang_diffxkv.kernels.pack.quantize import dequantize_rows, quantize_rows
from tests.kernels.sealed import Sealed, random_tiers, seal

IMPLEMENTATIONS = [naive, torch_ops]
PAIRS = [("K8V4", "K4V2"), ("raw", "K8V8"), ("K4V4", "K2V2"), ("K4V8", "K8V4"), ("raw", "raw")]


def layout_of(
    head_dim: int, heads: int, high: str, low: str, dtype: torch.dtype = torch.bfloat16
) -> PageLayout:
    return make_layout(
        head_dim=head_dim,
        num_kv_heads=heads,
        raw_itemsize=dtype.itemsize,
        high=FORMATS[high],
        low=FORMATS[low],
    )


@pytest.mark.parametrize("high", FORMATS)
@pytest.mark.parametrize("low", FORMATS)
def test_measure_agrees_with_layout(high: str, low: str) -> None:
    layout = layout_of(80, 3, high, low)
    tiers = random_tiers(3, 5, 3)
    heads, nbytes = ops.measure(tiers[:, None], layout)
    assert heads.shape == (5, 1, 3, 2) and nbytes.shape == (5, 1)
    assert heads.dtype == nbytes.dtype == torch.int32
    for page in range(5):
        cursor = 0
        for head in range(3):
            n_high = int((tiers[page, head] == HIGH).sum())
            n_low = int((tiers[page, head] == LOW).sum())
            assert heads[page, 0, head].tolist() == [cursor, n_high | n_low << 8]
            cursor += layout.sections(n_high, n_low).total
        assert nbytes[page, 0] == cursor


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        (64, torch.float32),
        (80, torch.bfloat16),
        (96, torch.float16),
        (128, torch.bfloat16),
        (256, torch.float32),
    ],
)
@pytest.mark.parametrize(("high", "low"), PAIRS)
def test_implementations_agree(head_dim: int, high: str, low: str, dtype: torch.dtype) -> None:
    """Same bytes in the arena, nothing written elsewhere, and the same values read back."""
    torch.manual_seed(head_dim)
    layout = layout_of(head_dim, 2, high, low, dtype)
    sealed = seal(layout, pages=2, dtype=dtype, pack=naive.pack)
    pages = torch.tensor([1, 0, 1])
    first = torch.randperm(6).view(3, 2) * PAGE_TOKENS
    expected = read(naive, sealed, pages, first, torch.float32)
    for module in IMPLEMENTATIONS[1:]:
        again = sealed.arena.new_full(sealed.arena.shape, 0xFF)
        module.pack(*sealed.sources, sealed.frames, sealed.heads, again, layout)
        assert torch.equal(again, sealed.arena), module
        for dtype_out in (torch.float32, torch.bfloat16, torch.float16):
            got = read(module, sealed, pages, first, dtype_out)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=0, equal_nan=True)


def read(
    module, sealed: Sealed, pages: torch.Tensor, first: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """k, v, notes of `unpack_into`, over poisoned outputs."""
    rows = first.numel() * PAGE_TOKENS
    k = torch.full((rows, sealed.layout.head_dim), torch.nan, dtype=dtype)
    v, notes = k.clone(), torch.full((rows, 2), 0xFF, dtype=torch.uint8)
    module.unpack_into(
        sealed.arena,
        sealed.frames,
        sealed.heads,
        pages,
        first,
        sealed.layout,
        sealed.k_raw.dtype,
        k,
        v,
        notes,
    )
    return k, v, notes


@pytest.mark.parametrize(("high", "low"), PAIRS)
def test_round_trip(high: str, low: str) -> None:
    """Rows come back in tier order with their notes, raw ones exact, others within half a step."""
    layout = layout_of(128, 3, high, low)
    sealed = seal(layout, pages=4, dtype=torch.bfloat16, pack=ops.pack)
    pages = torch.tensor([3, 1, 0], dtype=torch.int32)
    out = ops.unpack(
        sealed.arena, sealed.frames, sealed.heads, pages, layout, torch.float32, torch.bfloat16
    )
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
                    bound = spread / (2**bits - 1) * 0.52 + 2e-3 if bits else 0 * error
                    assert (error <= bound).all()


def test_all_pruned_and_empty_batches() -> None:
    layout = layout_of(64, 2, "K8V4", "K4V2")
    sealed = seal(layout, pages=2, dtype=torch.bfloat16, pack=ops.pack, tiers=PRUNED)
    assert (sealed.arena == 0xFF).all()
    none = torch.empty(0, dtype=torch.int32)
    for pages in (torch.tensor([0, 1]), none):
        out = ops.unpack(
            sealed.arena, sealed.frames, sealed.heads, pages, layout, torch.float32, torch.bfloat16
        )
        assert not out.kept.any() and not out.k.any() and len(out.k) == len(pages)
    no_pages = tuple(x[:0] for x in (sealed.slots, sealed.tiers, sealed.importance))
    ops.pack(
        sealed.k_raw, sealed.v_raw, *no_pages, sealed.frames[:0], sealed.heads[:0],
        sealed.arena, layout,
    )  # fmt: skip


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_constant_and_huge_rows(bits: int) -> None:
    rows = torch.zeros(6, 64)
    rows[1] = 3.3125
    rows[2] = -1e30
    rows[3, ::2] = 1e38
    rows[3, 1::2] = -1e38
    rows[4, 0] = 60000.0
    rows[5, :] = 1.0
    rows[5, 7] += 2**-23
    packed, meta = quantize_rows(rows, bits)
    assert meta.isfinite().all()
    back = dequantize_rows(packed, meta, bits)
    assert back.isfinite().all()
    assert torch.equal(back[:2], rows[:2])
    assert (back[2] == -65504).all()
    assert (back[5] - rows[5]).abs().max() <= 2**-23
    for row in range(len(rows)):
        codes, scale, zero = naive.quantize_row(rows[row].numpy(), bits)
        assert torch.equal(torch.from_numpy(codes), packed[row])
        assert [float(scale), float(zero)] == meta[row].tolist()


def test_importance_codes() -> None:
    x = torch.tensor([1.0, 0.5, 2.0**-31.875, 2.0**-40, 0.0, torch.nan, -1.0, 7.0, torch.inf])
    assert ops.encode_importance(x).tolist() == [255, 247, 0, 0, 0, 0, 0, 255, 255]
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(ops.encode_importance(ops.decode_importance(codes)), codes)
    y = torch.rand(1000).clamp(min=1e-3) ** 3
    ratio = ops.decode_importance(ops.encode_importance(y)) / y
    assert ratio.log2().abs().max() <= 1 / 16 + 1e-3
