# SPDX-License-Identifier: Apache-2.0
"""Sinks, soft caps and windows where a GPU decodes, against float64."""

from __future__ import annotations

import pytest
import torch

from sglang_diffxkv.kernels.decode import naive
from sglang_diffxkv.kernels.decode.triton import attend, decode_open, decode_sealed
from sglang_diffxkv.kernels.decode.work import divide_open
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.pages import LayerPages, OpenPages
from sglang_diffxkv.kernels.softmax import Softmax, add_sinks
from tests.support.attention import assert_close, moved
from tests.support.builders import build_sealed, page_lists, random_tiers
from tests.support.decode_batches import check_step, draw_batch, expected_open
from tests.support.device import DEVICE
from tests.support.layouts import layout_of

pytestmark = pytest.mark.usefixtures("one_thread")


def test_sinks_count_once() -> None:
    """Where there are parts of both kinds, and where a sequence has no pages at all."""
    sinks = torch.tensor([3.0, -4.0, 0.0, 9.0])
    check_step(3, (330, 70), (4, 0), softmax=Softmax(0.125, sinks=sinks), mean=True)
    check_step(1, (330, 0), (4, 0), softmax=Softmax(0.125, sinks=sinks))


@pytest.mark.parametrize("cap", [0.7, 5.0, 50.0])
@pytest.mark.parametrize("tiers", [("K8V4", "K4V2"), ("raw", "K2V2")])
def test_soft_caps(cap: float, tiers: tuple[str, str]) -> None:
    check_step(2, (330, 70), (4, 0), tiers=tiers, softmax=Softmax(0.3, cap=cap))


def test_soft_caps_of_huge_scores() -> None:
    """Their exponentials overflow, and end at the cap."""
    check_step(2, (200, 70), (1, 1), softmax=Softmax(100.0, cap=3.0))


@pytest.mark.parametrize("window_left", [0, 1, 63, 100, 512])
@pytest.mark.parametrize(("queries", "group"), [(1, 2), (4, 3), (8, 1)])
def test_windows(window_left: int, queries: int, group: int) -> None:
    """Lists have the pages of the window; what no query sees of them is NaN in the keys."""
    torch.manual_seed(window_left + queries)
    dim, kv_heads, dtype = 64, 2, torch.bfloat16
    sinks = torch.randn(kv_heads * group)
    softmax = Softmax(0.2, cap=4.0, window_left=window_left, sinks=sinks)
    width = (window_left + queries + PAGE_TOKENS - 2) // PAGE_TOKENS + 1
    lengths = (700, 64 + queries, 129, queries, 640)
    batch = draw_batch(lengths, [0] * 5, kv_heads, dim, dtype, window_pages=width)
    q = torch.randn(len(lengths) * queries, kv_heads * group, dim).to(dtype)
    pages = LayerPages.of_open(*moved(batch.opened[:2], DEVICE))
    sequences, on_device, softmax = moved((batch.sequences, q, softmax), DEVICE)
    work = divide_open(sequences, pages.tables.layout)
    found = attend(on_device, on_device, pages, work, softmax)
    softmax = moved(softmax, "cpu")
    expected = expected_open(q, batch, queries, softmax.of_part)
    assert_close(found, add_sinks(expected, softmax.sinks), 1e-3)


def test_parts_leave_sinks_out() -> None:
    """Attention over open or over sealed pages alone, with a cap and a window."""
    gen = torch.Generator().manual_seed(8)
    layout = layout_of("K8V4", "K4V2", head_dim=64, kv_heads=2)
    arena = build_sealed(layout, random_tiers(3, 2, (0.3, 0.4, 0.3), gen), gen)
    indptr, pages = page_lists([2, 0, 3], 3, gen)
    q = torch.randn(3, 6, 64, generator=gen)
    softmax = Softmax(0.3, cap=2.0, sinks=torch.full((6,), 5.0))
    sealed = arena.tables.listed(indptr, pages)
    found = decode_sealed(*moved((q, sealed, softmax), DEVICE))
    assert_close(found, naive.decode_sealed(q, sealed, softmax), 1e-3)
    batch = draw_batch((130, 64, 1), (0, 0, 0), 2, 64, torch.float32)
    softmax = softmax._replace(window_left=70)
    last_len, opened = batch.sequences.last_len, batch.opened
    found = decode_open(*moved((q, opened, last_len, softmax), DEVICE))
    written = OpenPages(*(x.nan_to_num() for x in opened[:2]), *opened.lists)
    assert_close(found, naive.decode_open(q, written, last_len, softmax), 1e-3)
